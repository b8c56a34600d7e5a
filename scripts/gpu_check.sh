#!/usr/bin/env bash
# All checks that need a GPU (tests on CUDA, real runs, speed), in at most nine minutes.
#   bash scripts/gpu_check.sh --pack [DATA_ROOT [WEIGHTS]]
#                                            # first, on a machine with network access: packages, VOC's photos
#                                            # and MobileNetV2's weights into build/gpu, to be copied along
#   OUT=results bash scripts/gpu_check.sh    # on the GPU machine; options go to benchmarks.gpu_check
#   bash scripts/gpu_check.sh --small        # small sizes on the CPU, with generated images
set -euo pipefail
cd "$(dirname "$0")/.."
pack=build/gpu

if [ "${1:-}" = --pack ]; then
    mkdir -p "$pack/wheels"
    # Packages that a machine with PyTorch may lack; all are pure Python.
    python3 -m pip download --quiet --no-deps --only-binary=:all: -d "$pack/wheels" \
        tensorboardX threadpoolctl pytest-timeout pytest-xdist execnet
    [ -z "${2:-}" ] || tar -czf "$pack/photos.tar.gz" -C "$2" PascalVOC12 # one file is copied faster than thousands
    [ -z "${3:-}" ] || cp "$3" "$pack/mobilenet_v2.pth"
    exit
fi

options=()
if [ "${1:-}" = --small ]; then
    . scripts/environment.sh requirements-dev.txt
    export OMP_NUM_THREADS=1 # several processes at a time share the cores
    options=(--minutes 60)
else
    # Installs only missing packages.
    for wheel in "$pack"/wheels/*.whl; do
        name=$(basename "$wheel")
        python3 -m pip show -q "${name%%-*}" >/dev/null 2>&1 || python3 -m pip install --quiet --no-index \
            --no-deps --no-compile --no-cache-dir --target build/gpu_site "$wheel"
    done
    export PYTHONPATH="$PWD/build/gpu_site${PYTHONPATH:+:$PYTHONPATH}"
    options=(--pytest "-n 8")
    if [ -f "$pack/photos.tar.gz" ]; then
        mkdir -p build/gpu_photos
        tar -xzf "$pack/photos.tar.gz" -C build/gpu_photos
        options+=(--photos build/gpu_photos)
    fi
    [ ! -f "$pack/mobilenet_v2.pth" ] || options+=(--weights "$pack/mobilenet_v2.pth")
fi
if [[ ! " ${options[*]} " = *" --photos "* ]]; then
    [ -d build/gpu_shapes ] || python3 data/make_shapes.py --out build/gpu_shapes --train 48 --val 16 --size 64
    options+=(--shapes build/gpu_shapes)
fi
exec python3 -m benchmarks.gpu_check --out "${OUT:-build/gpu_check}" --logs build/gpu_runs "${options[@]}" "$@"
