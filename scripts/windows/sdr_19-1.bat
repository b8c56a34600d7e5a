@echo off
rem SDR, DeepLabV3 with ResNet-101, VOC 19-1 disjoint: 19 classes, then 1 (Michieli and Zanuttigh 2021).
rem One process on one GPU: several need NCCL, which PyTorch has on Linux only (scripts/voc/sdr_deeplab_19-1.sh with
rem GPUS=2).  set CUDA_VISIBLE_DEVICES=1  selects the second GPU.
rem Environment variables: DATA, LOGDIR, NAME, e.g.  set DATA=D:\data
rem Arguments go to run.py and override these options:  scripts\windows\sdr_19-1.bat --batch_size 4
setlocal
if not defined DATA set "DATA=data"
if not defined LOGDIR set "LOGDIR=logs/disjoint"
if not defined NAME set "NAME=SDR"

python run.py --where_to_sim GPU_windows --data_root "%DATA%" --logdir "%LOGDIR%" --name "%NAME%" ^
    --dataset voc --task 19-1 --step 0 --lr 0.001 --epochs 30 --batch_size 8 --debug --sample_num 10 ^
    --unce --loss_de_prototypes 1 %* || exit /b 1

python run.py --where_to_sim GPU_windows --data_root "%DATA%" --logdir "%LOGDIR%" --name "%NAME%" ^
    --dataset voc --task 19-1 --step 1 --lr 0.0001 --epochs 30 --batch_size 8 --debug --sample_num 10 ^
    --method SDR %* || exit /b 1
