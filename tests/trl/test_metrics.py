"""TRL's numbers under this project's names, its responses' ends, its evaluations of pairs."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_exp.config.training import DpoConfig, KlConfig, PpoConfig, Select
from rlhf_exp.data.tokenizer import Codec, train_tokenizer
from rlhf_exp.engines.iteration import Iteration
from rlhf_exp.training.result import Diverged
from rlhf_exp.trl.metrics import dialect, pair_metrics
from rlhf_exp.trl.pair_session import PairSession
from rlhf_exp.trl.responses import splitter
from tests.engines.test_session import Notes, Script

ROOT = Path(__file__).parents[2]
UPDATE = {
    "loss": 0.5,
    "entropy": 2.0,
    "kl": 0.1,
    "clip_ratio/region_mean": 0.25,
    "learning_rate": 1e-4,
    "grad_norm": 1.5,
    "peak": 100.0,
    "time/update": 4.0,
}
PAIR = {
    "loss": 0.5,
    "rewards/accuracies": 0.75,
    "rewards/chosen": 0.2,
    "rewards/rejected": -0.1,
    "rewards/margins": 0.3,
    "learning_rate": 1e-4,
    "grad_norm": 1.5,
    "peak": 100.0,
}


def test_an_iteration_in_numbers() -> None:
    later = {name: value for name, value in UPDATE.items() if name != "kl"} | {"loss": 0.7}
    iteration = Iteration(
        scores=[1.0, 3.0],
        lengths=[10, 20],
        kl=[0.5, 1.5],
        seconds=1.5,
        rollouts={"time/sample": 0.5, "time/score": 0.25},
        updates=[UPDATE, later | {"time/update": 1.5}],
    )
    found = dialect(PpoConfig(kl=KlConfig(coef=0.3))).metrics(iteration)
    assert found == pytest.approx(
        {
            "reward/mean": 2.0,
            "reward/std": 1.0,
            "reward/min": 1.0,
            "reward/max": 3.0,
            "response/length_mean": 15.0,
            "kl/sequence": 1.0,
            "kl/beta": 0.3,
            "loss/total": 0.6,
            "policy/entropy": 2.0,
            "trl/kl": 0.1,  # logged once an iteration
            "trl/clip_fraction": 0.25,
            "optim/lr": 1e-4,
            "optim/grad_norm": 1.5,
            "memory/peak_bytes": 100.0,
            "time/rollout_s": 0.5,
            "time/score_s": 0.25,
            "time/assess_s": 0.75,  # 1.5 - 0.5 - 0.25
            "time/update_s": 4.0,  # 4 + 1.5, of which 1.5 were the experience
            "throughput/samples_per_s": 2 / 5.5,
            "throughput/tokens_per_s": 30 / 5.5,
        }
    )


def test_every_metric_is_explained() -> None:
    names = ("reference/metrics.md", "how-to/trl.md")
    pages = "".join((ROOT / "docs" / name).read_text() for name in names)
    explained = set(re.findall(r"`([a-z]+/[a-z0-9_]+)`", pages))
    for by_token in (False, True):
        assert pair_metrics(PAIR, by_token).keys() <= explained
    iteration = Iteration(
        scores=[1.0],
        lengths=[1],
        seconds=1.0,
        rollouts={"time/sample": 0.5, "time/score": 0.25},
        updates=[UPDATE],
    )
    assert dialect(PpoConfig()).metrics(iteration).keys() <= explained


def test_rewards_of_pairs_have_the_projects_name_where_they_are_the_same() -> None:
    """TRL's are of sums over tokens whatever the loss is; with means ours are others."""
    ours = {"reward_chosen": 0.2, "reward_rejected": -0.1, "margin": 0.3, "accuracy": 0.75}
    common = {"loss/total", "optim/lr", "optim/grad_norm", "memory/peak_bytes"}
    for by_token, prefix in ((False, "dpo"), (True, "trl")):
        found = pair_metrics(PAIR, by_token)
        assert {name: found[f"{prefix}/{name}"] for name in ours} == ours
        assert found.keys() - common == {f"{prefix}/{name}" for name in ours}


