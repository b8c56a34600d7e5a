# shellcheck shell=bash
# Sourced by the experiments in scripts/voc and scripts/ade: runs one command on all GPUs of this machine.
# Environment variables, all optional; the experiment sets the published NAME, PROTOCOL and BATCH.
#   DATA      folder of the data sets                            data in the program's folder
#   GPUS      number of processes, one per GPU                   2
#   NAME      name of the run
#   PROTOCOL  disjoint, overlapped or sequential
#   BATCH     images per step of the optimiser, all GPUs together
#   LOGDIR    folder of the runs                                 logs/<protocol>
# Arguments go to run.py and override the experiment's options, e.g. --fidelity released, or --test.
PROGRAM="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DATA=${DATA:-$PROGRAM/data}
GPUS=${GPUS:-2}
LOGDIR=${LOGDIR:-logs/$PROTOCOL}

. "$PROGRAM/scripts/share_batch.sh"

case $PROTOCOL in
    disjoint) protocol=() ;;
    overlapped) protocol=(--overlap) ;;
    sequential) protocol=(--no_mask) ;;
    *) fail "PROTOCOL=$PROTOCOL; give disjoint, overlapped or sequential" ;;
esac
share_batch "$GPUS" GPUS

train() {
    torchrun --standalone --nproc_per_node="$GPUS" "$PROGRAM/run.py" --data_root "$DATA" --logdir "$LOGDIR" \
        --name "$NAME" ${protocol[@]+"${protocol[@]}"} --batch_size "$PER_PROCESS" "$@"
}
