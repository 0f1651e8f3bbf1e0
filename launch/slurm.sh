#!/usr/bin/env bash
# sbatch launch/slurm.sh CONFIG [key=value ...]
#
# From the environment that has trfpp, which the job inherits; add your cluster's partition and account (--partition=...,
# --account=...). Nodes without a network need the model in a folder, or in HF_HOME with HF_HUB_OFFLINE=1.
#
# One task a GPU, on one node or several. Before the time is up, and when the job is preempted with a time of grace, every
# task gets SIGTERM: the run saves a checkpoint and ends; the job is queued again and goes on from there. Stop it for good
# with scancel.
#SBATCH --job-name=trfpp
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300
set -euo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # which srun does not take over from the job
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# shellcheck disable=SC2016  # the tasks' own variables
srun --kill-on-bad-exit=1 bash -c '
    RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python -m trfpp.train "$@"
' trfpp "$@" &
tasks=$!

told=no
# srun would kill the tasks if it got SIGTERM; scancel sends it to the tasks, and not to this script.
trap 'told=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' USR1
status=0
wait "$tasks" || status=$?
while kill -0 "$tasks" 2>/dev/null; do # a signal ends the waiting, not the tasks
    status=0
    wait "$tasks" || status=$?
done
# A job that is preempted is not told so: SLURM sends its tasks SIGTERM by itself.
if [[ $status -gt 128 && ($told = yes || $(scontrol show job "$SLURM_JOB_ID") = *PreemptTime=[0-9]*) ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
