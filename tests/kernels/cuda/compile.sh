#!/usr/bin/env bash
# Compiles all CUDA kernels for the GPUs in ARCHS (default: 80 90 100) and prints what ptxas says of them, and the shared memory that they are
# launched with; fails where a register is spilled, or where a block would need more shared memory than it may have.
# Where setup.py has built the CUDA library, its own objects are those that count, unless ARCHS is given: no kernel is compiled.
# Needs nvcc (NVCC names it), a host compiler (CXX) and no GPU. MAX_JOBS types are compiled at a time. Objects and logs: build/kernels/nvcc.
set -euo pipefail
cd "$(dirname "$0")/../../.."
. tests/kernels/built.sh
folder=build/kernels/nvcc
mkdir -p "$folder"
# tables LOG...: of ptxas, and of launch_test
tables() {
  python3 tests/kernels/cuda/ptxas_table.py "$@"
  nice -n 10 "${CXX:-c++}" -std=c++17 -Icsrc tests/kernels/cuda/launch_test.cpp -o "$folder/launch_test"
  "$folder/launch_test" --shared
}
if [ -z "${ARCHS:-}" ]; then
  library=$(built cuda/{double,float,bf16,f16}.o)
  if [ -n "$library" ]; then
    printf 'the objects of %s\n' "$library/cuda"
    tables "$library"/cuda/{double,float,bf16,f16}.o.ptxas
    exit
  fi
fi
nvcc=${NVCC:-nvcc}
archs=(${ARCHS:-80 90 100})
gencode=()
for arch in "${archs[@]}"; do gencode+=(-gencode "arch=compute_$arch,code=sm_$arch"); done
export nvcc folder
printf '%s\n' double float bf16 f16 | xargs -P "${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}" -I{} bash -c '
  states=0
  case {} in float | double) states=1 ;; esac
  nice -n 10 "$nvcc" -std=c++17 -O3 --fmad=false -Xptxas -v -DVCR_DTYPE={} -DVCR_STATES=$states -Xcompiler -fPIC "$@" \
    -c csrc/cuda/instances.cu -o "$folder/{}.o" >"$folder/{}.log" 2>&1 || { cat "$folder/{}.log"; exit 255; }' compile "${gencode[@]}"
tables "$folder"/{float,double,bf16,f16}.log
