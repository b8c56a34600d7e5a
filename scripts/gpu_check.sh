#!/usr/bin/env bash
# All checks that need a GPU (tests on CUDA, real runs, speed, loader, a small comparison), in at most nine minutes.
#   bash scripts/gpu_check.sh --pack [--data_root DATA_ROOT] [--weights FILE]
#                                            # first, on a machine with network access: packages, VOC's photos
#                                            # and MobileNetV2's weights into build/gpu, to be copied along
#   OUT=results bash scripts/gpu_check.sh    # on the GPU machine; options go to benchmarks.gpu_check
#   bash scripts/gpu_check.sh --small        # small sizes on the CPU
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = --pack ]; then
    shift
    . scripts/environment.sh requirements-dev.txt # the wheels have its versions
    exec python3 -m benchmarks.gpu_pack pack "$@"
fi
if [ "${1:-}" = --small ]; then
    . scripts/environment.sh requirements-dev.txt
    export OMP_NUM_THREADS=1 # several processes at a time share the cores
    options=(--minutes 60)
else
    python3 -m benchmarks.gpu_pack unpack # installs only what is missing
    export PYTHONPATH="$PWD/build/gpu_site${PYTHONPATH:+:$PYTHONPATH}"
    options=(--pytest "-n 8")
    [ ! -d build/gpu_photos ] || options+=(--photos build/gpu_photos)
    [ ! -f build/gpu_weights.pth ] || options+=(--weights build/gpu_weights.pth)
fi
[ -d build/gpu_shapes ] || python3 data/make_shapes.py --out build/gpu_shapes --train 48 --val 16 --size 64
exec python3 -m benchmarks.gpu_check --out "${OUT:-build/gpu_check}" --work build/gpu_runs \
    --shapes build/gpu_shapes "${options[@]}" "$@"
