#!/usr/bin/env bash
# sbatch launch/slurm.sh --config FILE [key=value ...]      (change the lines below to what your cluster calls things)
#SBATCH --job-name=limbeck
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
# A job that is ended and queued again goes on from its newest checkpoint: it is the same command on the same run folder.
set -euo pipefail
root=${LIMBECK_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
gpus=${SLURM_GPUS_ON_NODE:-8}
nodes=${SLURM_JOB_NUM_NODES:-2}
address=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}  # head would end scontrol early
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# One launcher on each node; each asks Slurm for its own number when it is there, hence the quotes.
# shellcheck disable=SC2016
exec srun --kill-on-bad-exit=1 bash -c '
  root=$1; gpus=$2; nodes=$3; address=$4; shift 4
  exec accelerate launch --config_file "$root/launch/many_nodes.yaml" --num_machines "$nodes" \
    --num_processes "$((nodes * gpus))" --machine_rank "$SLURM_NODEID" --main_process_ip "$address" \
    --main_process_port "${MASTER_PORT:-29500}" "$root/train.py" "$@"
' limbeck "$root" "$gpus" "$nodes" "$address" "$@"
