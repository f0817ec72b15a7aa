#!/bin/bash
# Extraction on SLURM: a Ray cluster over the nodes of the job, one actor a GPU.
#
#   sbatch docs/jobs/slurm-extract.sh configs/k400_hiera_base.yaml
#
#SBATCH --job-name=kdhiera-extract
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
: "${1:?usage: sbatch slurm-extract.sh CONFIG [KEY=VALUE ...]}"

export RAY_AUTH_MODE=token # whoever reaches Ray's ports without it is refused
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$head:$((20000 + SLURM_JOB_ID % 20000))
srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --block --port="${address##*:}" --include-dashboard=false \
  --num-cpus="$SLURM_CPUS_PER_TASK" &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) \
    --exclude="$head" ray start --block --address="$address" \
    --num-cpus="$SLURM_CPUS_PER_TASK" &
fi

# Until every node is there; those that come later than ten minutes are done without.
for _ in $(seq 60); do
  there=$(python -c "
import ray
ray.init(address='$address', log_to_driver=False)
print(sum(node['Alive'] for node in ray.nodes()))" 2>/dev/null)
  [ "${there:-0}" -ge "$SLURM_JOB_NUM_NODES" ] && break
  sleep 10
done

kdhiera extract-teachers "$@" "ray.address=$address" &
work=$!
stopping=
trap 'stopping=1; kill -TERM "$work"' TERM
while :; do # a signal ends `wait`, not what it waits for
  wait "$work"
  code=$?
  kill -0 "$work" 2>/dev/null || break
done
[ -n "$stopping" ] && [ "$code" -gt 128 ] && code=75 # stopped before it began
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code" # with it the job's Ray ends
