#!/usr/bin/env bash
# Shanty beside PEFT + torch, one training step on the CPU, in turns in one run. Prints a line of JSON a turn and the ratio last.
#   benches/step_cpu.sh [ROUNDS]          needs: a release build, and PYTHON (default python3) with torch, transformers, peft
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-3}
python=${PYTHON:-python3}
model=examples/tiny-llama-14m
results=$(mktemp)
trap 'rm -f "$results"' EXIT
for _ in $(seq "$rounds"); do
  target/release/shanty bench step --device cpu --model "$model" --quantization none --rank 16 \
    --batch 8 --length 256 --threads 2 --steps 8 --output json | tee -a "$results"
  "$python" benches/peft_cpu_step.py --model "$model" --threads 2 --steps 8 2>/dev/null | tee -a "$results"
done
"$python" - "$results" <<'PY'
import json, statistics, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
theirs = [row for row in rows if row.get("program") == "peft"]
ours = [row for row in rows if row.get("program") != "peft"]
speed = lambda rows: statistics.median(row["tokens_per_second"] for row in rows)
peak = lambda rows: max(row["peak_memory_bytes"] for row in rows)
print(json.dumps({
    "shanty_tokens_per_second": round(speed(ours)), "peft_tokens_per_second": round(speed(theirs)),
    "speed_ratio": round(speed(ours) / speed(theirs), 3),
    "shanty_peak_mib": peak(ours) >> 20, "peft_peak_mib": peak(theirs) >> 20,
    "memory_ratio": round(peak(ours) / peak(theirs), 3),
}))
PY
