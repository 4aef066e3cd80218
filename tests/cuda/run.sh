#!/usr/bin/env bash
# Compiles the kernels of quant/cuda for every architecture that is supported, links and runs a
# program over them. Wanted in the environment: NVCC, CXX, INCLUDE (the root of <budwood/...>) and
# OUT; as arguments the objects of the CPU kernels.
set -euo pipefail
cd "$(dirname "$0")/../.."
architectures=(75 80 86 89 90 100 120)

if ! "$NVCC" --version > /dev/null 2>&1; then
  echo "no nvcc here (NVCC=$NVCC): the CUDA kernels were NOT compiled"
  exit 77
fi
flags=(-std=c++20 -O3 -ccbin "$CXX" --Werror all-warnings "-I$INCLUDE")
codes=()
for a in "${architectures[@]}"; do codes+=(-gencode "arch=compute_$a,code=sm_$a"); done

mkdir -p "$OUT"
export OUT
one='object=$OUT/$(basename "$0").o
changed=$(find quant/cuda quant/kernels tests/cuda/run.sh -newer "$object" 2> /dev/null | head -1)
[ -e "$object" ] && [ -z "$changed" ] || "$@" -c "$0" -o "$object"'
printf '%s\0' quant/cuda/*.cu | xargs -0 -P "$(nproc)" -I{} \
  sh -c "$one" {} "$NVCC" "${flags[@]}" "${codes[@]}"
"$NVCC" "${flags[@]}" -arch=sm_75 -o "$OUT/check_device" tests/cuda/check_device.cpp \
  "$OUT"/*.cu.o "$@"
echo "compiled $(ls quant/cuda/*.cu | wc -l) sources for ${architectures[*]/#/sm_}"
"$OUT/check_device"
