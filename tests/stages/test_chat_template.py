"""Dialogues in a model's own chat template, from the command line to the model that is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_exp.data.tokenizer import train_tokenizer
from rlhf_exp.models.architecture import Architecture
from rlhf_exp.models.pretrained import build_causal_lm, end_token_ids
from tests.lab import artifact, jsonl, launch, pairs

TURNS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

ANY_TURNS = "{% for m in messages %}" + TURNS.split("{% endif %}", 1)[1]


def chat_model(folder: Path, template: str = TURNS) -> Path:
    tokenizer = train_tokenizer(["What is it? It is so."] * 9, 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = template
    shape = Architecture("llama", 1, 16, 2, 32, len(tokenizer), 256)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    build_causal_lm(shape, 0, eos_id=eos, pad_id=pad).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_dialogue_that_the_template_refuses_is_an_unusable_row(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[object] = [*pairs(30)]
    rows[4] = {
        side: f"\n\nHuman: Hello?\n\nHuman: Anyone?\n\nAssistant: {side}"
        for side in ("chosen", "rejected")
    }
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    model, outputs = chat_model(tmp_path / "model"), tmp_path / "outputs"
    data = ["data=hh_local", f"data.preferences={path}", "data.format=chat_template"]
    arguments = ["stage=sft", f"model.path={model}", *data]
    assert launch(outputs, *arguments, "data.max_bad_fraction=0") == 2
    reason = f"{path}:5: the chat template refuses it: roles must alternate"
    assert reason in capfd.readouterr().err
    assert launch(outputs, *arguments, "sft.steps=1") == 0
    assert reason in caplog.text
    trained = artifact(outputs, "sft").path
    assert json.loads((trained / "facts.json").read_text())["rejected"] == 1
    # What SFT has taught ends a text for whoever loads the model.
    end = json.loads((trained / "model" / "tokenizer.json").read_text())["added_tokens"][-1]
    assert end["content"] == "<|end|>"
    assert end_token_ids(trained / "model") == sorted([end["id"], *end_token_ids(model)])


def test_the_template_of_a_model_that_is_given_is_asked_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    twice = "\n\nHuman: Hello?\n\nHuman: Anyone {}?\n\nAssistant:"
    rows = [{"prompt": twice.format(n), "chosen": "yes", "rejected": "no"} for n in range(20)]
    path = jsonl(tmp_path / "pairs.jsonl", rows)
    free = chat_model(tmp_path / "free", ANY_TURNS)
    strict = chat_model(tmp_path / "strict")
    data = ["data=hh_local", f"data.preferences={path}", "data.format=chat_template"]
    models = [f"model.path={free}", f"sft.use={free}", f"ppo.use={strict}"]
    score = tmp_path / "score.py"
    score.write_text("def score(prompts, responses):\n    return [0.0 for _ in prompts]\n")
    judged = ["stage=eval", f"ppo.reward.function={score}:score"]
    assert launch(tmp_path / "outputs", *data, *models, *judged) == 2
    error = capfd.readouterr().err
    assert f"error: ppo.use={strict}: " in error
    assert f"rows cannot be written for it, the first is {path}:" in error
    assert "roles must alternate" in error


def test_a_date_is_said_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path / "pairs.jsonl", pairs(20))
    model = chat_model(tmp_path / "model", "{{ strftime_now('%d %b %Y') }}" + TURNS)
    data = ["data=hh_local", f"data.preferences={path}", "data.format=chat_template"]
    assert (
        launch(tmp_path / "outputs", "stage=sft", "sft.steps=1", f"model.path={model}", *data) == 0
    )
    assert f"{model}: its chat template prints today's date" in caplog.text


def test_every_end_that_a_models_configs_name(tmp_path: Path) -> None:
    assert end_token_ids(tmp_path) == []
    (tmp_path / "config.json").write_text(
        '{"eos_token_id": null, "text_config": {"eos_token_id": 9}}'
    )
    assert end_token_ids(tmp_path) == [9]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7, -1], "top_p": 0.5}')
    assert end_token_ids(tmp_path) == [5, 7, 9]
