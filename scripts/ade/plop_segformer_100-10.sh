#!/usr/bin/env bash
# PLOP, SegFormer-B2, ADE20K 100-10 overlapped: 100 classes, then 50 ten by ten (Douillard et al. 2021).
# Variables: DATA, GPUS, NAME, PROTOCOL, BATCH, LOGDIR (scripts/run_task.sh).
set -euo pipefail
NAME=${NAME:-PLOP}
PROTOCOL=${PROTOCOL:-overlapped}
BATCH=${BATCH:-24}
. "$(dirname "$0")/../run_task.sh"

train --dataset ade --task 100-10 --method PLOP --model segformer_b2 --step all \
    --lr 0.01 0.001 0.001 0.001 0.001 0.001 --epochs 60 --opt_level O1 "$@"
