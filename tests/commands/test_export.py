"""`rlhf-exp export`: the card of a model, and its upload to a stand-in for the hub."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_exp.cli import main
from tests.commands.stand_in_upload import UploadHub, upload_hub
from tests.lab import artifact, edit_manifest, run

TOKEN = "hf_" + "stand_in" * 4


def export(outputs: Path, *arguments: str) -> int:
    return main(["--outputs", str(outputs), "export", *arguments])


def test_the_card_is_for_strangers(small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert export(small_run, "small", str(folder)) == 0
    card = (folder / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["pipeline_tag"] == "text-generation"
    assert str(tmp_path) not in card
    assert str(small_run) not in card
    metrics = artifact(small_run, "ppo").manifest.metrics
    published = f"after {metrics['published_step']:.0f} optimizer steps, the best of the run"
    for expected in (
        "from random weights, with a tokenizer trained on the same data by supervised",
        "then PPO against a reward model trained on preferences",
        "Turns begin with `\\n\\nHuman: `",
        published,
        "| PPO |",
        "KL coefficient 0.05",
        "Generated dialogues that come with rlhf_exp",
        "The reward that PPO was trained on",
        "| Reward, raw |",
        "prefers neither SFT nor PPO: 8 ties",
        "It maximises a reward",
        "Nothing was done for safety",
    ):
        assert expected in text, expected
    # The code runs as it stands, once the placeholder is the folder.
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, object] = {}
    exec(code.replace("FOLDER_OR_HUB_ID", str(folder)), names)
    assert names["output"] is not None


def test_files_of_this_machine_go_by_their_names(run_copy: Path, tmp_path: Path) -> None:
    found = artifact(run_copy, "ppo")
    config = json.loads((found.path / "manifest.json").read_text())["config"]
    config["model"] |= {"path": str(tmp_path / "models" / "llama"), "revision": None}
    config["data"] |= {"source": "jsonl", "preferences": "/secret/place/pairs.jsonl"}
    config["ppo"]["reward"]["function"] = "/secret/place/rewards.py:score"
    (tmp_path / "models" / "llama").mkdir(parents=True)
    edit_manifest(found, config=config)
    assert export(run_copy, "small", str(tmp_path / "out")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "made from `llama`" in card
    assert "- Preferences: `pairs.jsonl`" in card
    assert "against the reward function `rewards.py:score`" in card
    assert "secret" not in card
    assert "base_model" not in card  # it is not on the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> UploadHub:
    """A stand-in for the hub, with a token for it."""
    with upload_hub(TOKEN) as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        # The hub's newer way for large files has a protocol of its own; Git LFS's is public.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def test_a_model_is_pushed_whole(
    hub: UploadHub, small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "exported"
    arguments = ("small", str(folder), "--push", "me/small-ppo", "--private")
    assert export(small_run, *arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [str(folder), f"{hub.url}/me/small-ppo/commit/{hub.commits[0]}"]
    assert hub.created == {"me/small-ppo": True}
    sent = hub.files["me/small-ppo"]
    assert sent == {path.name: path.read_bytes() for path in folder.iterdir()}
    card = sent["README.md"].decode()
    assert card.count('from_pretrained("me/small-ppo")') == 2
    assert "# me/small-ppo" in card
    # What arrived is the model.
    (tmp_path / "back").mkdir()
    for name, content in sent.items():
        (tmp_path / "back" / name).write_bytes(content)
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    AutoTokenizer.from_pretrained(tmp_path / "back")


def test_what_the_hub_refuses(
    hub: UploadHub,
    small_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "exported"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert export(small_run, "small", str(folder), "--push", "me/small") == 2
    error = capsys.readouterr().err
    assert "--push me/small: the hub did not take it" in error
    assert "401" in error
    assert not folder.exists()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert export(small_run, "small", str(folder), "--push", "me/small") == 2
    assert "no token of the Hugging Face hub" in capsys.readouterr().err
    assert export(small_run, "small", str(folder), "--private") == 2
    assert "--private: says how --push" in capsys.readouterr().err


def test_the_card_says_what_training_began_with(run_copy: Path, tmp_path: Path) -> None:
    given = tmp_path / "tuned"
    shutil.copytree(artifact(run_copy, "sft").path / "model", given)
    run(run_copy, "stage=ppo", "name=given", f"sft.use={given}")
    assert export(run_copy, "given", str(tmp_path / "out")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A language model made from `tuned` by PPO against a reward model" in card
    assert "random weights" not in card
    assert "trained from nothing" not in card


def test_the_card_of_chosen_answers(run_copy: Path, tmp_path: Path) -> None:
    reward = tmp_path / "short.py"
    reward.write_text("def score(prompts, responses):\n    return [-len(r) for r in responses]\n")
    score = (f"ppo.reward.function={reward}:score", "ppo.reward.delta=false")
    longer = "ppo.generation.max_new_tokens=48"
    run(run_copy, "stage=best_of", "name=chosen", "best_of.n=4", longer, *score)
    run(run_copy, "stage=sft", "name=again", "data.demonstrations=best_of:chosen")
    # The stage chooses with a model, and trains none: the model is what is exported.
    for name, words in (
        ("chosen", "by supervised fine-tuning on demonstrations."),
        ("again", "by supervised fine-tuning on the best of several answers of a model"),
    ):
        assert export(run_copy, name, str(tmp_path / name)) == 0
        assert words in (tmp_path / name / "README.md").read_text()
