#!/usr/bin/env bash
# Runs everything that needs a GPU, in parts, on a machine where nothing can be installed.
#
#   benchmarks/gpu.sh OUT [first | second | rest | PART ...]      (default: all three groups)
#
# first:  environment check headline counters: correctness, speed against the peers, and the limiting resource.
# second: gpu-tests candidates step-16 determinism.
# rest:   kernel-tests adapters lora attention rows tuning model step-16-whole step-64 generation sanitizer, about
#         eight minutes each.
# first and second each end within six minutes. A part has a time limit and inherits what earlier parts left unused; the
# most valuable part runs first (docs/gpu.md has the plan). A part writes OUT/PART.json (tests: .xml; benchmarks and
# counters: OUT/results/DEVICE/DATE-COMMIT/SUITE.json, as `python -m benchmarks.harness report` and `compare` read it)
# and its output to OUT/log.txt, so a crash loses no earlier part. Interrupted, the script keeps what it has.
# Needs python3 (or PYTHON=...) with torch, triton, transformers, pytest and pytest-benchmark; pytest-xdist makes it
# faster. PEERS=DIR: a folder of wheels (flash-attn, liger-kernel ...) to unpack and measure as peers.
# PACK=FILE.tar.gz: an archive of OUT, renewed after each part. LION_BENCH_COMMIT=NAME: the commit of a copy without
# history. TRITON_CACHE=FILE: a cache from benchmarks/triton_cache.py for this Python and Triton, with which the check
# and the training step need not compile.
# Without a GPU it does a dry run: the same commands on small shapes, with the kernels in Triton's interpreter.
set -uo pipefail

FIRST=(environment check headline counters)
SECOND=(gpu-tests candidates step-16 determinism)
REST=(kernel-tests adapters lora attention rows tuning model step-16-whole step-64 generation sanitizer)
OPERATORS=(adapters lora attention rows)
# Seconds that a part may take. The limits of first add up to 350, and so do those of second.
declare -A LIMITS=(
  [environment]=45 [check]=120 [headline]=120 [counters]=65
  [gpu-tests]=90 [candidates]=45 [step-16]=160 [determinism]=55
)
REST_LIMIT=470
if [ $# -lt 1 ]; then
  sed -n '2,20s/^# \{0,1\}//p' "$0"
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
  echo "no CUDA device: this is a dry run and measures nothing"
  export TRITON_INTERPRET=1
  PROCESSES=1
fi
HAS_XDIST=
"$PYTHON" -c 'import xdist' 2> /dev/null && HAS_XDIST=1

# A process that a background script starts ignores SIGINT, which asks it to stop, so the handler is reset.
HEARING='import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])'

# Prints the seconds left to the part, minus the argument.
left() {
  local seconds=$((PART_ENDS - SECONDS - ${1:-0}))
  echo $((seconds > 11 ? seconds : 11))
}

# Runs a command for at most as many seconds as the first argument says. It gets SIGINT ten seconds before that, and
# also when the script is interrupted, because a terminal's signal does not reach it.
limited() {
  local seconds=$1 running status interrupted=
  shift
  timeout --signal=INT --kill-after=10 $((seconds - 10)) "$PYTHON" -c "$HEARING" "$@" &
  running=$!
  trap 'interrupted=1; kill -INT "$running" 2>/dev/null' INT TERM
  wait "$running"
  status=$?
  while kill -0 "$running" 2>/dev/null; do # the trap ended the wait
    wait "$running"
    status=$?
  done
  trap - INT TERM
  [ -z "$interrupted" ] || exit "$status" # a part is a subshell: exit skips its remaining commands
  return "$status"
}

run_tests() { # arguments: report file, number of processes, then pytest's arguments
  local report=$1 processes=$2 spread=()
  shift 2
  [ -n "$HAS_XDIST" ] && [ "$processes" -gt 1 ] && spread=(-n "$processes" --dist loadgroup)
  limited "$(left)" "$PYTHON" -m pytest -q -p no:cacheprovider "${spread[@]}" --junitxml="$report" "$@"
}

benchmarks_of() { # arguments: suites; no benchmark begins in the last 15 seconds, allowing for two starts of Python
  local few=()
  [ -z "$GPU" ] && few=(--quick)
  limited "$(left)" "$PYTHON" -m benchmarks.harness run "$@" --out "$OUT/results" --seconds "$(left 28)" "${few[@]}"
}

# Compiles the kernels of a suite in several processes before it is measured. Runs in the background while nothing is
# timed. The suite itself reports what cannot be compiled.
compile() { # arguments: suite, number of processes
  [ -n "$GPU" ] && [ -n "$HAS_XDIST" ] || return 0
  LION_BENCH_COMPILE_ONLY=1 TORCHINDUCTOR_COMPILE_THREADS=2 limited "$(left)" "$PYTHON" -m pytest -q \
    -p no:cacheprovider -n "$2" --benchmark-disable "benchmarks/bench_$1.py" > "$OUT/compile-$1.txt" 2>&1
  tail -n 1 "$OUT/compile-$1.txt"
}

# ---------------------------------------------------------------- first

environment() {
  command -v nvidia-smi && nvidia-smi
  limited "$(left)" "$PYTHON" -m lion_fast.check.environment --rates --json "$OUT/environment.json" --overwrite
}

check() { # every operator in fp32, fp16 and bf16 with all gradients, and at the model's shapes; no times
  local which=() status
  [ -z "$GPU" ] && which=(--operators rms_norm gated_gelu)
  compile headline 6 &
  limited "$(left)" "$PYTHON" -m lion_fast check "${which[@]}" --processes "$PROCESSES" --repeats 2 --no-times \
    --json "$OUT/check.json" --overwrite
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
    echo "no ncu or no GPU: running the calls without counters"
    limited "$(left)" "$PYTHON" -m benchmarks.counters
    return
  fi
  for section in SpeedOfLight ComputeWorkloadAnalysis MemoryWorkloadAnalysis WarpStateStats Occupancy LaunchStats; do
    sections+=(--section "$section")
  done
  # Clocks are left alone, and the cache is flushed before each pass.
  limited "$(left 12)" ncu --clock-control none --cache-control all --profile-from-start off "${sections[@]}" \
    --csv --page raw --print-units base --log-file "$raw" "$PYTHON" -m benchmarks.counters || tail -n 5 "$raw"
  limited "$(left)" "$PYTHON" -m benchmarks.counters --read "$raw" --out "$OUT/results"
}

# ---------------------------------------------------------------- second

gpu-tests() { # tests that need a GPU, except slow ones; a dry run collects them and runs others
  local status
  export OMP_NUM_THREADS=2 # per process: fp64 references are computed on the CPU
  compile candidates 3 &
  mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests) # collecting all tests takes 9 s per process
  run_tests "$OUT/gpu-tests.xml" $((PROCESSES < 8 ? PROCESSES : 8)) -m "gpu and not slow" "${files[@]}"
  status=$?
  if [ -z "$GPU" ] && [ $status -eq 0 ]; then
    run_tests "$OUT/dry-tests.xml" 1 tests/kernels/test_contract.py -k "(gated_gelu or rms_norm) and (agrees or bits)"
    status=$?
  fi
  wait
  return $status
}

