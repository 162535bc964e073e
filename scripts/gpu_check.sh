#!/usr/bin/env bash
# Builds, tests and measures vcr_ops on a machine with a GPU, in less than 8 minutes and without a network.
#
#   scripts/gpu_check.sh [OPTION...] OUTDIR
#
# Logs, results (JSON, CSV) and pictures go to OUTDIR; every part runs even if one before it fails. At the end stands a table
# with each part's outcome, and the figures that the run is looked at for (also in OUTDIR/summary.txt).
#
#   --build --tests --sanitizer --bench   these parts alone (--tests: warm, tests and large; --sanitizer: memcheck and
#                     racecheck; --bench: warm, passes, faster and bench)
#   --only PART...    these parts alone, of: build warm tests large memcheck racecheck passes faster bench
#   --backend NAME    of triton and cuda this one alone (default: both; the part bench takes triton)
#   --limit PART=S    S seconds for a part, more or fewer than by default
#   --quick           fewer tests, and the benchmark of one stage: a look at whether everything runs, in at most 4 minutes
#   --dry-run         print the commands and their limits, run nothing
#   --rehearse        without a GPU: the tests and the benchmark on the CPU, where other backends stand in for Triton, and the
#                     CUDA kernels are executed on the host; for a look at whether the scripts run, on small maps
#
# The parts: build the ops, for this GPU alone; warm: compile Triton's kernels for it, on all processors; tests and large
# (past 2^31 elements): with each backend; memcheck and racecheck (the latter of the CUDA kernels alone): compute-sanitizer;
# passes: each one's bandwidth, with each backend; faster: both side by side, which writes vcr_ops/faster.json (copied to
# OUTDIR/faster_table.json); bench: the middle, block and network beside their alternatives, one stage's compiled ones first,
# in its own time and what the parts before it have left of theirs. Blocks and networks are compared eagerly there; their
# compiled ones take minutes each: python -m benchmarks --device cuda --levels block network --all --seconds 1500
#
# PYTHON is the machine's Python (python3). It needs torch, triton, numpy, pytest, and to build pybind11, setuptools, ninja and
# nvcc; pytest-xdist makes the tests faster, matplotlib the pictures, scikit-image and scikit-learn give real images.
# The C++ ops are compiled with -O1 unless CXXFLAGS says otherwise: only their schemas are needed here.
#
# A part's outcome is passed, FAILED, "too long" (stopped at its limit), "incomplete" (ended in time by leaving something out)
# or "left out". Exit status: 0 nothing failed or took too long, 1 something did, 2 wrong usage or no GPU.
set -uo pipefail

usage() {
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$self"
}

die() {
  printf '%s\n' "$@" >&2
  exit 2
}

self=$(realpath "$0")
all=(build warm tests large memcheck racecheck passes faster bench)
# Their sum is less than 8 minutes, and of the quick ones 4; a part with no time is left out.
declare -A limit=([build]=75 [warm]=30 [tests]=90 [large]=30 [memcheck]=30 [racecheck]=25 [passes]=60 [faster]=50 [bench]=85)
declare -A quick_limit=([build]=75 [warm]=20 [tests]=40 [large]=0 [memcheck]=20 [racecheck]=0 [passes]=30 [faster]=20 [bench]=35)
declare -A own_limit=()
chosen=() backends=(triton cuda) outdir='' quick='' dry='' rehearse=''
while [ $# -gt 0 ]; do
  case $1 in
    --build) chosen+=(build) ;;
    --tests) chosen+=(warm tests large) ;;
    --sanitizer) chosen+=(memcheck racecheck) ;;
    --bench) chosen+=(warm passes faster bench) ;;
    --backend)
      case ${2:-} in triton | cuda) backends=("$2") ;; *) die "--backend takes triton or cuda, not '${2:-}'" ;; esac
      shift
      ;;
    --limit)
      [[ ${2:-} =~ ^([a-z]+)=([0-9]+)$ && -n "${limit[${BASH_REMATCH[1]}]:-}" ]] || die "--limit takes PART=SECONDS, not '${2:-}'"
      own_limit[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
      shift
      ;;
    --only)
      while [ $# -gt 1 ] && [ -n "${limit[$2]:-}" ]; do
        chosen+=("$2")
        shift
      done
      [ ${#chosen[@]} -gt 0 ] || die "--only takes parts: ${all[*]}"
      ;;
    --quick) quick=1 ;;
    --dry-run) dry=1 ;;
    --rehearse) rehearse=1 ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*) die "$0 has no option '$1'; --help lists them" ;;
    *)
      [ -z "$outdir" ] || die "one OUTDIR, not '$outdir' and '$1'"
      outdir=$1
      ;;
  esac
  shift
