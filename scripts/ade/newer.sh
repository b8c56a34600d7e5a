#!/usr/bin/env bash
# The newer methods on ADE20K, DeepLabV3 with ResNet-101, with the settings of their repositories, overlapped:
#   bash scripts/ade/newer.sh METHOD TASK [options of run.py]
# DKD and STAR have the norm of --norm_act sync, the others inplace-abn's: add --norm_act iabn_sync where that is
# installed. Variables: DATA, GPUS, NAME, PROTOCOL, BATCH (of all steps), LOGDIR (scripts/run_task.sh).
set -euo pipefail
METHODS="DKD, DKD-M, STAR, STAR-M, MIB+EWF, LGKD, MIB+NeST, PLOP+NeST, RCIL or DFT"
METHOD=${1-} TASK=${2-} DATASET=ade CLASSES=150
tasks='' batch=(24 24) lr=(0.01 0.001) epochs=(60 60) more=()
case $METHOD in
    DKD | DKD-M | STAR | STAR-M)
        tasks="100-50 100-10 50-50" lr=(0.0025 0.00025) epochs=(100 100)
        more=(--norm_act sync --random_seed 1 --warmup 0.2 --warmup_form exact_factor)
        ;;
    MIB+EWF)
        tasks="100-50 100-10 100-5"
        [ "$TASK" != 100-50 ] || batch=(48 48)
        ;;
    LGKD)
        tasks="100-50 100-10 50-50" lr=(0.02 0.002) batch=(12 12)
        [ "$TASK" != 100-10 ] || batch=(16 16)
        ;;
    MIB+NeST | PLOP+NeST) tasks="100-5" lr=(0.02 0.001) ;;
    RCIL) tasks="100-50 100-10 100-5" ;;
    DFT)
        tasks="100-50 100-10 100-5 50-50" lr=(0.02 0.1) epochs=(30 60)
        [ "$TASK" != 100-5 ] || lr=(0.02 0.05)
        ;;
esac
. "$(dirname "$0")/../newer_methods.sh"
