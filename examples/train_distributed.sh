#!/usr/bin/env bash
# Trains in several processes on one machine, on its GPUs or on its CPU:
#
#     bash examples/train_distributed.sh [arguments of train_distributed.py]
#
# NPROC is how many processes, 2 if not set; at most one for each GPU. PYTHON is the interpreter; if not set, that of the
# active environment, or of the .venv that `make` installs into.
set -euo pipefail

examples="$(dirname "${BASH_SOURCE[0]}")"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    if [[ -z "${VIRTUAL_ENV:-}" && -x "$examples/../.venv/bin/python" ]]; then
        PYTHON="$examples/../.venv/bin/python"
    fi
fi

processes="${NPROC:-2}"
# The processes share the cores. The launcher by itself would leave all but one core of each process idle.
cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" "$examples/train_distributed.py" "$@"