done
[ -n "$outdir" ] || die "usage: $0 [OPTION...] OUTDIR (--help says more)"
[ ${#chosen[@]} -gt 0 ] || chosen=("${all[@]}")

python=${PYTHON:-python3}
case $python in */*) python=$(realpath -s "$python") ;; esac
[ -n "$dry" ] || mkdir -p "$outdir" || die "can't make $outdir"
outdir=$(realpath -m "$outdir")
cd "$(dirname "$self")/.." || exit 2
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
device=cuda workers=$(($(nproc) < 12 ? $(nproc) : 12))
comma=$(IFS=, && echo "${backends[*]}")
export VCR_OPS_GPU_BACKENDS=$comma
if [ -n "$quick" ]; then
  for name in "${all[@]}"; do limit[$name]=${quick_limit[$name]}; done
fi
if [ -n "$rehearse" ]; then
  device=rehearsal workers=2 limit[build]=900 limit[tests]=240 limit[large]=120
  export VCR_OPS_GPU_REHEARSAL=${VCR_OPS_GPU_REHEARSAL:-${comma/triton/cpp}} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  host=build/kernels/cuda-plain/ops.so
  [[ ,$VCR_OPS_GPU_REHEARSAL, != *,cuda,* ]] || export VCR_OPS_CUDA_ON_HOST=$PWD/$host
fi

for name in "${!own_limit[@]}"; do limit[$name]=${own_limit[$name]}; done
total=0 # of the chosen parts
for name in "${all[@]}"; do
  case " ${chosen[*]} " in *" $name "*) total=$((total + limit[$name])) ;; esac
done

has_backend() {
  case " ${backends[*]} " in *" $1 "*) return 0 ;; *) return 1 ;; esac
}

has() {
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null
}

# part_NAME: puts the part's command into `words`; the reason to leave it out, if there is one, into `reason`; and what is
# missing for it into `broken`
part_build() {
  local flags=${CXXFLAGS--O1}
  [ -n "$rehearse" ] && flags=${CXXFLAGS-} # they are what runs there, and may have been built
  words=(env "MAX_JOBS=${MAX_JOBS:-$(nproc)}" "CXXFLAGS=$flags")
  if [ -z "$rehearse" ]; then
    has_backend cuda && words+=(VCR_OPS_CUDA=1) || words+=(VCR_OPS_CUDA=0)
    [ -n "${TORCH_CUDA_ARCH_LIST:-}" ] || words+=("TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null)")
  fi
  words+=("$python" setup.py build_ext --inplace)
  # in a rehearsal the CUDA kernels run on the host
  [ -z "${VCR_OPS_CUDA_ON_HOST:-}" ] || words=(bash -c 'env "$@" && PYTHON=$0 tests/kernels/cuda/run.sh library' "$python" "${words[@]:1}")
  local missing=()
  for module in torch pybind11 setuptools; do
    has "$module" || missing+=("$module")
  done
  has ninja || command -v ninja >/dev/null || missing+=(ninja)
  command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || missing+=("a C++ compiler")
  [ ${#missing[@]} = 0 ] || broken="can't build: $python has no $(printf '%s, ' "${missing[@]}" | sed 's/, $//')"
}

# Tests that have not begun when the time is nearly over are skipped, so that a report is written.
pytest_words() {
  words=(env "VCR_OPS_GPU_TEST_SECONDS=$1" "$python" -m pytest -m gpu -p no:cacheprovider -o addopts= -ra --strict-markers --tb=short --durations=10)
  [ -n "$quick" ] && words+=(--maxfail=20)
}

part_warm() {
  has_backend triton || reason="Triton isn't asked for"
  [ -z "$rehearse" ] || reason="nothing is compiled in a rehearsal"
  local arch
  arch=$("$python" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())' 2>/dev/null)
  words=("$python" -m vcr_ops.triton_common.aot --anew --arch "${arch:-sm_90}" --jobs "$(nproc)")
  case $arch in sm_80 | sm_90 | sm_100 | '') ;; *) reason="no list of kernels for $arch" ;; esac
}

part_tests() {
  pytest_words $((limit[tests] - 20))
  has xdist && words+=(-n "$workers")
  words+=(tests/gpu --ignore tests/gpu/test_large.py)
  [ -n "$quick" ] && words+=(-k "parity or graphs or block")
}

part_large() {
  pytest_words $((limit[large] - 10))
  words+=(tests/gpu/test_large.py)
}

# sanitizer_words TOOL SETTING...
sanitizer_words() {
  local sanitizer
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  words=(env "${@:2}")
  if [ -n "$rehearse" ]; then
    :
  elif [ -n "$sanitizer" ]; then
    words+=("$sanitizer" --tool "$1" --error-exitcode 9 --target-processes application-only)
  else
    reason="no compute-sanitizer here"
  fi
  words+=("$python" -m tests.gpu.sanitizer_case)
}

part_memcheck() {
  # No caching allocator: what reaches over the end of a tensor must not fall into another one.
  sanitizer_words memcheck PYTORCH_NO_CUDA_MEMORY_CACHING=1
}

part_racecheck() {
  has_backend cuda || reason="CUDA C++ isn't asked for"
  sanitizer_words racecheck VCR_OPS_GPU_BACKENDS=cuda
}

# What the benchmark takes for a backend in a rehearsal.
stand_in() {
  case ${rehearse:-0}-$1 in 1-triton) echo composite ;; 1-cuda) echo cpp ;; *) echo "$1" ;; esac
}

bench_words() {
  words=("$python" -m benchmarks "$@" --device "$device")
  if [ -n "$rehearse" ]; then
    words+=(--image-size 32 --batch 2 --stages 1)
  elif [ -n "$quick" ]; then
    words+=(--batch 256 --stages 1)
  fi
}

# Both backends, the second with what time the first has left.
part_passes() {
  local each all='' seconds=$(((limit[passes] - 15) / ${#backends[@]}))
  for each in "${backends[@]}"; do
    bench_words passes
    words+=(--backend "$(stand_in "$each")")
    words+=(--seconds "$seconds" --output "$outdir/passes-$each")
    all+="$(printf '%q ' "${words[@]}") || failed=1; "
  done
  words=(bash -c "failed=0; ${all}exit \$failed")
}

part_faster() {
  [ ${#backends[@]} = 2 ] || reason="one backend alone"
  bench_words faster
  [ -n "$rehearse" ] || words+=(--write)
  words+=(--seconds $((limit[faster] - 15)) --case-seconds 0.05 --output "$outdir/faster")
}

part_bench() {
  local seconds=$((limit[bench] - 25))
  bench_words
  [ ${#backends[@]} = 2 ] || words+=(--backend "$(stand_in "${backends[0]}")")
  [ -n "$rehearse" ] && words+=(--levels middle block --block-batch 2 --case-seconds 0.05)
  [ -n "$quick" ] && words+=(--levels middle --layouts contiguous) || words+=(--compiled-first $((seconds * 3 / 5)))
  words+=(--seconds "$seconds" --output "$outdir/run")
}

# What a part's log says in one line
note_of() {
  case $1 in
    tests | large) grep -E '^(=+ )?[0-9]+ (passed|failed|skipped|error|deselected).* in [0-9.]+s' "$2" | tail -n 1 | tr -d '=' | sed 's/^ *//' ;;
    warm) grep -E '^[0-9]+ kernels' "$2" | tail -n 1 ;;
    memcheck | racecheck) grep -E 'ERROR SUMMARY|RACECHECK SUMMARY|cases ran' "$2" | tail -n 1 | sed 's/^=* *//' ;;
    build) grep -E "can't be built|has no " "$2" | tail -n 1 ;;
    *) grep -E '^(no picture|[0-9]+ of [0-9]+ cases|interrupted|[A-Za-z]*Error)' "$2" | tail -n 1 ;;
  esac
}

