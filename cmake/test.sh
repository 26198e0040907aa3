#!/usr/bin/env bash
# Installs what is missing, builds everything and runs every test.
#   bash cmake/test.sh                    every test
#   bash cmake/test.sh --labels REGEX     those with a matching label: cpu, cuda, emulated, mini_llm, threads, examples, bench,
#                                         headers, compile_fail, package, lint
# Further arguments go to ctest.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

arguments=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    --labels)
      [[ $# -ge 2 ]] || { echo "usage: bash cmake/test.sh [--labels REGEX] [ctest arguments]" >&2; exit 2; }
      arguments+=(--label-regex "$2")
      shift
      ;;
    --labels=*) arguments+=(--label-regex "${1#--labels=}") ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

bash "$root/cmake/setup.sh"
cmake -S "$root" -B "$root/build" -D CMAKE_BUILD_TYPE=Release -D SPECATTN_BUILD_TESTS=ON -D SPECATTN_BUILD_EXAMPLES=ON \
  -D SPECATTN_BUILD_BENCH=ON -D SPECATTN_BUILD_MINI_LLM=ON
cmake --build "$root/build" --parallel "$(nproc)"
cd "$root/build"
ctest --output-on-failure --no-tests=error --parallel "$(nproc)" "${arguments[@]}"
