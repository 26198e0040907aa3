#!/bin/sh
# attend() and its peers in one go: makes OUT/attend-peers.md, FlashInfer's table and PyTorch's. README.md says how to
# build PROGRAM.
#   bench/peers/attend.sh PROGRAM OUT
set -eu
here=$(dirname "$0")
program=$1 report=$2/attend-peers.md
"$program" --smoke >/dev/null
"$program" >"$report"
{
  printf '\nPyTorch, in a process of its own: '
  python3 "$here/torch_attention.py"
} >>"$report"