report=() failed=0
run_part() {
  local name=$1 words=() reason='' broken='' start=$SECONDS log status outcome note
  log=$outdir/$name.log
  # the last part has what the others have left of their time
  [ "$name" != bench ] || [ -n "$dry" ] || [ -n "${own_limit[bench]:-}" ] ||
    limit[bench]=$((total - SECONDS > limit[bench] ? total - SECONDS : limit[bench]))
  "part_$name"
  [ "${limit[$name]}" != 0 ] || reason="it has no time; --limit $name=S gives it some"
  if [ -n "$dry" ]; then
    printf '%-10s at most %3d s:' "$name" "${limit[$name]}"
    printf ' %q' "${words[@]}"
    printf '%s\n' "${reason:+   (left out: $reason)}${broken:+   ($broken)}"
    return
  fi
  printf '\n=== %s (at most %d s)\n' "$name" "${limit[$name]}"
  if [ -n "$reason" ]; then
    report+=("$(printf '%-10s %-10s %5s    %s' "$name" 'left out' '-' "$reason")")
    echo "left out: $reason"
    return
  fi
  if [ -n "$broken" ]; then
    echo "$broken" | tee "$log"
    status=1
  else
    printf '%q ' "${words[@]}" >"$log"
    echo >>"$log"
    timeout -k 10 "${limit[$name]}" "${words[@]}" >>"$log" 2>&1
    status=$?
    tail -n 12 "$log"
    # what this GPU's measurements have made of the table
    [ "$name" != faster ] || cp vcr_ops/faster.json "$outdir/faster_table.json"
  fi
  case $status in
    0) outcome=passed ;;
    124 | 137) outcome='too long' ;;
    *) outcome=FAILED ;;
  esac
  # a run in which everything was skipped has shown nothing
  note=$(note_of "$name" "$log")
  case $name in
    tests | large) [ "$status" = 0 ] && ! grep -q passed <<<"$note" && outcome=FAILED status=1 ;;
  esac
  [ "$outcome" != passed ] || ! grep -q 'out of time' "$log" || outcome=incomplete
  [ "$status" = 0 ] || failed=1
  report+=("$(printf '%-10s %-10s %5d s  %s' "$name" "$outcome" $((SECONDS - start)) "$note")")
}

