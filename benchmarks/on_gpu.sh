#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: the CUDA tests and every benchmark in a single call.
#   benchmarks/on_gpu.sh [FOLDER]     results go to FOLDER (default: benchmarks/results)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
python -m pytest tests/trainer/test_cuda.py -v
python -m benchmarks.quickstart --seeds 3 --json "$out/quickstart-gpu.json"
python -m benchmarks.rematerialization.frontier --model all --json "$out/rematerialization-frontier-gpu.json"
python -m benchmarks.rematerialization.planning --json "$out/rematerialization-planning-gpu.json"
python -m benchmarks.end_to_end --device cuda --vocabulary 32768 --json "$out/end-to-end-gpu.json"
python -m benchmarks.optimizers --device cuda --json "$out/optimizers-gpu.json"
python -m benchmarks.sharding.bytes_by_engine --json "$out/sharding-ledger.json"
python -m benchmarks.distillation.losses --device cuda --hidden 4096 --vocabulary 128256 --tokens 8192 --json "$out/distillation-losses-gpu.json"
