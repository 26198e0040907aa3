#!/bin/sh
# select() and its peers in one go: makes OUT/select-h100.md, what stands above the figures taken from the one in
# bench/results, and OUT/select-h100.svg. README.md says how to build PROGRAM and where FILE comes from.
#   bench/peers/select.sh PROGRAM OUT [FILE]
set -eu
here=$(dirname "$0")
program=$1 out=$2
real=${3:+--real $3}
report=$out/select-h100.md
"$program" --smoke $real >/dev/null
sed '/^device: /,$d' "$here/../results/select-h100.md" >"$report"
"$program" $real >>"$report"
{
  printf '\nPyTorch, in a process of its own: '
  python3 "$here/torch_top_p.py" $real
} >>"$report"
python3 "$here/../plot_select.py" "$report" "$out/select-h100.svg"
