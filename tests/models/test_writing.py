"""Writing a model: what transformers writes, without importing DeepSpeed for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from rlhf_exp.models.writing import write_model

Build = Callable[..., PreTrainedModel]

PROGRAM = """
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_exp.models.writing import write_model

sys.path.insert(0, sys.argv[1])
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8, n_positions=8))
write_model(model, Path(sys.argv[1]) / "model")
assert "deepspeed" not in sys.modules
assert find_spec("deepspeed") is not None, "it can be imported later"
try:
    import deepspeed
except ZeroDivisionError:
    sys.exit(7)
"""


def test_no_import_of_deepspeed(tmp_path: Path) -> None:
    """Found on the path, but not imported: it raises when it is."""
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("1 / 0")
    facts = tmp_path / "deepspeed-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 1.0\n")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 7, ended.stderr
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_the_folder_is_the_one_that_transformers_writes(tiny: Build, tmp_path: Path) -> None:
    model = tiny("gpt2")
    write_model(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
