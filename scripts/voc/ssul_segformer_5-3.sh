#!/usr/bin/env bash
# SSUL, SegFormer-B2, VOC 5-3 overlapped: 5 classes, then 15 three by three (Cha et al. 2021).
# Variables: DATA, GPUS, NAME, PROTOCOL, BATCH, LOGDIR (scripts/run_task.sh).
set -euo pipefail
NAME=${NAME:-SSUL}
PROTOCOL=${PROTOCOL:-overlapped}
BATCH=${BATCH:-32}
. "$(dirname "$0")/../run_task.sh"

train --dataset voc --task 5-3 --method SSUL --model segformer_b2 --crop_size 513 --step all \
    --lr 0.01 --epochs 50 "$@"
