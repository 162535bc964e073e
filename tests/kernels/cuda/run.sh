#!/usr/bin/env bash
# The CUDA kernels executed on the host, without torch and without CUDA: builds the tests and runs them. Exits with non-zero status when a
# check fails.
#
#   tests/kernels/cuda/run.sh [MODE...]     default: plain
#
#   plain   optimised
#   asan    AddressSanitizer and UndefinedBehaviorSanitizer
#   tsan    ThreadSanitizer, to which a kernel's threads are threads: a missing barrier is a race
#   all     all of these
#   library builds build/kernels/cuda-plain/ops.so, with which tests marked `cuda` run the ops and their bindings from Python; needs torch
#
# EVERY=n takes every n-th case (1: all of them; default: as many as take about half a minute; less than 8: of the middle, and all of other
# ops) beside those that always run. From 8 on it should have no factor in common with the variants' loops, which are of 2, 3 and 5: else
# whole variants are missed. CXX is the compiler, MAX_JOBS the compile jobs at a time. Objects stay in build/kernels and are made anew when a
# source is newer.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=tests/kernels/cuda
jobs=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}
compiler=${CXX:-c++}
common=(-std=c++17 -ffp-contract=off -fno-math-errno -pthread -Wall -Wextra -Icsrc -Itests/kernels/cpu -I$here)

die() {
  printf '%s\n' "$@" >&2
  exit 1
}

