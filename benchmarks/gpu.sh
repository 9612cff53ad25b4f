#!/usr/bin/env bash
# Everything that wants a GPU, in parts, on a machine where nothing can be installed.
#
#   benchmarks/gpu.sh OUT [PART ...]      parts: environment gpu-tests kernel-tests check operators model generation sanitizer
#
# Each part stops by itself within eight minutes and leaves OUT/PART.json (tests: .xml) and its output in OUT/log.txt, so
# that one that dies takes nothing along. Needs python3 (or PYTHON=...) with torch, triton, transformers and pytest; optional
# peers (flash-attn, PEFT) are measured where they can be imported, such as from a folder of unpacked wheels on PYTHONPATH.
# Without a GPU it is a dry run: the same lines, on small shapes.
set -uo pipefail

PARTS=(environment gpu-tests kernel-tests check operators model generation sanitizer)
if [ $# -lt 1 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0"
  exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] && PARTS=("$@")
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python3}
export PYTHONPATH=.:kernels:reference${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
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

# The first argument is how long the command may take, in seconds; ten before that it is asked to stop.
limited() {
  local seconds=$1
  shift
  timeout --signal=INT --kill-after=10 $((seconds - 10)) "$@"
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

benchmarks_of() { # the report's name, how long one file may take, the files
  local name=$1 seconds=$2 file status=0
  shift 2
  local few=(--benchmark-max-time=0.2 --benchmark-min-rounds=20)
  [ -z "$GPU" ] && few=(--benchmark-max-time=0.01 --benchmark-min-rounds=1 --benchmark-warmup=off)
  for file in "$@"; do
    limited "$seconds" "$PYTHON" -m pytest -q -p no:cacheprovider "$file" "${few[@]}" \
      --benchmark-json="$OUT/$name-$(basename "$file" .py).json" || status=1
  done
  "$PYTHON" - "$OUT" "$name" <<'PY'
import json, sys
from pathlib import Path

out, name = Path(sys.argv[1]), sys.argv[2]
pieces = [file for file in sorted(out.glob(f"{name}-*.json")) if file.stat().st_size]
reports = [json.loads(file.read_text()) for file in pieces]
if not reports:
    sys.exit(f"{name}: nothing was measured")
for report in reports:
    for entry in report["benchmarks"]:
        entry["stats"].pop("data", None)
whole = {**reports[0], "benchmarks": [entry for report in reports for entry in report["benchmarks"]]}
(out / f"{name}.json").write_text(json.dumps(whole, indent=1))
for file in out.glob(f"{name}-*.json"):
    file.unlink()
for entry in whole["benchmarks"]:
    floor = entry["extra_info"].get("floor of an H200 in bf16, us", "")
    print(f"{1e6 * entry['stats']['median']:>12.1f} us  {floor!s:>9}  {entry['group']}: {entry['name']}")
PY
  return $((status || $?))
}

operators() {
  local files=(benchmarks/bench_[!m]*.py benchmarks/bench_mixture*.py benchmarks/bench_multi*.py)
  benchmarks_of operators $((SECONDS_EACH / ${#files[@]})) "${files[@]}"
}

model() {
  benchmarks_of model $SECONDS_EACH benchmarks/bench_model.py
}

generation() {
  benchmarks_of generation $SECONDS_EACH benchmarks/bench_model_generation.py
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
for part in "${PARTS[@]}"; do
  case " environment gpu-tests kernel-tests check operators model generation sanitizer " in
    *" $part "*) ;;
    *) echo "no part $part" >&2; exit 2 ;;
  esac
done
for part in "${PARTS[@]}"; do
  start=$SECONDS
  echo "=== $part" | tee -a "$LOG"
  "$part" 2>&1 | tee -a "$LOG"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed=1
  table+=("$(printf '%-14s %-22s %4d s' "$part" "$(case $status in 0) echo passed ;; 124 | 137) echo "stopped by its limit" ;; *) echo "failed ($status)" ;; esac)" $((SECONDS - start)))")
done
echo "=== ${GPU:-dry run without a GPU}, $(git rev-parse --short HEAD 2>/dev/null || echo 'no commit')" | tee -a "$LOG"
printf '%s\n' "${table[@]}" | tee -a "$LOG"
exit $failed
