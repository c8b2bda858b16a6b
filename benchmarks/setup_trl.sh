#!/usr/bin/env bash
# Make the environment of the benchmark's peer: TRL 1.12.0, the last line with a PPO trainer.
#
# usage: bash benchmarks/setup_trl.sh [FOLDER]        (default: .venv-trl beside .venv)
#
# It has the torch, transformers and accelerate that rlhf_exp is pinned to, so that a comparison
# measures the trainers and not the libraries below them. torch goes first: installed on its own it
# is the build that this machine's index offers by default, and pip leaves it alone afterwards.
set -euo pipefail

root="$(cd "$(dirname "$0")/.." && pwd)"
folder="${1:-$root/.venv-trl}"
base="${PYTHON:-python3}"

[ -x "$folder/bin/python" ] || "$base" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet torch==2.13.0
"$folder/bin/python" -m pip install --quiet trl==1.12.0 transformers==5.23.0 accelerate==1.15.0
"$folder/bin/python" - <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
import torch, transformers, trl
from trl.experimental.ppo import PPOTrainer  # noqa: F401 - what the benchmark needs

print(f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
PYTHON
