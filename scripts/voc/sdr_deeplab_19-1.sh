#!/usr/bin/env bash
# SDR, DeepLabV3 with ResNet-101, VOC 19-1 disjoint: 19 classes, then 1 (Michieli and Zanuttigh 2021).
# Variables: DATA, GPUS, NAME, PROTOCOL, BATCH, LOGDIR (scripts/run_task.sh).
set -euo pipefail
GPUS=${GPUS:-1}
NAME=${NAME:-SDR}
PROTOCOL=${PROTOCOL:-disjoint}
BATCH=${BATCH:-8}
. "$(dirname "$0")/../run_task.sh"

common=(--dataset voc --task 19-1 --epochs 30 --debug --sample_num 10)
train "${common[@]}" --step 0 --lr 0.001 --unce --loss_de_prototypes 1 "$@"
train "${common[@]}" --step 1 --lr 0.0001 --method SDR "$@"
