"""TRL's own losses and advantages of given tensors; run by an interpreter that has TRL.

It reads a JSON file of cases and prints their results as JSON. The trainers' own functions compute
them, of a trainer whose model, generation and rewards are stand-ins that return the given numbers.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

PAD = 0


class Accelerator:
    """One process."""

    device = torch.device("cpu")
    process_index, num_processes, sync_gradients = 0, 1, True

    def gather(self, values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        return values


def trainer(**attributes: Any) -> SimpleNamespace:
    """Return what a trainer's functions read of it; the model is one that is training."""
    model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    return SimpleNamespace(
        accelerator=Accelerator(),
        model=model,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        **attributes,
    )


def dpo(case: dict[str, Any]) -> dict[str, Any]:
    """Return TRL's DPO loss of log-probabilities [2 n, T], chosen sides first."""
    logprobs = torch.tensor(case["logprobs"], requires_grad=True)
    mask = torch.tensor(case["mask"])
    chosen, rejected = torch.tensor(case["ref"]).chunk(2)
    own = trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[case["loss"]],
        loss_weights=[1.0],
        beta=case["beta"],
        label_smoothing=case["label_smoothing"],
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inside = logprobs * mask

    def model(**_: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(inside)
        return SimpleNamespace(
            log_probs=inside, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    # A first token, which no log-probability belongs to.
    first = torch.zeros(len(mask), 1, dtype=torch.long)
    completion = torch.cat([first, mask], 1)
    inputs = {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = DPOTrainer._compute_loss(own, model, inputs, False)
    loss.backward()
    logged = {name: values[-1] for name, values in own._metrics["train"].items()}
    return {"loss": loss.item(), "gradient": logprobs.grad.tolist(), "logged": logged}


def policy(case: dict[str, Any]) -> dict[str, Any]:
    """Return TRL's advantages [B] of rewards [B], and its loss of log-probabilities [B, T]."""
    kind = {"rloo": RLOOTrainer, "grpo": GRPOTrainer}[case["algorithm"]]
    logprobs = torch.tensor(case["logprobs"], requires_grad=True)
    old, ref = torch.tensor(case["old"]), torch.tensor(case["ref"])
    mask = torch.tensor(case["mask"])
    given = iter([old, ref, logprobs])
    lengths = mask.sum(1).tolist()
    own = trainer(
        **dict.fromkeys(("use_vllm", "mask_truncated_completions", "tools", "_is_vlm"), False),
        **dict.fromkeys(("environment_factories", "environments", "pad_to_multiple_of")),
        **dict.fromkeys(("off_policy_mask_threshold", "reward_clip_range")),
        normalize_advantages=False,
        args=MagicMock(
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=len(mask),
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            use_bias_correction_kl=case.get("unbiased", False),
            delta=None,
        ),
        num_iterations=2,  # so that the old log-probabilities are not the new ones
        num_generations=case["size"],
        beta=case["beta"],
        epsilon_low=case["clip"],
        epsilon_high=case["clip"],
        scale_rewards=case.get("scale", "group"),
        loss_type=case.get("loss", "grpo"),
        multi_objective_aggregation="sum_then_normalize",
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        reward_weights=torch.ones(1),
        reward_funcs=[None],
        reward_func_names=["given"],
        eos_token_ids=[1],
        ref_model=object(),
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        _logs={
            **{name: [] for name in ("prompt", "completion", "advantages", "images")},
            **{name: defaultdict(list) for name in ("rewards", "extra")},
        },
        _pending_extra_logs={},
        _pending_metrics={},
        max_completion_length=mask.shape[1],
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            next(given),
            torch.zeros_like(old),
            None,
        ),
        _calculate_rewards=lambda *_: torch.tensor(case["rewards"])[:, None],
    )
    prompts, answers = [[2]] * len(lengths), [[3] * length for length in lengths]
    texts = [""] * len(lengths)
    generated = {
        "rloo": (prompts, answers, texts),
        "grpo": (prompts, answers, None, texts, None, {}, None, None),
    }
    own._generate = lambda _: generated[case["algorithm"]]
    inputs = kind._generate_and_score_completions(own, [{"prompt": ""}] * len(lengths))
    advantages = inputs["advantages"]
    loss = kind._compute_loss(own, None, inputs)
    loss.backward()
    gradient = logprobs.grad.tolist()
    return {"loss": loss.item(), "gradient": gradient, "advantages": advantages.tolist()}


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        cases = json.load(file)
    print(json.dumps([{"dpo": dpo, "policy": policy}[case["function"]](case) for case in cases]))
