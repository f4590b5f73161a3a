#!/usr/bin/env bash
# bash tests/run.sh [pytest arguments]: set up what is missing, then format check, lint, tests and, without
# arguments, gpu.py; from any folder.
# PYTHON=... bash tests/run.sh uses an environment of your own and installs nothing. Paths in the arguments are seen
# from the repository, as in: bash tests/run.sh tests/test_slices.py -k window
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
own=${PYTHON:-}
if [[ $own == */* ]]; then own=$(cd "$(dirname "$own")" && pwd)/$(basename "$own"); fi
PYTHON=$own
source "$HERE/setup.sh"
cd "$HERE"

if [[ -n $own ]]; then
  "$PYTHON" -c 'import pytest, xdist, hypothesis, ruff' 2>/dev/null || {
    echo "$PYTHON lacks what the tests need; install it: $PYTHON -m pip install -r '$HERE/tests/requirements.txt'" >&2
    exit 1
  }
else
  wanted=$(cksum <tests/requirements.txt)
  if [[ $(cat .venv/tests_ready 2>/dev/null) != "$wanted" ]]; then
    echo '#### set-up: tests/requirements.txt'
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
    echo "$wanted" >.venv/tests_ready
  fi
fi

"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
(($#)) || exec "$PYTHON" tests/gpu.py  # without arguments
