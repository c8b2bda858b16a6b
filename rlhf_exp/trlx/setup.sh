#!/usr/bin/env bash
# Make the interpreter of engine=trlx: trlx at the last commit of its life, and the libraries of its time.
#
# usage: bash rlhf_exp/trlx/setup.sh FOLDER [TRLX]
#
# FOLDER is where the environment goes, such as .venv-trlx. TRLX is a checkout of trlx at that commit,
# for machines that do not reach GitHub; by default pip fetches it with git.
# Variables: PYTHON names the interpreter (of Python 3.11: its tokenizers has no build for later ones);
# TORCH_ARGS has further options for installing torch, such as another index.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
commit=3340c2f3a56d1d14fdd5f13ad575121fa26b6d92
folder="${1:?usage: bash setup.sh FOLDER [TRLX]}"
source="${2:-git+https://github.com/CarperAI/trlx@$commit}"
base="${PYTHON:-python3.11}"

"$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  echo "error: '$base' is missing or not Python 3.11; name one: PYTHON=/path/to/python3.11" >&2
  exit 1
}
[ -x "$folder/bin/python" ] || "$base" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check install --quiet)
# torch goes first: on its own it is the build that this machine's index offers by default.
"${pip[@]}" ${TORCH_ARGS:-} torch==2.13.0
"${pip[@]}" -r "$here/requirements.txt"
# Its own requirements are open-ended; those above are the ones it was seen working with.
"${pip[@]}" --no-deps "$source"
"$folder/bin/python" -I - <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
from importlib.metadata import version

from trlx.trainer.accelerate_ppo_trainer import AcceleratePPOTrainer  # noqa: F401

print(", ".join(f"{name} {version(name)}" for name in ("trlx", "transformers", "torch")))
PYTHON
echo "engine=trlx engine.python=$folder/bin/python"
