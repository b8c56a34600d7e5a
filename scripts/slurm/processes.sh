# shellcheck shell=bash
# Sourced by jobs: train OPTIONS... runs run.py in every task of the job. If the processes end with 75 (stopped by a
# signal, checkpoint saved) the job is requeued under the same number; any other failure ends the job.

# The port depends on the job, since several jobs may share a node.
MASTER_ADDR=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-localhost}" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
WORLD_SIZE=${SLURM_NTASKS:-1}
PROGRAM="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export MASTER_ADDR MASTER_PORT WORLD_SIZE PROGRAM

train() {
    local code=0
    # shellcheck disable=SC2016  # expanded in the tasks
    srun --kill-on-bad-exit=0 bash -c '
        export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
        exec "${PYTHON:-python}" "$PROGRAM/run.py" "$@"' run.py "$@" || code=$?
    if [ "$code" -eq 75 ]; then
        echo "stopped by a signal, checkpoint saved: job $SLURM_JOB_ID is requeued"
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
    [ "$code" -eq 0 ] || exit "$code"
}
