#!/usr/bin/env bash
# PLOP, SegFormer-B2, VOC 5-3 overlapped: 5 classes, then 15 three by three (Douillard et al. 2021).
# Variables: DATA, GPUS, NAME, PROTOCOL, BATCH, LOGDIR (scripts/run_task.sh).
set -euo pipefail
NAME=${NAME:-PLOP}
PROTOCOL=${PROTOCOL:-overlapped}
BATCH=${BATCH:-24}
. "$(dirname "$0")/../run_task.sh"

train --dataset voc --task 5-3 --method PLOP --model segformer_b2 --step all \
    --lr 0.01 0.001 0.001 0.001 0.001 0.001 --epochs 30 --opt_level O1 "$@"
