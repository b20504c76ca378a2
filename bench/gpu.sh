#!/usr/bin/env bash
# Measures what README.md and docs/ still lack: run it on a machine with an NVIDIA GPU, in the
# environment of CONTRIBUTING.md. It tests the code for GPUs first, and takes half an hour.
set -euo pipefail
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python -m pytest -ra -k "step or accelerator or gpu"
python bench/compare.py
python bench/compare.py --ladder
python bench/trials_per_hour.py
python search.py config.yml
nnictl stop "$(basename "$(readlink ~/nni-experiments/_latest)")"