def test_a_responses_end() -> None:
    codec = Codec(train_tokenizer(["\n\nHuman: What is it?\n\nAssistant: It is so."], 300), "hh")
    split = splitter(codec)
    (said,) = codec.encode_responses(["It is so."])
    said = list(said)
    assert split([*said, codec.eos_id]) == (said, True)
    assert split(said) == (said, False)
    stop = codec.tokenizer("\n\nHuman:", add_special_tokens=False)["input_ids"]
    assert split([*said, *stop]) == (said, True)


def messages(ratios: list[list[float]], step: int, ids: list[list[int]]) -> dict[str, Any]:
    return {"kind": "evaluated", "step": step, "ratios": ratios, "ids": ids, "kl": [0.5] * len(ids)}


def session(section: DpoConfig, *said: dict[str, Any]) -> tuple[Script, Notes, PairSession]:
    script, notes = Script(*said), Notes()
    process: Any = script
    found = PairSession(
        process,
        2,
        torch.tensor([[2, 4], [2, 4]]),
        lambda ids: (ids, ids[-1] == 1),
        section,
        notes,
        before_write=lambda: None,
        on_step=lambda step, metrics: None,
    )
    return script, notes, found


def test_pairs_are_judged_as_the_native_engines_are() -> None:
    first, second = [[0.0, 0.0], [0.0, 0.0]], [[2.0, -2.0], [1.0, 3.0]]
    script, notes, found = session(
        DpoConfig(beta=0.5, select=Select.best),
        {"kind": "ready", "parameters": 10, "trainable": 4},
        messages(first, 0, [[5, 1], [5, 6, 7, 8]]),
        messages(second, 1, [[5, 1], [5, 6, 7, 8]]),
        {"kind": "log", "step": 1, "stats": PAIR},
        {"kind": "done"},
    )
    outcome = found.run(Path("plan.json"))
    rows = [row for *_, row in notes.rows]
    assert rows[0]["eval/loss"] == pytest.approx(math.log(2))
    # Margins 4 and -2: -log sigmoid(0.5 * 4) and -log sigmoid(0.5 * -2).
    expected = (math.log1p(math.exp(-2.0)) + math.log1p(math.exp(1.0))) / 2
    assert rows[1]["eval/loss"] == pytest.approx(expected)
    assert rows[1]["eval/accuracy"] == 0.5
    assert rows[1]["eval/reward_chosen"] == pytest.approx(0.75)  # 0.5 * (2 + 1) / 2
    assert rows[1]["eval/length_mean"] == 3.0
    assert rows[1]["eval/ended_fraction"] == 0.5
    assert rows[1]["eval/kl_sequence"] == 0.5
    assert [answer["save"] for answer in script.answers if "save" in answer] == [True, False]
    assert outcome.published_step == 0
    assert outcome.objective == pytest.approx(-math.log(2))


def test_lengths_divide_where_means_are_taken() -> None:
    section = DpoConfig(beta=0.5, length_normalised=True)
    _, notes, found = session(
        section, messages([[2.0, -4.0], [2.0, -4.0]], 0, []), {"kind": "done"}
    )
    found.run(Path("plan.json"))
    (row,) = (row for *_, row in notes.rows)
    assert row["eval/margin"] == pytest.approx(1.0)  # 0.5 * (2 / 2 + 4 / 4)
    assert "eval/kl_sequence" not in row


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    stats = PAIR | {"loss": float("nan")}
    _, notes, found = session(DpoConfig(), {"kind": "log", "step": 1, "stats": stats})
    with pytest.raises(Diverged, match="the loss at step 1 is nan"):
        found.run(Path("plan.json"))
    assert len(notes.alerts) == 1
