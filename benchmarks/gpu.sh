#!/usr/bin/env bash
# Everything that wants a GPU, in parts, on a machine where nothing can be installed.
#
#   benchmarks/gpu.sh OUT [first | second | rest | PART ...]
#
# first: is every operator right, how fast is it beside its peers, and what limits it: environment check headline
# counters. second: gpu-tests candidates step-16 determinism. Each of the two ends within six minutes, of which every
# part has its share and what those before it have left, the most valuable first (docs/gpu.md has the plan). rest, for
# whoever has longer: kernel-tests adapters lora attention rows tuning model step-16-whole step-64 generation sanitizer,
# of about eight minutes each. Without a name all three. A part leaves OUT/PART.json (tests: .xml; benchmarks and counters:
# OUT/results/DEVICE/DATE-COMMIT/SUITE.json, which `python -m benchmarks.harness report` and `compare` read) and its output in
# OUT/log.txt, so that one that dies takes nothing along; interrupted from a terminal, it stops with what it has.
# Needs python3 (or PYTHON=...) with torch, triton, transformers, pytest and pytest-benchmark, and nothing else; with
# pytest-xdist it is faster. PEERS=DIR names a folder of wheels (flash-attn, liger-kernel ...), which are unpacked and
# measured beside. PACK=FILE.tar.gz holds OUT as one file, made anew after each part. LION_BENCH_COMMIT=NAME is the
# commit of a copy without its history. TRITON_CACHE=FILE names a cache that benchmarks/triton_cache.py made for this
# Python and Triton: what the check and the training step launch need not be compiled then.
# Without a GPU it is a dry run: the same lines, on small shapes, with kernels in Triton's interpreter.
set -uo pipefail

FIRST=(environment check headline counters)
SECOND=(gpu-tests candidates step-16 determinism)
REST=(kernel-tests adapters lora attention rows tuning model step-16-whole step-64 generation sanitizer)
OPERATORS=(adapters lora attention rows)
# Seconds that a part may take. Those of first, and those of second, come to 350.
declare -A LIMITS=(
  [environment]=45 [check]=120 [headline]=120 [counters]=65
  [gpu-tests]=90 [candidates]=45 [step-16]=160 [determinism]=55
)
REST_LIMIT=470
if [ $# -lt 1 ]; then
  sed -n '2,21s/^# \{0,1\}//p' "$0"
  exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
shift
[ -n "${PEERS:-}" ] && { PEERS=$(cd "$PEERS" && pwd) || exit 2; }
[ -n "${TRITON_CACHE:-}" ] && { TRITON_CACHE=$(realpath -e "$TRITON_CACHE") || exit 2; }
[ -n "${PACK:-}" ] && { PACK=$(cd "$(dirname "$PACK")" && pwd)/$(basename "$PACK") || exit 2; }
PARTS=()
for part in "${@:-all}"; do
  case " ${FIRST[*]} ${SECOND[*]} ${REST[*]} all first second rest operators " in
    *" $part "*) ;;
    *) echo "no part $part" >&2; exit 2 ;;
  esac
  case $part in
    all) PARTS+=("${FIRST[@]}" "${SECOND[@]}" "${REST[@]}") ;;
    first) PARTS+=("${FIRST[@]}") ;;
    second) PARTS+=("${SECOND[@]}") ;;
    rest) PARTS+=("${REST[@]}") ;;
    operators) PARTS+=("${OPERATORS[@]}") ;;
    *) PARTS+=("$part") ;;
  esac
