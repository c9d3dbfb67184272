#!/usr/bin/env bash
# Trains on four machines of eight GPUs under SLURM, and goes on after a failure or a requeue:
#   sbatch examples/launch/slurm.sh --data pairs.jsonl --full --method dpo --output-dir /shared/run
#SBATCH --job-name=xpo-fast
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail

# SIGTERM, two minutes before the time is up, lets every rank finish its step and write a checkpoint.
# --resume auto goes on from the last whole one, so --output-dir must be on a file system that all machines see.
export MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8
# One store for all restarts has what killed processes wrote into it: those that follow hang (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
CONFIG=$(dirname "$(realpath "$0")")/hsdp.yaml

srun --kill-on-bad-exit=1 bash -c '
    accelerate launch --config_file "$0" --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER" \
        --max_restarts 3 -m xpo_fast.cli train "$@" --resume auto
' "$CONFIG" "$@"
