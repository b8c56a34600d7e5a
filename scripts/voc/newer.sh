#!/usr/bin/env bash
# The newer methods on VOC, DeepLabV3 with ResNet-101, with the settings of their repositories:
#   bash scripts/voc/newer.sh METHOD TASK [options of run.py]
# All were published overlapped; DKD, STAR (19-1, 15-5, 15-1) and RCIL also with PROTOCOL=disjoint.
# DKD and STAR have the norm of --norm_act sync, the others inplace-abn's: add --norm_act iabn_sync where that is
# installed. Variables: DATA, GPUS, NAME, PROTOCOL, BATCH (of all steps), LOGDIR (scripts/run_task.sh).
set -euo pipefail
METHODS="DKD, DKD-M, STAR, STAR-M, MIB+EWF, PLOP+EWF, LGKD, MIB+NeST, PLOP+NeST, RCIL or DFT"
METHOD=${1-} TASK=${2-} DATASET=voc CLASSES=20
tasks='' batch=(24 24) lr=(0.01 0.001) epochs=(30 30) more=()
case $METHOD in
    DKD | DKD-M | STAR | STAR-M)
        tasks="19-1 15-5 15-1 10-1 5-3" lr=(0.001 0.0001) epochs=(60 60) more=(--norm_act sync --random_seed 1)
        [[ $METHOD == STAR* ]] || batch=(32 32)
        ;;
    MIB+EWF | PLOP+EWF) tasks="19-1 15-1 10-1 5-3" ;;
    LGKD)
        tasks="19-1 15-5 15-1"
        [ "$TASK" = 19-1 ] || batch=(16 24)
        ;;
    MIB+NeST | PLOP+NeST)
        tasks="15-1 10-1" lr=(0.02 0.001)
        [ "$TASK" != 10-1 ] || epochs=(30 10)
        ;;
    RCIL) tasks="15-1 10-1" lr=(0.02 0.001) ;;
    DFT)
        tasks="19-1 15-5 15-1 10-1"
        case $TASK in
            19-1) lr=(0.02 0.005) ;;
            15-5) lr=(0.02 0.02) ;;
            *) lr=(0.02 0.0005) ;;
        esac
        ;;
esac
. "$(dirname "$0")/../newer_methods.sh"