done
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python3}
export PYTHONPATH=.:kernels:reference${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ -n "${PEERS:-}" ]; then
  unpacked=$(mktemp -d) || exit 2
  trap 'rm -rf "$unpacked"' EXIT
  for wheel in "$PEERS"/*.whl; do
    [ -e "$wheel" ] || { echo "no wheels in $PEERS" >&2; exit 2; }
    "$PYTHON" -m zipfile -e "$wheel" "$unpacked" || exit 2
  done
  PYTHONPATH+=:$unpacked
fi
if [ -n "${TRITON_CACHE:-}" ]; then
  export TRITON_CACHE_DIR=$OUT/triton-cache TRITON_DISABLE_LINE_INFO=1
  "$PYTHON" benchmarks/triton_cache.py unpack "$TRITON_CACHE" "$TRITON_CACHE_DIR" || exit 2
fi
LOG=$OUT/log.txt
GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 2
if [ -n "$GPU" ]; then
  unset TRITON_INTERPRET TRITON_PTXAS_PATH TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
  PROCESSES=$(($(nproc) < 12 ? $(nproc) : 12))
else
  echo "no CUDA device: a dry run, which measures nothing"
  export TRITON_INTERPRET=1
  PROCESSES=1
fi
HAS_XDIST=
"$PYTHON" -c 'import xdist' 2> /dev/null && HAS_XDIST=1

# What a script in the background starts ignores SIGINT, which asks it to stop, unless it is set to be heard.
HEARING='import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])'

# What is left of the part's time, in seconds, less those that the argument keeps back.
left() {
  local seconds=$((PART_ENDS - SECONDS - ${1:-0}))
  echo $((seconds > 11 ? seconds : 11))
}

# The first argument is how long the command may take, in seconds; ten before that it is asked to stop, and so it is
# where the script is interrupted: a terminal does not reach it.
limited() {
  local seconds=$1 running status interrupted=
  shift
  timeout --signal=INT --kill-after=10 $((seconds - 10)) "$PYTHON" -c "$HEARING" "$@" &
  running=$!
  trap 'interrupted=1; kill -INT "$running" 2>/dev/null' INT TERM
  wait "$running"
  status=$?
  while kill -0 "$running" 2>/dev/null; do # the trap has ended the wait
    wait "$running"
    status=$?
  done
  trap - INT TERM
  [ -z "$interrupted" ] || exit "$status" # a part is a shell of its own: none of its other commands begins
  return "$status"
}

run_tests() { # where the report goes, how many processes, then pytest's arguments
  local report=$1 processes=$2 spread=()
  shift 2
  [ -n "$HAS_XDIST" ] && [ "$processes" -gt 1 ] && spread=(-n "$processes" --dist loadgroup)
  limited "$(left)" "$PYTHON" -m pytest -q -p no:cacheprovider "${spread[@]}" --junitxml="$report" "$@"
}

benchmarks_of() { # the suites; the last benchmark begins when 15 seconds are left, two starts of Python counted
  local few=()
  [ -z "$GPU" ] && few=(--quick)
  limited "$(left)" "$PYTHON" -m benchmarks.harness run "$@" --out "$OUT/results" --seconds "$(left 28)" "${few[@]}"
}

# Compiles what a suite would measure, in several processes, so that it need not when it measures: for the background,
# while nothing is timed. On what it could not compile the suite itself has its say.
compile() { # the suite, the processes
  [ -n "$GPU" ] && [ -n "$HAS_XDIST" ] || return 0
  LION_BENCH_COMPILE_ONLY=1 TORCHINDUCTOR_COMPILE_THREADS=2 limited "$(left)" "$PYTHON" -m pytest -q \
    -p no:cacheprovider -n "$2" --benchmark-disable "benchmarks/bench_$1.py" > "$OUT/compile-$1.txt" 2>&1
  tail -n 1 "$OUT/compile-$1.txt"
}

# ---------------------------------------------------------------- first

environment() {
  command -v nvidia-smi && nvidia-smi
  limited "$(left)" "$PYTHON" -m lion_fast.check.environment --rates --json "$OUT/environment.json"
}

check() { # every operator in fp32, fp16 and bf16 with all gradients, and on the model's own shapes; no times
  local which=() status
  [ -z "$GPU" ] && which=(--operators rms_norm gated_gelu)
  compile headline 6 &
  limited "$(left)" "$PYTHON" -m lion_fast check "${which[@]}" --processes "$PROCESSES" --repeats 2 --no-times \
    --json "$OUT/check.json"
  status=$?
  wait
  return $status
}

headline() {
  benchmarks_of headline
}

counters() {
  local raw=$OUT/counters.csv sections=() section
  if [ -z "$GPU" ] || ! command -v ncu > /dev/null; then
    echo "no ncu, or no GPU: the calls that it would count run by themselves"
    limited "$(left)" "$PYTHON" -m benchmarks.counters
    return
  fi
  for section in SpeedOfLight ComputeWorkloadAnalysis MemoryWorkloadAnalysis WarpStateStats Occupancy LaunchStats; do
    sections+=(--section "$section")
  done
  # Clocks stay as they are, and the cache is emptied before each pass.
  limited "$(left 12)" ncu --clock-control none --cache-control all --profile-from-start off "${sections[@]}" \
    --csv --page raw --print-units base --log-file "$raw" "$PYTHON" -m benchmarks.counters || tail -n 5 "$raw"
  limited "$(left)" "$PYTHON" -m benchmarks.counters --read "$raw" --out "$OUT/results"
}

# ---------------------------------------------------------------- second

gpu-tests() { # those that need a GPU, but for the slow ones; in a dry run they are collected, and others run
  local status
  export OMP_NUM_THREADS=2 # of each process: references in fp64 are computed on the CPU
  compile candidates 3 &
  mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests) # to collect all takes 9 s of each process
  run_tests "$OUT/gpu-tests.xml" $((PROCESSES < 8 ? PROCESSES : 8)) -m "gpu and not slow" "${files[@]}"
  status=$?
  if [ -z "$GPU" ] && [ $status -eq 0 ]; then
    run_tests "$OUT/dry-tests.xml" 1 tests/kernels/test_gated_gelu.py tests/kernels/test_rms_norm.py -k "agrees or bits"
    status=$?
  fi
  wait
  return $status
}

candidates() {
  benchmarks_of candidates
}

step-16() { # images, of LION-FlanT5-XL; in a dry run two, of a small model
  local peers="original,lion_fast,torch.compile by block" pictures=16 seconds=8
  [ -z "$GPU" ] && peers=original,lion_fast pictures=2 seconds=0
  LION_STEP_PEERS=$peers LION_STEP_PICTURES=$pictures LION_STEP_SECONDS=$seconds benchmarks_of training_step
}

determinism() {
  local which=() repeats=200
  [ -z "$GPU" ] && which=(--operators rms_norm) && repeats=3
  limited "$(left)" "$PYTHON" -m lion_fast check "${which[@]}" --dtypes "$([ -n "$GPU" ] && echo bfloat16 || echo float16)" \
    --processes "$PROCESSES" --repeats $repeats --no-times --json "$OUT/determinism.json"
}

# ---------------------------------------------------------------- rest

kernel-tests() {
  if [ -n "$GPU" ]; then
    run_tests "$OUT/kernel-tests.xml" 4 -m "not gpu or slow" tests/kernels tests/lion_fast/test_gpu.py \
      --ignore=tests/kernels/test_aot.py
  else
    run_tests "$OUT/kernel-tests.xml" 1 -m "not gpu" tests/kernels/test_gated_gelu.py -k "agrees or bits"
  fi
}

adapters() {
  benchmarks_of mixture_of_adapters
}

lora() {
  benchmarks_of mixture_of_lora_linear
}

attention() {
  benchmarks_of multi_scale_attention relative_bias_attention
}

rows() {
  benchmarks_of residual_layer_norm rms_norm gated_gelu assemble_inputs
}

model() {
  benchmarks_of model
}

step-16-whole() { # beside torch.compile of the whole model
  LION_STEP_PICTURES=$([ -n "$GPU" ] && echo 16 || echo 2) benchmarks_of training_step
}

step-64() {
  LION_STEP_PICTURES=$([ -n "$GPU" ] && echo 64 || echo 4) benchmarks_of training_step
}

tuning() {
  if [ -z "$GPU" ]; then
    limited "$(left)" "$PYTHON" -m lion_fast bench --tune --dry-run
  else
    limited "$(left)" "$PYTHON" -m lion_fast bench --tune --tune-seconds "$(left 60)" --table "$OUT/tuning.json"
  fi
}

generation() {
  benchmarks_of model_generation
}

sanitizer() {
  local tool status=0
  if [ -z "$GPU" ] || ! command -v compute-sanitizer > /dev/null; then
    echo "no compute-sanitizer, or no GPU: its cases run by themselves"
    limited "$(left)" "$PYTHON" benchmarks/sanitizer_cases.py
    return
  fi
  # Compiled first without it. PyTorch's caching allocator would hide accesses beyond a tensor's end.
  limited 150 "$PYTHON" benchmarks/sanitizer_cases.py || return
  for tool in memcheck racecheck; do
    limited 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --target-processes application-only --log-file "$OUT/sanitizer-$tool.txt" "$PYTHON" benchmarks/sanitizer_cases.py || status=1
    tail -n 20 "$OUT/sanitizer-$tool.txt"
  done
  return $status
}

pack() { # whole at any moment
  [ -z "${PACK:-}" ] || { tar -C "$OUT" --exclude=./triton-cache -czf "$PACK.part" . && mv "$PACK.part" "$PACK"; }
}

table=()
failed=0
stopped=
trap 'stopped=1' INT TERM
PART_ENDS=$SECONDS
for part in "${PARTS[@]}"; do
  start=$SECONDS
  PART_ENDS=$((PART_ENDS + ${LIMITS[$part]:-$REST_LIMIT}))
  [ -n "$GPU" ] || PART_ENDS=$((SECONDS + REST_LIMIT)) # a CPU interprets
  echo "=== $part" | tee -a "$LOG"
  "$part" 2>&1 | tee -i -a "$LOG"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed=1
  table+=("$(printf '%-14s %-22s %4d s' "$part" "$(case $status in 0) echo passed ;; 124 | 137) echo "stopped by its limit" ;; *) echo "failed ($status)" ;; esac)" $((SECONDS - start)))")
  pack
  [ -z "$stopped" ] || break
done
echo "=== ${GPU:-dry run without a GPU}, ${LION_BENCH_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo 'no commit')}" | tee -a "$LOG"
printf '%s\n' "${table[@]}" | tee -a "$LOG"
pack
exit $failed
