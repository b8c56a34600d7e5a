#!/usr/bin/env bash
# PLOP, SegFormer-B2, VOC 15-5 overlapped: 15 classes, then 5 (Douillard et al. 2021).
# Variables: DATA, GPUS, NAME, PROTOCOL, BATCH, LOGDIR (scripts/run_task.sh).
set -euo pipefail
NAME=${NAME:-PLOP}
PROTOCOL=${PROTOCOL:-overlapped}
BATCH=${BATCH:-24}
. "$(dirname "$0")/../run_task.sh"

train --dataset voc --task 15-5 --method PLOP --model segformer_b2 --step all \
    --lr 0.01 0.001 --epochs 30 --opt_level O1 "$@"
