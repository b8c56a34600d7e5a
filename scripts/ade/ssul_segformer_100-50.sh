#!/usr/bin/env bash
# SSUL, SegFormer-B2, ADE20K 100-50 overlapped: 100 classes, then 50 (Cha et al. 2021).
# Variables: DATA, GPUS, NAME, PROTOCOL, BATCH, LOGDIR (scripts/run_task.sh).
set -euo pipefail
NAME=${NAME:-SSUL}
PROTOCOL=${PROTOCOL:-overlapped}
BATCH=${BATCH:-32}
. "$(dirname "$0")/../run_task.sh"

ssul=(--dataset ade --task 100-50 --method SSUL --model segformer_b2 --crop_size 513 --epochs 100)
train "${ssul[@]}" --step 0 --lr 0.01 "$@"
train "${ssul[@]}" --step 1 --lr 0.05 --warmup 0.1 "$@"
