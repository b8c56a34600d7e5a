# Sourced by the other scripts: creates a virtual environment with the packages of a requirements file.
#   . scripts/environment.sh requirements.txt
# VENV: folder of the environment (default .venv). An existing environment for the same file is not changed.
# REQUIREMENTS=oldest installs the lowest versions that requirements.txt allows (Python 3.10 or 3.11) in .venv-oldest.
requirements=$1
if [ "${REQUIREMENTS:-newest}" = oldest ]; then
    VENV=${VENV:-.venv-oldest}
    bounds=$(sed -n 's/>=/==/p' requirements.txt)
else
    VENV=${VENV:-.venv}
    bounds=
fi
case $VENV in "~/"*) VENV="$HOME/${VENV#\~/}" ;; esac # the shell does not expand ~ in quotes
stamp="$VENV/.installed-$({ cat requirements*.txt; echo "$bounds"; } | cksum | cut -d' ' -f1)-$(basename "$requirements" .txt)"
if [ ! -e "$stamp" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        { echo "Python 3.10 or newer is needed; name one with PYTHON=..." >&2; exit 2; }
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV" ||
        { echo "cannot create a virtual environment; on Debian: apt-get install python3-venv" >&2; exit 2; }
    echo "installing $requirements into $VENV (a few minutes the first time)"
    echo "$bounds" >"$VENV/bounds.txt"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" -c "$VENV/bounds.txt"
    touch "$stamp"
fi
# shellcheck disable=SC2034  # used by the scripts that source this file
PYTHON_BIN="$PWD/$VENV/bin/python"
case $VENV in /*) PYTHON_BIN="$VENV/bin/python" ;; esac
export PATH="$(dirname "$PYTHON_BIN"):$PATH"
