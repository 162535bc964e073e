#!/usr/bin/env bash
# The kernels without torch: builds the driver and runs it. Exits with non-zero status when a check fails.
#
#   tests/kernels/cpu/run.sh [MODE...]     default: plain
#
#   plain   as in the product, at every level this machine has: the objects of the build in place where there is one, else compiled alike
#   wide    64-byte vectors in the compiler's generic form: the code of machines with AVX-512, on any machine
#   asan    AddressSanitizer and UndefinedBehaviorSanitizer, 32-byte vectors in the generic form: a masked load of avx2 is an intrinsic,
#           which no sanitizer looks into (what those touch, simd_test.cpp checks against pages without access)
#   tsan    ThreadSanitizer, likewise
#   neon    for Arm, under qemu
#   all     all of these
#
# CXX is the compiler, MAX_JOBS the compile jobs at a time. Objects stay in build/kernels and are made anew when a source is newer.
set -euo pipefail
cd "$(dirname "$0")/../../.."
. tests/kernels/built.sh
here=tests/kernels/cpu
jobs=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}
common=(-std=c++17 -ffp-contract=off -fno-math-errno -fvisibility=hidden -pthread -Icsrc)
avx2=(-mavx2 -mfma -mf16c)
avx512=(-mavx512f -mavx512bw -mavx512dq -mavx512vl "${avx2[@]}" -mprefer-vector-width=512)

die() {
  printf '%s\n' "$@" >&2
  exit 1
}
has() { # FLAG...: this machine's processor has them all
  local flag
  for flag in "$@"; do grep -qwm1 "$flag" /proc/cpuinfo 2>/dev/null || return 1; done
}

