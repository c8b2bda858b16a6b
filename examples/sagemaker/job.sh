#!/usr/bin/env bash
# What a training job runs: it installs the repository over the image's PyTorch, and runs launch.py
# with the job's overrides and its outputs in the checkpoint folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m pip install --quiet '.[deepspeed,lora]'
exec python launch.py output_dir=/opt/ml/checkpoints/outputs "$@"
