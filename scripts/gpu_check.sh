#!/usr/bin/env bash
# Everything that a GPU has to show (tests on CUDA, real runs, speed), in one command of at most nine minutes.
#   bash scripts/gpu_check.sh --pack [VOC]   # first, where there is a network: packages, and the photos of a
#                                            # data root, into build/gpu, to be carried to the GPU machine
#   OUT=results bash scripts/gpu_check.sh    # there; further options go to benchmarks.gpu_check
#   bash scripts/gpu_check.sh --small        # the rehearsal on the CPU, in the environment of the tests
set -euo pipefail
cd "$(dirname "$0")/.."
pack=build/gpu

if [ "${1:-}" = --pack ]; then
    mkdir -p "$pack/wheels"
    # What a machine with PyTorch may lack; nothing of it depends on the Python in use.
    python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 -d "$pack/wheels" \
        tensorboardX torchmetrics lightning-utilities threadpoolctl pytest-timeout pytest-xdist execnet
    if [ -n "${2:-}" ]; then
        mkdir -p "$pack/photos"
        cp -r "$2/PascalVOC12" "$pack/photos/"
        chmod -R u+w "$pack/photos"
    fi
    exit
fi

OUT=${OUT:-build/gpu_check}
more=()
if [ "${1:-}" = --small ]; then
    . scripts/environment.sh requirements-dev.txt
    more=(--minutes 60)
else
    # Only what is missing: the machine's own torch stays.
    for wheel in "$pack"/wheels/*.whl; do
        name=$(basename "$wheel")
        python3 -m pip show -q "${name%%-*}" >/dev/null 2>&1 ||
            python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target build/gpu_site "$wheel"
    done
    export PYTHONPATH="$PWD/build/gpu_site${PYTHONPATH:+:$PYTHONPATH}"
    more=(--pytest "-n 8")
fi
[ ! -d "$pack/photos" ] || more+=(--photos "$pack/photos")
[ ! -f "$pack/mobilenet_v2.pth" ] || more+=(--weights "$pack/mobilenet_v2.pth")
if [ ! -d "$pack/photos" ]; then
    [ -d build/gpu_shapes ] || python3 data/make_shapes.py --out build/gpu_shapes --train 48 --val 16
    more+=(--shapes build/gpu_shapes)
fi
exec python3 -m benchmarks.gpu_check --out "$OUT" --logs build/gpu_runs "${more[@]}" "$@"
