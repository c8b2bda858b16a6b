"""Our losses and estimators of advantages against TRL's own code, on the same tensors.

They need `RLHF_EXP_TRL_PYTHON`, an interpreter made by `rlhf_exp/trl/setup.sh`. `losses.py` runs
there.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_exp.algo.advantages import group_relative, leave_one_out
from rlhf_exp.algo.kl import kl_loss, sequence_kl
from rlhf_exp.algo.losses import dpo_loss, policy_loss

pytestmark = [pytest.mark.trl, pytest.mark.timeout(300)]

PAIRS, ROWS, SIZE, TOKENS = 5, 8, 4, 6
BETA, CLIP = 0.3, 0.1
DPO = {
    # name: TRL's loss, our loss, by token, label smoothing
    "sigmoid": ("sigmoid", "sigmoid", False, 0.0),
    "sigmoid by token": ("sigmoid_norm", "sigmoid", True, 0.0),
    "hinge": ("hinge", "hinge", False, 0.0),
    "ipo by token": ("ipo", "ipo", True, 0.0),
}
POLICIES: dict[str, dict[str, Any]] = {
    "rloo": {"algorithm": "rloo"},
    "grpo": {"algorithm": "grpo"},
    "grpo, unscaled": {"algorithm": "grpo", "scale": "none"},
    "grpo, by token": {"algorithm": "grpo", "loss": "bnpo"},
    "grpo, unbiased": {"algorithm": "grpo", "unbiased": True},
}


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks(rows: int, start: int = 0) -> Tensor:
    """Return [rows, T] bool: responses of different lengths, behind prompts of `start` tokens."""
    lengths = torch.tensor([start + 1 + row % (TOKENS - start) for row in range(rows)])
    place = torch.arange(TOKENS)
    return (place >= start) & (place < lengths[:, None])


def dpo_case(loss: str, label_smoothing: float, rows: slice = slice(None)) -> dict[str, Any]:
    chosen, rejected = numbers(0, 2 * PAIRS, TOKENS).chunk(2)
    mask = masks(2 * PAIRS, start=2).flip(0).long().chunk(2)
    ref = numbers(1, 2 * PAIRS).chunk(2)
    return {
        "function": "dpo",
        "loss": loss,
        "beta": BETA,
        "label_smoothing": label_smoothing,
        "logprobs": torch.cat([chosen[rows], rejected[rows]]).tolist(),
        "mask": torch.cat([part[rows] for part in mask]).tolist(),
        "ref": torch.cat([part[rows] for part in ref]).tolist(),
    }


def policy_case(**options: Any) -> dict[str, Any]:
    old = -numbers(2, ROWS, TOKENS).abs()
    return {
        "function": "policy",
        "size": SIZE,
        "beta": BETA,
        "clip": CLIP,
        "logprobs": (old + 0.1 * numbers(3, ROWS, TOKENS)).tolist(),
        "old": old.tolist(),
        "ref": (old + 0.5 * numbers(4, ROWS, TOKENS)).tolist(),
        "mask": masks(ROWS).long().tolist(),
        "rewards": numbers(5, ROWS).tolist(),
        **options,
    }


CASES = {
    **{name: dpo_case(trl, smoothing) for name, (trl, _, _, smoothing) in DPO.items()},
    # TRL smooths labels in a loss that sorts the pairs of a batch; one pair alone is not moved.
    **{f"smoothed {row}": dpo_case("aot", 0.2, slice(row, row + 1)) for row in range(PAIRS)},
    **{name: policy_case(**options) for name, options in POLICIES.items()},
    "rloo, on policy": policy_case(algorithm="rloo", logprobs=policy_case()["old"]),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return TRL's result of each case."""
    python = os.environ.get("RLHF_EXP_TRL_PYTHON")
    if not python:
        pytest.skip("RLHF_EXP_TRL_PYTHON names no interpreter with TRL")
    cases = tmp_path_factory.mktemp("trl") / "cases.json"
    cases.write_text(json.dumps(list(CASES.values())))
    command = [python, str(Path(__file__).with_name("losses.py")), str(cases)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout.splitlines()[-1])
    return dict(zip(CASES, results, strict=True))


