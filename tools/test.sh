#!/bin/sh
# Sets up a virtual environment ($VENV, or .venv) with everything the tests need and runs them all.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --editable '.[dev]'
"$venv/bin/ruff" check .
"$venv/bin/mypy"
# One process a core, one thread each: threads of several processes would wait for each other.
exec env OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest --numprocesses auto --dist loadfile "$@"