candidates() {
  benchmarks_of candidates
}

step-16() { # 16 images, LION-FlanT5-XL; a dry run takes two images and a small model
  local peers="original,lion_fast,torch.compile by block" pictures=16 seconds=8
  [ -z "$GPU" ] && peers=original,lion_fast pictures=2 seconds=0
  LION_STEP_PEERS=$peers LION_STEP_PICTURES=$pictures LION_STEP_SECONDS=$seconds benchmarks_of training_step
}

determinism() {
  local which=() repeats=200
  [ -z "$GPU" ] && which=(--operators rms_norm) && repeats=3
  limited "$(left)" "$PYTHON" -m lion_fast check "${which[@]}" --dtypes "$([ -n "$GPU" ] && echo bfloat16 || echo float16)" \
    --processes "$PROCESSES" --repeats $repeats --no-times --json "$OUT/determinism.json" --overwrite
}

# ---------------------------------------------------------------- rest

kernel-tests() {
  if [ -n "$GPU" ]; then
    run_tests "$OUT/kernel-tests.xml" 4 -m "not gpu or slow" tests/kernels tests/lion_fast/test_gpu.py \
      --ignore=tests/kernels/test_aot.py
  else
    run_tests "$OUT/kernel-tests.xml" 1 -m "not gpu" tests/kernels/test_contract.py -k "gated_gelu and (agrees or bits)"
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

step-16-whole() { # against torch.compile of the whole model
  LION_STEP_PICTURES=$([ -n "$GPU" ] && echo 16 || echo 2) benchmarks_of training_step
}

step-64() {
  LION_STEP_PICTURES=$([ -n "$GPU" ] && echo 64 || echo 4) benchmarks_of training_step
}

tuning() {
  if [ -z "$GPU" ]; then
    limited "$(left)" "$PYTHON" -m lion_fast bench --tune --dry-run
  else
    limited "$(left)" "$PYTHON" -m lion_fast bench --tune --tune-seconds "$(left 60)" --table "$OUT/tuning.json" --overwrite
  fi
}

generation() {
  benchmarks_of model_generation
}

sanitizer() {
  local tool status=0
  if [ -z "$GPU" ] || ! command -v compute-sanitizer > /dev/null; then
    echo "no compute-sanitizer or no GPU: running its cases without it"
    limited "$(left)" "$PYTHON" benchmarks/sanitizer_cases.py
    return
  fi
  # The first run compiles, without the tool. PyTorch's caching allocator would hide accesses beyond a tensor's end.
  limited 150 "$PYTHON" benchmarks/sanitizer_cases.py || return
  for tool in memcheck racecheck; do
    limited 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --target-processes application-only --log-file "$OUT/sanitizer-$tool.txt" "$PYTHON" benchmarks/sanitizer_cases.py || status=1
    tail -n 20 "$OUT/sanitizer-$tool.txt"
  done
  return $status
}

pack() { # the archive is complete at any moment
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
  [ -n "$GPU" ] || PART_ENDS=$((SECONDS + REST_LIMIT)) # the interpreter is slow
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
