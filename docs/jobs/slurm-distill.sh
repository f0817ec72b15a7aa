#!/bin/bash
# Distillation on SLURM: one rank a task, one GPU a rank. Stopped before its time is over or taken
# off its nodes, the run writes a checkpoint and the job queues again.
#
#   sbatch docs/jobs/slurm-distill.sh configs/k400_hiera_base.yaml train.accumulate=2
#
#SBATCH --job-name=kdhiera-distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
: "${1:?usage: sbatch slurm-distill.sh CONFIG [KEY=VALUE ...]}"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS

# srun itself starts the ranks: it ends with their exit code, where torchrun would end with 1.
# No task is killed for another's end: stopped ranks end one after the other, all with 75.
# shellcheck disable=SC2016 # the tasks' own variables
srun --kill-on-bad-exit=0 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m kdhiera.stages.distill "$@"' \
  rank "$@"
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
