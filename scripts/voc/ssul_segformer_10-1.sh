#!/usr/bin/env bash
# SSUL, SegFormer-B2, VOC 10-1 overlapped: 10 classes, then 10 one by one (Cha et al. 2021).
# Variables: DATA, GPUS, NAME, PROTOCOL, BATCH, LOGDIR (scripts/run_task.sh).
set -euo pipefail
NAME=${NAME:-SSUL}
PROTOCOL=${PROTOCOL:-overlapped}
BATCH=${BATCH:-32}
. "$(dirname "$0")/../run_task.sh"

train --dataset voc --task 10-1 --method SSUL --model segformer_b2 --crop_size 513 --step all \
    --lr 0.01 --epochs 50 "$@"
