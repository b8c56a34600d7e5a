#!/usr/bin/env bash
# MiB, SegFormer-B2, VOC 10-1 overlapped: 10 classes, then 10 one by one (Cermelli et al. 2020).
# Variables: DATA, GPUS, NAME, PROTOCOL, BATCH, LOGDIR (scripts/run_task.sh).
set -euo pipefail
NAME=${NAME:-MIB}
PROTOCOL=${PROTOCOL:-overlapped}
BATCH=${BATCH:-24}
. "$(dirname "$0")/../run_task.sh"

train --dataset voc --task 10-1 --method MIB --model segformer_b2 --step all \
    --lr 0.01 0.001 0.001 0.001 0.001 0.001 0.001 0.001 0.001 0.001 0.001 --epochs 30 --opt_level O1 "$@"
