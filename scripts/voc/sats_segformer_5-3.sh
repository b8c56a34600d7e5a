#!/usr/bin/env bash
# SATS, SegFormer-B2, VOC 5-3 overlapped: 5 classes, then 15 three by three (Qiu et al. 2023).
# Variables: DATA, GPUS, NAME, PROTOCOL, BATCH, LOGDIR (scripts/run_task.sh).
set -euo pipefail
NAME=${NAME:-SATS}
PROTOCOL=${PROTOCOL:-overlapped}
BATCH=${BATCH:-24}
. "$(dirname "$0")/../run_task.sh"

train --dataset voc --task 5-3 --method SATS --model segformer_b2 --step all \
    --lr 0.01 0.001 0.001 0.001 0.001 0.001 --epochs 30 --opt_level O1 "$@"
