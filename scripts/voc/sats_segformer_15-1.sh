#!/usr/bin/env bash
# SATS, SegFormer-B2, VOC 15-1 overlapped: 15 classes, then 5 one by one (Qiu et al. 2023).
# Variables: DATA, GPUS, NAME, PROTOCOL, BATCH, LOGDIR (scripts/run_task.sh).
set -euo pipefail
NAME=${NAME:-SATS}
PROTOCOL=${PROTOCOL:-overlapped}
BATCH=${BATCH:-24}
. "$(dirname "$0")/../run_task.sh"

train --dataset voc --task 15-1 --method SATS --model segformer_b2 --step all \
    --lr 0.01 0.001 0.001 0.001 0.001 0.001 --epochs 30 --opt_level O1 "$@"
