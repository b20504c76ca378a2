#!/usr/bin/env bash
# What README and docs/ still lack: run this on a machine with an NVIDIA GPU, in the environment of
# CONTRIBUTING.md, and paste what it prints. It tests the GPU's part first; some half an hour.
set -euo pipefail
cd "$(dirname "$0")/.."
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python -m pytest -ra -k "step or accelerator or gpu"
python bench/compare.py
python bench/compare.py --ladder
python bench/trials_per_hour.py
python search.py config.yml
nnictl stop "$(basename "$(readlink ~/nni-experiments/_latest)")"