if [ -z "$dry" ]; then
  {
    date -u +%FT%TZ
    git log -1 --format='commit %H' 2>/dev/null
    nvidia-smi 2>&1 || echo "no nvidia-smi"
    "$python" -c 'import sys, torch; print(sys.version); print(torch.__config__.show())' 2>&1
    "$python" -c 'import triton; print("triton", triton.__version__)' 2>&1 | tail -n 1
  } >"$outdir/machine.log"
  if [ -z "$rehearse" ]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>>"$outdir/machine.log" ||
      die "$python finds no torch with a GPU (see $outdir/machine.log); --rehearse and --dry-run need none"
  fi
fi

for name in "${all[@]}"; do
  case " ${chosen[*]} " in *" $name "*) run_part "$name" ;; esac
done
[ -z "$dry" ] || exit 0

results=()
for file in "$outdir"/passes-{triton,cuda}.json "$outdir/faster.json" "$outdir/run.json"; do
  [ -f "$file" ] && results+=("$file")
done
{
  printf '\n%-10s %-10s %7s  %s\n' part outcome time note
  printf '%s\n' "${report[@]}"
  printf '%d s in all\n\n' "$SECONDS"
  [ ${#results[@]} = 0 ] || "$python" -m benchmarks headlines "${results[@]}" 2>&1
} | tee "$outdir/summary.txt"
exit $failed
