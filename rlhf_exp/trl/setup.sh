#!/usr/bin/env bash
# Make the interpreter of engine=trl: TRL 1.16.0, and the libraries that rlhf_exp itself is pinned to.
#
# usage: bash rlhf_exp/trl/setup.sh FOLDER
#
# FOLDER is where the environment goes, such as .venv-trl-engine. The tests marked `trl` use it too.
# Variables: PYTHON names the interpreter (3.11 or newer); TORCH_ARGS has further options for installing
# torch, such as another index.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
folder="${1:?usage: bash setup.sh FOLDER}"
base="${PYTHON:-python3}"

[ -x "$folder/bin/python" ] || "$base" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check install --quiet)
# torch goes first: on its own it is the build that this machine's index offers by default.
"${pip[@]}" ${TORCH_ARGS:-} torch==2.13.0
"${pip[@]}" -r "$here/requirements.txt"
"$folder/bin/python" -I - <<'PYTHON'
from importlib.metadata import version

from trl import DPOTrainer, GRPOTrainer, RLOOTrainer  # noqa: F401 - what the engine needs

print(", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch")))
PYTHON
echo "engine=trl engine.python=$folder/bin/python"
