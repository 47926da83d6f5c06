#!/usr/bin/env bash
# sbatch launch/slurm.sh --config FILE [key=value ...]      (change the lines below to what your cluster calls things)
#SBATCH --job-name=limbeck
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
# Two minutes before its time is over, or when it is preempted, the run saves and ends; it is then queued again and goes
# on from there, as does one whose node has failed: it is the same command on the same run folder.
set -euo pipefail
root=${LIMBECK_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
gpus=${SLURM_GPUS_ON_NODE:-8}
nodes=${SLURM_JOB_NUM_NODES:-2}
address=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}  # head would end scontrol early
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}  # seconds for the step and the checkpoint
# One launcher on each node; each asks Slurm for its own number when it is there, hence the quotes. Slurm signals the
# shell around it alone, or everything: the launcher would die of USR1, and passes TERM on to its processes.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
  root=$1; gpus=$2; nodes=$3; address=$4; shift 4
  (
    trap "" USR1
    exec accelerate launch --config_file "$root/launch/many_nodes.yaml" --num_machines "$nodes" \
      --num_processes "$((nodes * gpus))" --machine_rank "$SLURM_NODEID" --main_process_ip "$address" \
      --main_process_port "${MASTER_PORT:-29500}" "$root/train.py" "$@"
  ) &
  launcher=$!
  trap "kill -TERM $launcher" TERM USR1
  code=0
  wait "$launcher" || code=$?
  while kill -0 "$launcher" 2>/dev/null; do  # a signal ends the wait, not the launcher
    code=0
    wait "$launcher" || code=$?
  done
  exit "$code"
' limbeck "$root" "$gpus" "$nodes" "$address" "$@" || echo "the launchers ended with code $?" >&2
# Launchers make 1 of every code, so the run folder is asked: 75 is a run that was stopped and is to go on.
code=0
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" python -m limbeck status "$@" || code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
