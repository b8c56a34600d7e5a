#!/usr/bin/env bash
# PLOP, DeepLabV3 with ResNet-101, ADE20K 100-50 overlapped: 100 classes, then 50 (Douillard et al. 2021).
# The published network has inplace-abn's norm: add --norm_act iabn_sync where that is installed.
# Variables: DATA, GPUS, NAME, PROTOCOL, BATCH, LOGDIR (scripts/run_task.sh).
set -euo pipefail
NAME=${NAME:-PLOP-resnet101}
PROTOCOL=${PROTOCOL:-overlapped}
BATCH=${BATCH:-24}
. "$(dirname "$0")/../run_task.sh"

train --dataset ade --task 100-50 --method PLOP --step all \
    --lr 0.01 0.001 --epochs 60 --opt_level O1 "$@"
