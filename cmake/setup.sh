#!/usr/bin/env bash
# Installs what building SpecAttn needs and is not here yet, through apt. Silent, and without network, when all is here.
#   bash cmake/setup.sh          compilers, CMake and the libraries of the library, its tests and the mini-LLM
#   bash cmake/setup.sh --dev    also clang, its library, clang-format, clang-tidy, the fuzzer's runtime and python3
set -euo pipefail

# Debian package, and a command or a file that shows it is here even if it came another way.
wanted=(
  "g++               g++"
  "make              make"
  "cmake             cmake"
  "pkg-config        pkg-config"
  "libeigen3-dev     /usr/include/eigen3/Eigen/Core"
  "doctest-dev       /usr/include/doctest/doctest.h"
  "libcli11-dev      /usr/include/CLI/CLI.hpp"
  "nlohmann-json3-dev /usr/include/nlohmann/json.hpp"
  "libpcre2-dev      /usr/include/pcre2.h"
)
development=(
  "clang             clang++"
  "libc++-dev        /usr/lib/llvm-14/include/c++/v1/vector"
  "libc++abi-dev     /usr/lib/llvm-14/lib/libc++abi.so"
  "clang-format-14   clang-format-14"
  "clang-tidy-14     clang-tidy-14"
  "libclang-rt-14-dev /usr/lib/llvm-14/lib/clang/14.0.6/lib/linux/libclang_rt.fuzzer-x86_64.a"
  "python3           python3"
)
case "${1-}" in
  "") ;;
  --dev) wanted+=("${development[@]}") ;;
  *)
    echo "usage: bash cmake/setup.sh [--dev]" >&2
    exit 2
    ;;
esac

is_here() { # package probe
  if [[ $2 == /* ]]; then
    [[ -e $2 ]] && return 0
  else
    command -v "$2" >/dev/null 2>&1 && return 0
  fi
  command -v dpkg-query >/dev/null 2>&1 &&
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

missing=()
for line in "${wanted[@]}"; do
  read -r package probe <<<"$line"
  is_here "$package" "$probe" || missing+=("$package")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

give_up() {
  echo "setup: $1" >&2
  echo "setup: please install by hand: ${missing[*]}" >&2
  exit 1
}

command -v apt-get >/dev/null 2>&1 || give_up "no apt-get here; these are the Debian names of what is missing"
as_root=()
if [[ $(id -u) -ne 0 ]]; then
  command -v sudo >/dev/null 2>&1 || give_up "neither root nor sudo"
  as_root=(sudo)
fi

echo "setup: installing ${missing[*]}" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install_all() {
  "${as_root[@]}" apt-get update -qq &&
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}
if ! install_all >"$log" 2>&1; then
  tail -n 20 "$log" >&2
  give_up "apt-get failed (its last lines are above)"
fi