def ours(case: dict[str, Any], kind: str, by_token: bool, smoothing: float) -> dict[str, Any]:
    """Return our DPO loss of a case, and its gradient by the log-probabilities of tokens."""
    logprobs = torch.tensor(case["logprobs"], requires_grad=True)
    mask = torch.tensor(case["mask"])
    ratios = (logprobs * mask).sum(1) - torch.tensor(case["ref"])
    if by_token:
        ratios = ratios / mask.sum(1)
    chosen, rejected = ratios.chunk(2)
    count = len(chosen)
    loss, stats = dpo_loss(chosen, rejected, torch.ones(count), count, BETA, kind, smoothing)
    loss.backward()
    return {"loss": loss.item(), "gradient": logprobs.grad.tolist(), "stats": stats}


@pytest.mark.parametrize("name", DPO)
def test_dpo(found: dict[str, dict[str, Any]], name: str) -> None:
    _, kind, by_token, smoothing = DPO[name]
    theirs, own = found[name], ours(CASES[name], kind, by_token, smoothing)
    assert own["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    close(own["gradient"], theirs["gradient"])
    if not by_token:  # TRL's rewards are sums, whatever the loss
        logged, stats = theirs["logged"], own["stats"]
        assert (stats.chosen / PAIRS).item() == pytest.approx(logged["rewards/chosen"], rel=1e-5)
        assert (stats.rejected / PAIRS).item() == pytest.approx(
            logged["rewards/rejected"], rel=1e-5
        )
        assert (stats.correct / PAIRS).item() == pytest.approx(logged["rewards/accuracies"])


def test_dpo_with_smoothed_labels(found: dict[str, dict[str, Any]]) -> None:
    for row in range(PAIRS):
        name = f"smoothed {row}"
        theirs, own = found[name], ours(CASES[name], "sigmoid", False, 0.2)
        assert own["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        close(own["gradient"], theirs["gradient"])


def close(found: list[list[float]], expected: list[list[float]]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert torch.tensor(expected).abs().max() > 1e-3


def tensors(case: dict[str, Any]) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(case[name]) for name in ("logprobs", "old", "ref", "rewards"))


def test_rloo(found: dict[str, dict[str, Any]]) -> None:
    """Advantages; and the gradient where the policy is the one that sampled.

    TRL clips the ratio of whole responses, as PPO's is of tokens: from the second update on they
    differ, and so they should. TRL's loss is a mean of responses' sums.
    """
    case, theirs = CASES["rloo"], found["rloo"]
    _, old, ref, rewards = tensors(case)
    mask = masks(ROWS)
    advantages = leave_one_out(rewards - BETA * sequence_kl(old, ref, mask), SIZE)
    assert advantages.tolist() == pytest.approx(theirs["advantages"], abs=1e-5)


def test_rloos_first_gradient(found: dict[str, dict[str, Any]]) -> None:
    case, theirs = CASES["rloo, on policy"], found["rloo, on policy"]
    logprobs, old, _, _ = tensors(case)
    logprobs = logprobs.requires_grad_()
    mask, advantages = masks(ROWS), torch.tensor(theirs["advantages"])
    each = advantages[:, None].expand(ROWS, TOKENS)
    policy_loss(logprobs, old, each, mask, CLIP, float(ROWS))[0].backward()
    close(logprobs.grad.tolist(), theirs["gradient"])


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "rloo"])
def test_grpo(found: dict[str, dict[str, Any]], name: str) -> None:
    case, theirs = CASES[name], found[name]
    logprobs, old, ref, rewards = tensors(case)
    logprobs = logprobs.requires_grad_()
    advantages = group_relative(rewards, SIZE, divide=case.get("scale") != "none")
    assert advantages.tolist() == pytest.approx(theirs["advantages"], abs=1e-5)
    mask, by_token = masks(ROWS), case.get("loss") == "bnpo"
    weights = mask.float() if by_token else mask / mask.sum(1, keepdim=True)
    normaliser = float(mask.sum()) if by_token else float(ROWS)
    each = advantages[:, None].expand(ROWS, TOKENS)
    loss, stats = policy_loss(logprobs, old, each, weights, CLIP, normaliser)
    assert stats.clipped > 0, "what is not clipped shows nothing of clipping"
    unbiased = case.get("unbiased", False)
    loss = loss + BETA * kl_loss(logprobs, old, ref, weights, normaliser, "k3", unbiased)
    loss.backward()
    assert loss.item() == pytest.approx(theirs["loss"], rel=1e-4)
    close(logprobs.grad.tolist(), theirs["gradient"])
