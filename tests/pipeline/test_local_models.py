"""Models that are given with pickled weights: converted once, then used as any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from rlhf_exp.cli import main
from rlhf_exp.models import pickled_weights
from rlhf_exp.pipeline.hub import Need, Pin, Pins, needs
from rlhf_exp.pipeline.local_models import local_models
from rlhf_exp.pipeline.plan import plan
from tests.lab import artifact, launch, small, small_config
from tests.models.published_reward import write_published, write_trunk
from tests.pipeline.stand_in_hub import COMMIT


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trunk(tmp_path_factory.mktemp("trunk"))


def test_ppo_maximises_a_published_reward_model(
    small_run: Path, trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = write_published(tmp_path / "published", trunk)
    outputs = tmp_path / "outputs"
    sft = artifact(small_run, "sft").path
    given = [f"sft.use={sft}", f"reward.use={published}", f"reward.trunk={trunk}"]
    assert launch(outputs, *given, "stage=ppo") == 0
    (converted,) = (outputs / "cache" / "models").iterdir()
    assert (converted / "reward_head.safetensors").is_file()
    assert artifact(outputs, "ppo").manifest.metrics
    # A second time nothing is converted, whatever becomes of the cache of digests.
    monkeypatch.setattr(pickled_weights, "convert_reward", lambda *_: pytest.fail("converted"))
    assert launch(outputs, *given, "stage=ppo", "ppo.seed=1") == 0


def test_a_term_of_the_reward_may_be_one(trunk: Path, tmp_path: Path) -> None:
    published = write_published(tmp_path / "published", trunk)
    terms = f"ppo.reward.terms=[{{model:{published}}},{{length:{{target:20}}}}]"
    config = small_config(tmp_path / "outputs", terms, f"reward.trunk={trunk}", "stage=ppo")
    steps = plan(config)
    (ppo,) = [step for step in local_models(config, steps).steps if step.stage == "ppo"]
    (model,) = ppo.extra.values()
    assert (Path(model.model) / "reward_head.safetensors").is_file()
    assert Path(model.model).is_relative_to(tmp_path / "outputs" / "cache" / "models")


def test_what_counts_in_the_key(trunk: Path, tmp_path: Path) -> None:
    published = write_published(tmp_path / "published", trunk)
    given = [f"reward.use={published}", "stage=ppo"]

    def key(*overrides: str) -> str:
        steps = plan(small_config(tmp_path / "outputs", *given, *overrides))
        return next(step.key for step in steps if step.stage == "ppo")

    before = {key(), key(f"reward.trunk={trunk}"), key("reward.trunk=org/other")}
    assert len(before) == 3
    state = torch.load(published / "hf_ckpt.pt", weights_only=True)
    torch.save(state | {"v_head.weight": state["v_head.weight"] + 1}, published / "hf_ckpt.pt")
    assert key() not in before


def test_a_trunk_of_the_hub_is_fetched_whoever_names_it(trunk: Path, tmp_path: Path) -> None:
    published = write_published(tmp_path / "published", trunk)
    wanted = [Need("reward.trunk", "model", "org/trunk", "main")]
    for named in (f"reward.use={published}", f"ppo.reward.terms=[{{model:{published}}}]"):
        overrides = (named, "reward.trunk=org/trunk@main", "stage=ppo")
        config = small_config(tmp_path / "outputs", *overrides)
        assert needs(config, plan(config)) == wanted


def test_a_trunk_with_another_template_is_another_reward_model(trunk: Path, tmp_path: Path) -> None:
    """As its key is (`test_what_counts_in_the_key`)."""
    trunk = shutil.copytree(trunk, tmp_path / "trunk")
    published = write_published(tmp_path / "published", trunk)
    given = (f"reward.use={published}", f"reward.trunk={trunk}", "stage=ppo")
    config = small_config(tmp_path / "outputs", *given)

    def templates() -> list[bool]:
        (step,) = [one for one in local_models(config, plan(config)).steps if one.stage == "reward"]
        return [(Path(str(step.model)) / "chat_template.jinja").is_file()]

    assert templates() == [False]
    (trunk / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert templates() == [True]


def test_a_base_model_with_pickled_weights(trunk: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trunk, tmp_path / "model")
    weights = pickled_weights.load_config(folder)
    assert weights.model_type == "gptj"
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert launch(tmp_path / "outputs", f"model.path={folder}", "stage=sft") == 0
    found = artifact(tmp_path / "outputs", "sft")
    assert found.manifest.config["model"]["path"] == str(folder)  # not the copy in the cache


def test_the_doctor_names_what_is_no_reward_model(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = write_published(tmp_path / "published", trunk)
    overrides = small(tmp_path / "outputs", f"reward.use={published}")
    assert main(["doctor", *overrides]) == 2
    told = capsys.readouterr().err
    assert f"reward.use={published}: " in told
    assert "reward.trunk=EleutherAI/gpt-j-6b" in told


def test_one_of_the_hub(trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cache as `fetch` leaves it: a revision, weights, and neither config nor tokenizer."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--judge"
    (repository / "snapshots").mkdir(parents=True)
    write_published(repository / "snapshots" / COMMIT, trunk)
    # What was fetched is found by the revision that the config names, a short one too.
    judge = Need("reward.use", "model", "org/judge", COMMIT[:8])
    Pins(tmp_path / "outputs").set(judge, Pin(COMMIT, ["hf_ckpt.pt"]))
    given = [f"reward.use=org/judge@{COMMIT[:8]}", f"reward.trunk={trunk}", "stage=ppo"]
    config = small_config(tmp_path / "outputs", *given)
    steps = plan(config)
    assert needs(config, steps) == [judge]
    found = {step.stage: step.model for step in local_models(config, steps).steps}
    assert found["reward"] is not None
    assert (Path(found["reward"]) / "reward_head.safetensors").is_file()
    (step,) = [step for step in steps if step.stage == "reward"]
    assert step.model == f"org/judge@{COMMIT[:8]}"  # a plan leaves it as it is
