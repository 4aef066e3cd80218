#!/usr/bin/env bash
# Installs Budwood under a prefix and builds a two-line consumer against the prefix, then the same
# consumer against the wheel that PYTHON has.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
torch=$("$PYTHON" -c 'import torch; print(torch.utils.cmake_prefix_path)')

build_and_run() {  # name, CMAKE_PREFIX_PATH
  cmake -S "$here" -B "$work/$1" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$2" \
    > "$work/$1.log" 2>&1 || { cat "$work/$1.log"; exit 1; }
  cmake --build "$work/$1" > "$work/$1.log" 2>&1 || { cat "$work/$1.log"; exit 1; }
  printf '%-8s ' "$1"
  "$work/$1/consumer"
}

cmake --install "$BUILD" --prefix "$work/prefix" > /dev/null
build_and_run prefix "$work/prefix;$torch"
build_and_run wheel "$("$PYTHON" -c 'import budwood; print(budwood.cmake_prefix_path)')"
"$work/prefix/bin/budwood" --version
