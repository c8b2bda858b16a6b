"""Loading, building and saving, and what a user is told who gives something else.

Writing a model: what transformers writes, without importing DeepSpeed for it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
)

from rlhf_exp.errors import UserError
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.pretrained import (
    architecture_of,
    build_causal_lm,
    context_of,
    load_causal_lm,
    load_tokenizer,
    save_causal_lm,
    write_model,
)

Build = Callable[..., PreTrainedModel]
SHAPE = Architecture("gpt_neox", 2, 16, 2, 32, 40, 24)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_causal_lm(SHAPE, seed=0, eos_id=1, pad_id=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_weights_are_a_function_of_the_seed(family: str) -> None:
    shape = Architecture(family, 2, 16, 2, 32, 40, 24)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (build_causal_lm(shape, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_saved_model_is_a_plain_folder(tiny: Build, family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(10)[None]
    ours = load_causal_lm(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(ours(tokens).logits, model(tokens).logits)
    assert torch.equal(theirs(tokens).logits, model(tokens).logits)
    assert architecture_of(ours.config) == architecture_of(model.config)


def test_pretrained_model_predicts_its_own_stories(shared_data: Path) -> None:
    path = shared_data / "stories260k"
    model, tokenizer = load_causal_lm(path), load_tokenizer(path)
    tokens = tokenizer("Once upon a time, there was a little girl", return_tensors="pt").input_ids
    loss = model(tokens, labels=tokens).loss
    assert loss < 2.5  # log(512) = 6.2 for a model that knows nothing


def test_tokenizer_is_saved_beside_the_model(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "stories260k"
    save_causal_lm(load_causal_lm(path), load_tokenizer(path), tmp_path)
    assert load_tokenizer(tmp_path)("a cat").input_ids == load_tokenizer(path)("a cat").input_ids


def test_dropout_is_off(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(attention_dropout=0.3, hidden_dropout=0.4)
    (folder / "config.json").write_text(json.dumps(config))
    model = load_causal_lm(folder).train()
    assert model.config.attention_dropout == model.config.hidden_dropout == 0
    assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    tokens = torch.arange(10)[None]
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_padding_token_is_trained_like_any_other() -> None:
    model = build_causal_lm(Architecture("llama", 1, 16, 2, 32, 40, 24), 0, eos_id=1, pad_id=1)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert model.get_input_embeddings().weight.grad[1].abs().max() > 0


def test_gptj_falls_back_to_eager_attention(tmp_path: Path) -> None:
    shape = Architecture("gptj", 1, 16, 2, 32, 40, 24)
    model = build_causal_lm(shape, 0, attention="sdpa")
    model.save_pretrained(tmp_path)
    assert load_causal_lm(tmp_path, attention="sdpa").config._attn_implementation == "eager"


def test_half_precision(folder: Path) -> None:
    assert load_causal_lm(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json, so it is no model"):
        load_causal_lm(tmp_path)


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_causal_lm(tmp_path / "nowhere")


def test_config_that_names_no_language_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(UserError, match="no model can be loaded from there"):
        load_causal_lm(folder)


def test_folder_without_safetensors(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_causal_lm(folder)


def test_weights_that_are_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("gpt_neox.final_layer_norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"1 weights .* \(first: gpt_neox\.final_layer_norm\.weight"
    ):
        load_causal_lm(folder)


def test_damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged safetensors file"):
        load_causal_lm(folder)


OTHER_FILES = {
    "pickled": "pytorch_model-00001.bin",
    "without an ending": "weights",
    "above": "../elsewhere/model.safetensors",
    "absolute": "/elsewhere/model.safetensors",
    "of Windows": "..\\\\elsewhere\\\\model.safetensors",
    "a number": 1,
}


@pytest.mark.parametrize("name", OTHER_FILES.values(), ids=OTHER_FILES)
@pytest.mark.parametrize("only", [True, False])
def test_an_index_that_names_another_file_is_refused_unread(
    folder: Path, name: object, only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the other names are as they should be; torch.load is never called."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    names = load_file(folder / "one.safetensors").keys()
    weight_map = {
        key: name if only or not place else "one.safetensors" for place, key in enumerate(names)
    }
    torch_file = folder / str(name) if str(name).endswith(".bin") else None
    if torch_file is not None:
        torch_file.write_bytes(b"\x80\x04N.")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json: names .*, which is no safetensors file"):
        load_causal_lm(folder)


def test_an_index_of_the_folders_own_files_is_followed(folder: Path) -> None:
    whole = load_causal_lm(folder).state_dict()
    (folder / "parts").mkdir()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(weights) // 2
    weight_map = {}
    for name, part in (
        ("one.safetensors", list(weights)[:half]),
        ("parts/two.safetensors", list(weights)[half:]),
    ):
        save_file({key: weights[key] for key in part}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    loaded = load_causal_lm(folder).state_dict()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


@pytest.mark.parametrize("named", ["adapter_model.bin", "../model.safetensors", "model.bin"])
def test_a_config_that_names_another_file_is_refused(folder: Path, named: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    with pytest.raises(UserError, match=r"transformers_weights in its config\.json names"):
        load_causal_lm(folder)


def test_an_adapter_is_not_put_into_the_model_that_it_names(folder: Path) -> None:
    content = {"base_model_name_or_path": "someone/elses", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"adapter_config\.json: .*merge_and_unload"):
        load_causal_lm(folder)


def test_code_of_a_models_own_is_not_run_and_not_asked_for(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('it was run')\n")
    with pytest.raises(UserError, match=r"no model can be loaded from there"):
        load_causal_lm(folder)


@pytest.mark.parametrize("text", ["", "[1]", "1", "{", '{"model_type": []}', "\x00"])
def test_a_damaged_config_names_the_folder(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=str(folder)):
        load_causal_lm(folder)


def test_folder_without_tokenizer(folder: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in the folder"):
        load_tokenizer(folder)


def test_weights_of_another_shape(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build_causal_lm(Architecture("gpt_neox", 2, 32, 2, 32, 40, 24), 0).save_pretrained(other)
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(UserError, match="no model can be loaded from there"):
        load_causal_lm(folder)


def test_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no tokenizer can be loaded from there"):
        load_tokenizer(folder)


PROGRAM = """
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_exp.models.pretrained import write_model

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


def test_positions_by_any_familys_name() -> None:
    assert context_of(GPT2Config(n_positions=77)) == 77
    assert context_of(LlamaConfig(max_position_embeddings=88)) == 88
    assert context_of(BloomConfig()) is None, "its biases go by distance"


def test_positions_end_where_longer_rows_would_change_shorter_ones() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}
    factors = [1.0] * (8 // 2)
    rope = {"rope_type": "longrope", "rope_theta": 1e4}
    rope |= {"short_factor": factors, "long_factor": factors}
    scaled = Phi3Config(**sizes, original_max_position_embeddings=32, rope_parameters=rope)
    assert context_of(scaled) == 32
    # This one turns its angles once and for all.
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    fixed = {"rope_theta": 1e4, "original_max_position_embeddings": 32}
    assert context_of(LlamaConfig(**sizes, rope_parameters=llama3 | fixed)) == 128