# compile NAME LEVEL COMPILER_OPTIONS...: the driver build/kernels/NAME/driver. The reference is always optimised and never instrumented.
# LEVEL names the kernels' tables: one of the product's, or `tested`.
compile() {
  local name=$1 level=$2 folder=build/kernels/$1 kernels='' source object type
  shift 2
  [ "$level" = tested ] || kernels=$(built kernels/"$level"-{bf16,float,double}.o)
  mkdir -p "$folder"
  local stamp="$compiler ${common[*]} $*"
  [ -f "$folder/options" ] && [ "$(cat "$folder/options")" = "$stamp" ] || rm -f "$folder"/*.o
  printf '%s\n' "$stamp" >"$folder/options"
  newest=$(find csrc "$here" -name '*.h' -printf '%T@ %p\n' | sort -rn | sed -n '1s/[^ ]* //p')
  stale() { [ ! -f "$1" ] || [ "$2" -nt "$1" ] || [ "$newest" -nt "$1" ]; }
  local list=$folder/commands
  : >"$list"
  job() { # OBJECT SOURCE OPTIONS...
    local object=$1 source=$2
    shift 2
    ! stale "$object" "$source" || printf '%s -c %s -o %s.new && mv %s.new %s\n' "$compiler ${common[*]} $*" "$source" "$object" "$object" "$object" >>"$list"
  }
  if [ -n "$kernels" ]; then
    printf '%s: the kernels of %s\n' "$name" "$kernels"
    kernels=("$kernels/kernels/$level"-{bf16,float,double}.o)
  else
    kernels=("$folder"/{bf16,float,double}.o)
    for type in bf16 float double; do job "$folder/$type.o" csrc/cpu/table_isa.cpp "$@" "-DVCR_LEVEL=$level" "-DVCR_DTYPE=$type"; done
  fi
  job "$folder/simd_test.o" "$here/simd_test.cpp" "$@"
  # one level's flags are for the kernels alone
  local plain=()
  for option in "$@"; do case $option in -m* | -D* | -O*) ;; *) plain+=("$option") ;; esac done
  job "$folder/driver.o" "$here/driver.cpp" -O1 "${plain[@]}" "-DVCR_LEVEL=$level" -Wall -Wextra
  for source in reference cases fresh_memory; do job "$folder/$source.o" "$here/$source.cpp" -O2 -Wall -Wextra; done
  xargs -P "$jobs" -d '\n' -I{} nice -n 10 bash -c '{}' <"$list" || die "compiling $name failed"
  $compiler -pthread "${plain[@]}" -Wl,--wrap=aligned_alloc "${kernels[@]}" "$folder"/{simd_test,driver,reference,cases,fresh_memory}.o -o "$folder/driver"
}

# build_and_run NAME LEVEL COMPILE_OPTIONS... [-- DRIVER_OPTIONS...]
build_and_run() {
  local name=$1 level=$2 options=() start=$SECONDS built
  shift 2
  while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
  [ $# = 0 ] || shift
  compile "$name" "$level" "${options[@]}"
  built=$SECONDS
  printf '%s (compiled in %d s)\n' "$name" $((built - start))
  "${runner[@]}" nice -n 10 "build/kernels/$name/driver" "$@" || die "$name: FAILED"
  printf '%s: passed in %d s\n' "$name" $((SECONDS - built))
}

# must_stop NAME FAULT WORDS: the sanitizer ends the driver with a message that has WORDS
must_stop() {
  local said
  said=$("build/kernels/$1/driver" --fault "$2" 2>&1) && die "$1: nothing stopped the seeded fault '$2'"
  grep -q "$3" <<<"$said" || die "$1: the seeded fault '$2' ended otherwise:" "$said"
  printf '%s: the seeded fault "%s" is stopped (%s)\n' "$1" "$2" "$3"
}

mode_plain() {
  if [ "$(uname -m)" = x86_64 ]; then
    build_and_run plain-baseline baseline -O3
    ! has avx2 fma f16c || build_and_run plain-avx2 avx2 -O3 "${avx2[@]}"
    ! has avx512f avx512bw avx512dq avx512vl || build_and_run plain-avx512 avx512 -O3 "${avx512[@]}"
  else
    build_and_run plain-neon neon -O3
  fi
}
mode_wide() {
  [ "$(uname -m)" = x86_64 ] || { echo "wide: SKIPPED, it is for x86-64"; return; }
  build_and_run wide tested -O1 -DVCR_CALLS -DVCR_VECTOR_BYTES=64 -Wno-psabi
}

sanitized_level() {
  level=()
  [ "$(uname -m)" != x86_64 ] || level=(-DVCR_VECTOR_BYTES=32 -Wno-psabi)
}
mode_asan() {
  sanitized_level
  export ASAN_OPTIONS=detect_leaks=0:${ASAN_OPTIONS:-} UBSAN_OPTIONS=print_stacktrace=1:${UBSAN_OPTIONS:-}
  # To compile in a third of the time: AddressSanitizer calls functions, and UBSan's checks of what it sees better are left out.
  build_and_run asan tested -O1 -DVCR_CALLS -g1 --param asan-instrumentation-with-call-threshold=0 -fsanitize=address,undefined \
    -fno-sanitize=null,object-size,pointer-overflow,vptr -fno-sanitize-recover=undefined "${level[@]}" -- --every 7
  must_stop asan overread 'ERROR: AddressSanitizer'
}
mode_tsan() {
  sanitized_level
  build_and_run tsan tested -O1 -DVCR_CALLS -g1 -fsanitize=thread "${level[@]}" -- --every 7
  must_stop tsan race 'WARNING: ThreadSanitizer: data race'
}

mode_neon() {
  if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      apt-get install -y -qq g++-aarch64-linux-gnu qemu-user >/dev/null 2>&1 || true
    fi
  fi
  if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
    echo "neon: SKIPPED, this machine lacks aarch64-linux-gnu-g++ or qemu-aarch64 (apt-get install g++-aarch64-linux-gnu qemu-user)"
    return
  fi
  local compiler=aarch64-linux-gnu-g++ runner=(under_qemu)
  build_and_run neon tested -O1 -Wno-psabi -- --every 6
}
under_qemu() { # nice -n 10 DRIVER OPTIONS...
  nice -n 10 qemu-aarch64 -L /usr/aarch64-linux-gnu "${@:4}"
}

compiler=${CXX:-c++}
runner=(env)
[ $# -gt 0 ] || set -- plain
[ "$*" != all ] || set -- plain wide asan tsan neon
for mode in "$@"; do
  case $mode in
    plain | wide | asan | tsan | neon) "mode_$mode" ;;
    *) die "usage: $0 [plain|wide|asan|tsan|neon|all]..." ;;
  esac
done
