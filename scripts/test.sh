#!/usr/bin/env bash
# Sets up and runs linter, formatter, type checker and tests. Arguments go to pytest.
# --quick as the first one: a minute, without the tests that train or build large networks, start processes or read many files.
# REQUIREMENTS=oldest PYTHON=python3.10 runs the tests with the oldest packages instead of the newest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh requirements-dev.txt
python -c 'import platform, numpy, torch, torchvision; from utils.processor import description
print("versions: python", platform.python_version(), *(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, numpy)))
print("processor:", description())'
if [ "${REQUIREMENTS:-newest}" = newest ]; then  # linter and type checker are for the newest packages
    ruff check .
    ruff format --check .
    mypy
fi
# The test of the report's page needs a browser; it is skipped without one.
if ! command -v chromium chromium-browser google-chrome >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null ||
        echo "chromium could not be installed; the test of the report's page is skipped" >&2
fi
if [ "${1:-}" = --quick ]; then
    shift
    quick=(tests/test_{architecture,argparser,tasks}.py tests/{dataset,methods,metrics,modules,utils})
    without=(tests/utils/test_{command,distributed,drawing,files,hub,processor}.py
        tests/modules/test_{branches,checkpointing,pretrained,resnet,timm_backbone}.py
        tests/methods/test_{foreground,own_modules}.py tests/dataset/test_{image_labels,loaders,shapes}.py
        tests/test_architecture.py::test_kinds_of_classifiers_are_known_to_a_new_process
        tests/dataset/test_check.py::test_{published_lists,real_photos}
        tests/dataset/test_protocols.py::test_published_lists_from_real_masks)
    set -- "${quick[@]}" "${without[@]/#/--deselect=}" "$@"
fi
# Three processes also on two cores: some tests wait.
OMP_NUM_THREADS=1 python -m pytest -n "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder --durations=20 "$@"
