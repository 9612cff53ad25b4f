#!/usr/bin/env bash
# Everything that wants a GPU, in parts, on a machine where nothing can be installed.
#
#   benchmarks/gpu.sh OUT [PART ...]
#
# Parts: environment gpu-tests kernel-tests check adapters lora attention rows tuning model step-16 step-64 generation
# sanitizer (operators: adapters lora attention rows). Each stops by itself within eight minutes and leaves
# OUT/PART.json (tests: .xml; benchmarks: OUT/results/DEVICE/DATE-COMMIT/SUITE.json, which `lion-fast bench report` and
# `compare` read) and its output in OUT/log.txt, so that one that dies takes nothing along; interrupted from a terminal,
# it stops with what it has. Needs python3 (or PYTHON=...) with torch, triton, transformers, pytest and
# pytest-benchmark, and nothing else. PEERS=DIR names a folder of wheels (flash-attn, liger-kernel, peft ...), which
# are unpacked and measured beside.
# Without a GPU it is a dry run: the same lines, on small shapes.
set -uo pipefail

ALL=(environment gpu-tests kernel-tests check adapters lora attention rows tuning model step-16 step-64 generation sanitizer)
OPERATORS=(adapters lora attention rows)
if [ $# -lt 1 ]; then
  sed -n '2,14s/^# \{0,1\}//p' "$0"
  exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
shift
[ -n "${PEERS:-}" ] && { PEERS=$(cd "$PEERS" && pwd) || exit 2; }
PARTS=()
for part in "${@:-${ALL[@]}}"; do
  case " ${ALL[*]} operators " in
    *" $part "*) ;;
    *) echo "no part $part" >&2; exit 2 ;;
  esac
  if [ "$part" = operators ]; then PARTS+=("${OPERATORS[@]}"); else PARTS+=("$part"); fi
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
LOG=$OUT/log.txt
SECONDS_EACH=470
GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') || exit 2
if [ -n "$GPU" ]; then
  unset TRITON_INTERPRET
  PROCESSES=4
else
  echo "no CUDA device: a dry run, which measures nothing"
  PROCESSES=1
fi

# What a script in the background starts ignores SIGINT, which asks it to stop, unless it is set to be heard.
HEARING='import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])'

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

run_tests() { # where the report goes, then pytest's arguments
  local report=$1
  shift
  local spread=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && [ "$PROCESSES" -gt 1 ] && spread=(-n "$PROCESSES")
  limited $SECONDS_EACH "$PYTHON" -m pytest -q -p no:cacheprovider "${spread[@]}" --junitxml="$report" "$@"
}

environment() {
  command -v nvidia-smi && nvidia-smi
  "$PYTHON" -m lion_fast.check.environment | tee "$OUT/environment.json"
}

gpu-tests() {
  run_tests "$OUT/gpu-tests.xml" -m gpu tests
}

kernel-tests() {
  if [ -n "$GPU" ]; then
    run_tests "$OUT/kernel-tests.xml" -m "not gpu" tests/kernels --ignore=tests/kernels/test_aot.py
  else
    run_tests "$OUT/kernel-tests.xml" -m "not gpu" tests/kernels/test_gated_gelu.py -k "agrees or bits"
  fi
}

check() {
  if [ -z "$GPU" ]; then
    limited $SECONDS_EACH "$PYTHON" -m lion_fast check --operators rms_norm gated_gelu --json "$OUT/check.json"
    return
  fi
  # Compile side by side first: times are taken by one process alone.
  local operator
  for operator in $("$PYTHON" -c 'from lion_fast.check.cases import OPERATORS; print(*OPERATORS)'); do
    limited 260 "$PYTHON" -m lion_fast check --operators "$operator" > "$OUT/check-$operator.txt" 2>&1 &
  done
  wait
  cat "$OUT"/check-*.txt && rm "$OUT"/check-*.txt
  limited 210 "$PYTHON" -m lion_fast check --json "$OUT/check.json"
}

benchmarks_of() { # the suites
  local few=()
  [ -z "$GPU" ] && few=(--quick)
  limited $SECONDS_EACH "$PYTHON" -m lion_fast bench run "$@" --out "$OUT/results" --seconds $((SECONDS_EACH - 60)) "${few[@]}"
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

step-16() { # pictures, of LION-FlanT5-XL; in a dry run two, of a small model
  LION_STEP_PICTURES=$([ -n "$GPU" ] && echo 16 || echo 2) benchmarks_of training_step
}

step-64() {
  LION_STEP_PICTURES=$([ -n "$GPU" ] && echo 64 || echo 4) benchmarks_of training_step
}

tuning() {
  if [ -z "$GPU" ]; then
    limited $SECONDS_EACH "$PYTHON" -m lion_fast bench --tune --dry-run
  else
    limited $SECONDS_EACH "$PYTHON" -m lion_fast bench --tune --tune-seconds $((SECONDS_EACH - 60)) --table "$OUT/tuning.json"
  fi
}

generation() {
  benchmarks_of model_generation
}

sanitizer() {
  local tool status=0
  if [ -z "$GPU" ] || ! command -v compute-sanitizer > /dev/null; then
    echo "no compute-sanitizer, or no GPU: its cases run by themselves"
    limited $SECONDS_EACH env TRITON_INTERPRET=$([ -n "$GPU" ] && echo 0 || echo 1) "$PYTHON" benchmarks/sanitizer_cases.py
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

table=()
failed=0
stopped=
trap 'stopped=1' INT TERM
for part in "${PARTS[@]}"; do
  start=$SECONDS
  echo "=== $part" | tee -a "$LOG"
  "$part" 2>&1 | tee -i -a "$LOG"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed=1
  table+=("$(printf '%-14s %-22s %4d s' "$part" "$(case $status in 0) echo passed ;; 124 | 137) echo "stopped by its limit" ;; *) echo "failed ($status)" ;; esac)" $((SECONDS - start)))")
  [ -z "$stopped" ] || break
done
echo "=== ${GPU:-dry run without a GPU}, $(git rev-parse --short HEAD 2>/dev/null || echo 'no commit')" | tee -a "$LOG"
printf '%s\n' "${table[@]}" | tee -a "$LOG"
exit $failed
