#!/usr/bin/env bash
# MiB, SegFormer-B2, ADE20K 25-25 overlapped: 25 classes, then 25 five times (Cermelli et al. 2020).
# Variables: DATA, GPUS, NAME, PROTOCOL, BATCH, LOGDIR (scripts/run_task.sh).
set -euo pipefail
NAME=${NAME:-MIB}
PROTOCOL=${PROTOCOL:-overlapped}
BATCH=${BATCH:-24}
. "$(dirname "$0")/../run_task.sh"

train --dataset ade --task 25-25 --method MIB --model segformer_b2 --step all \
    --lr 0.01 0.001 0.001 0.001 0.001 0.001 --epochs 60 --opt_level O1 "$@"
