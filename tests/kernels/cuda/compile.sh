#!/usr/bin/env bash
# Compiles all CUDA kernels for the GPUs in ARCHS (default: 80 90 100) and prints what ptxas says of them; fails where a register is spilled.
# Where setup.py has built the CUDA library, its own objects are those that count, unless ARCHS is given: nothing is compiled.
# Needs nvcc (NVCC names it) and no GPU. MAX_JOBS types are compiled at a time. Objects and logs: build/kernels/nvcc.
set -euo pipefail
cd "$(dirname "$0")/../../.."
. tests/kernels/built.sh
if [ -z "${ARCHS:-}" ]; then
  library=$(built cuda/{double,float,bf16,f16}.o)
  if [ -n "$library" ]; then
    printf 'the objects of %s\n' "$library/cuda"
    exec python3 tests/kernels/cuda/ptxas_table.py "$library"/cuda/{double,float,bf16,f16}.o.ptxas
  fi
fi
nvcc=${NVCC:-nvcc}
archs=(${ARCHS:-80 90 100})
folder=build/kernels/nvcc
mkdir -p "$folder"
gencode=()
for arch in "${archs[@]}"; do gencode+=(-gencode "arch=compute_$arch,code=sm_$arch"); done
export nvcc folder
printf '%s\n' double float bf16 f16 | xargs -P "${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}" -I{} bash -c '
  states=0
  case {} in float | double) states=1 ;; esac
  nice -n 10 "$nvcc" -std=c++17 -O3 --fmad=false -Xptxas -v -DVCR_DTYPE={} -DVCR_STATES=$states -Xcompiler -fPIC "$@" \
    -c csrc/cuda/instances.cu -o "$folder/{}.o" >"$folder/{}.log" 2>&1 || { cat "$folder/{}.log"; exit 255; }' compile "${gencode[@]}"
python3 tests/kernels/cuda/ptxas_table.py "$folder"/{float,double,bf16,f16}.log