# compile NAME COMPILER_OPTIONS...: the programs build/kernels/NAME/{driver,layer_test,launch_test}. The reference is always optimised and
# never instrumented.
compile() {
  local name=$1 folder=build/kernels/$1 type source
  shift
  mkdir -p "$folder"
  local stamp="$compiler ${common[*]} $*"
  [ -f "$folder/options" ] && [ "$(cat "$folder/options")" = "$stamp" ] || rm -f "$folder"/*.o
  printf '%s\n' "$stamp" >"$folder/options"
  newest=$(find csrc tests/kernels \( -name '*.h' -o -name '*.cuh' \) -printf '%T@ %p\n' | sort -rn | sed -n '1s/[^ ]* //p')
  stale() { [ ! -f "$1" ] || [ "$2" -nt "$1" ] || [ "$newest" -nt "$1" ]; }
  local list=$folder/commands
  : >"$list"
  job() { # OBJECT SOURCE OPTIONS...
    local object=$1 source=$2
    shift 2
    ! stale "$object" "$source" || printf '%s -c %s -o %s.new && mv %s.new %s\n' "$compiler ${common[*]} $*" "$source" "$object" "$object" "$object" >>"$list"
  }
  for type in float double bf16 f16; do job "$folder/$type.o" "$here/host_kernels.cpp" "$@" "-DVCR_DTYPE=$type"; done
  for source in layer_test launch_test; do job "$folder/$source.o" "$here/$source.cpp" "$@"; done
  local plain=() layer=()
  for option in "$@"; do
    case $option in -O*) ;; *) plain+=("$option") ;; esac
    case $option in -fsanitize=thread) layer+=(-DSIMT_TSAN) ;; *) layer+=("$option") ;; esac
  done
  job "$folder/simt.o" "$here/simt.cpp" "${layer[@]}"
  job "$folder/driver.o" "$here/driver.cpp" -O1 "${plain[@]}"
  for source in reference cases; do job "$folder/$source.o" "tests/kernels/cpu/$source.cpp" -O2; done
  xargs -P "$jobs" -d '\n' -I{} nice -n 10 bash -c '{}' <"$list" || die "compiling $name failed"
}

# link NAME COMPILER_OPTIONS...: the programs
link() {
  local name=$1 folder=build/kernels/$1 plain=() option source
  shift
  for option in "$@"; do
    case $option in -O*) ;; *) plain+=("$option") ;; esac
  done
  $compiler -pthread "${plain[@]}" "$folder"/{float,double,bf16,f16,simt,driver,reference,cases}.o -o "$folder/driver"
  for source in layer_test launch_test; do $compiler -pthread "${plain[@]}" "$folder"/{simt,$source}.o -o "$folder/$source"; done
}

# build_and_run NAME COMPILE_OPTIONS... [-- DRIVER_OPTIONS...]
build_and_run() {
  local name=$1 options=() start=$SECONDS built
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
  [ $# = 0 ] || shift
  compile "$name" "${options[@]}"
  link "$name" "${options[@]}"
  built=$SECONDS
  printf '%s (compiled in %d s)\n' "$name" $((built - start))
  for program in layer_test launch_test; do nice -n 10 "build/kernels/$name/$program" || die "$name: $program FAILED"; done
  nice -n 10 "build/kernels/$name/driver" "$@" || die "$name: FAILED"
  printf '%s: passed in %d s\n' "$name" $((SECONDS - built))
}

# stopped NAME FAULT WORDS: a seeded fault ends the layer's test with a message that has WORDS
stopped() {
  local said
  said=$(nice -n 10 "build/kernels/$1/layer_test" --fault "$2" 2>&1) && die "$1: nothing stopped the seeded fault '$2'"
  grep -q "$3" <<<"$said" || die "$1: the seeded fault '$2' ended otherwise:" "$said"
  printf '  seeded fault "%s" is stopped (%s)\n' "$2" "$3"
}

mode_plain() {
  build_and_run cuda-plain -O2 -fPIC -- --every "${EVERY:-4}"
  for fault in sync cluster_sync grid_sync tail stride; do stopped cuda-plain "$fault" 'wrong values'; done
  for fault in index guard; do stopped cuda-plain "$fault" 'outside its shared memory'; done
  stopped cuda-plain divergent 'different barriers'
  stopped cuda-plain deadlock 'wait for ever'
  stopped cuda-plain grid "aren't there at once"
  stopped cuda-plain ended 'a block that has ended'
}
mode_asan() {
  export ASAN_OPTIONS=detect_leaks=0:${ASAN_OPTIONS:-} UBSAN_OPTIONS=print_stacktrace=1:${UBSAN_OPTIONS:-}
  build_and_run cuda-asan -O1 -g1 --param asan-instrumentation-with-call-threshold=0 -fsanitize=address,undefined \
    -fno-sanitize=null,object-size,pointer-overflow,vptr -fno-sanitize-recover=undefined -- --every "${EVERY:-29}"
  for fault in index tail guard; do stopped cuda-asan "$fault" 'ERROR: AddressSanitizer'; done
}
mode_tsan() {
  export TSAN_OPTIONS=halt_on_error=1:${TSAN_OPTIONS:-}
  build_and_run cuda-tsan -O1 -g1 -fsanitize=thread -- --every "${EVERY:-19}" --small 1200
  for fault in sync cluster_sync grid_sync warp blocks; do stopped cuda-tsan "$fault" 'WARNING: ThreadSanitizer: data race'; done
}

mode_library() {
  compile cuda-plain -O2 -fPIC
  local folder=build/kernels/cuda-plain torch flags source objects=()
  torch=$("${PYTHON:-.venv/bin/python}" -c 'import importlib.util; print(importlib.util.find_spec("torch").submodule_search_locations[0])')
  flags="-O1 -fPIC -fvisibility=hidden -isystem$torch/include -DTORCH_TARGET_VERSION=0x020a000000000000 -DVCR_CUDA_KEY=PrivateUse1"
  for source in "$here/host_library.cpp" csrc/*/binding_cuda.cpp; do
    objects+=("$folder/$(basename "$(dirname "$source")")-library.o")
    printf '%s -c %s -o %s\n' "$compiler ${common[*]} $flags" "$source" "${objects[-1]}"
  done | xargs -P "$jobs" -d '\n' -I{} nice -n 10 bash -c '{}' || die "compiling the bindings failed"
  for source in cuda concept_modulate concept_reason concept_sample vcr_middle; do objects+=("$folder/$source-library.o"); done
  $compiler -shared -pthread "$folder"/{float,double,bf16,f16,simt}.o "${objects[@]}" -L"$torch/lib" -ltorch_cpu -Wl,-rpath-link,"$torch/lib" \
    -Wl,--no-undefined -o "$folder/ops.so.new" && mv "$folder/ops.so.new" "$folder/ops.so"
  printf 'built %s\n' "$folder/ops.so"
}

[ $# -gt 0 ] || set -- plain
[ "$*" != all ] || set -- plain asan tsan
for mode in "$@"; do
  case $mode in
    plain | asan | tsan | library) "mode_$mode" ;;
    *) die "usage: $0 [plain|asan|tsan|all|library]..." ;;
  esac
done
