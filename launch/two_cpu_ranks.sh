#!/usr/bin/env bash
# Two processes on the CPU: launch/two_cpu_ranks.sh --config FILE [key=value ...]
# `accelerate launch --cpu --num_processes 2`, and a config file with MULTI_CPU, both run one process without a word;
# this way really runs two, and train.py refuses to go on if it ever finds fewer than were launched.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
accelerate=accelerate
if [ -x "$here/.venv/bin/accelerate" ]; then accelerate="$here/.venv/bin/accelerate"; fi
ACCELERATE_USE_CPU=true exec "$accelerate" launch --multi_gpu --num_processes 2 --num_machines 1 \
  --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 1 --main_process_port 0 "$here/train.py" "$@"
