#!/usr/bin/env bash
# Trains in several processes on one machine, on its GPUs or on its CPU:
#
#     bash examples/train_distributed.sh [arguments of train_distributed.py]
#
# NPROC is how many processes, 2 if not set; at most one for each GPU.
set -euo pipefail

processes="${NPROC:-2}"
# The processes share the cores. torchrun by itself would leave all but one core of each process idle.
cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"

exec torchrun --standalone --nproc-per-node "$processes" "$(dirname "${BASH_SOURCE[0]}")/train_distributed.py" "$@"
