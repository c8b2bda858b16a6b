"""PPO by trlx, for `rlhf_exp/engines/worker/`, in an interpreter with trlx and its libraries.

It has responses scored and evaluations judged by the process that has started it.
"""

from __future__ import annotations

from typing import Any

import torch
import trlx
from engine_line import WorkerChannel, rows
from engine_model import check
from trlx.data.configs import TRLConfig
from trlx_trainer import HandedPpo

LIBRARIES = ("trlx", "transformers", "tokenizers", "accelerate", "torch")


def work(line: WorkerChannel, plan: dict[str, Any]) -> None:
    """Carry out the plan."""
    torch.set_num_threads(plan["threads"])
    config = TRLConfig.from_dict(plan["config"])
    check(config.model.model_path, plan["check"])
    HandedPpo.line, HandedPpo.plan = line, plan
    known = {row["index"]: row["ids"] for row in rows(plan["prompts"])}
    order = [{"index": n, "ids": known[n], "evaluation": False} for n in plan["order"]]
    validation = [{**row, "evaluation": True} for row in rows(plan["validation"])]
    HandedPpo.prompts = [row["ids"] for row in validation]
    trlx.train(
        reward_fn=Reward(line),
        prompts={"rows": order, "sizes": plan["sizes"]},
        eval_prompts={"rows": validation, "sizes": [config.method.chunk_size]},
        config=config,
        stop_sequences=plan["stop_strings"],
    )


class Reward:
    """trlx's reward function: asks the other end of a line."""

    def __init__(self, line: WorkerChannel) -> None:
        self.line = line

    def __call__(
        self,
        samples: list[str],
        prompts: list[str],
        outputs: list[str],
        tokenizer: Any,  # noqa: ANN401 - of another transformers
        index: list[int],
        evaluation: list[bool],
    ) -> list[float]:
        """Have responses scored, as the tokens that trlx will train on.

        Returns:
            A number each.
        """
        ended = [text.endswith(tokenizer.eos_token) for text in outputs]
        texts = [text.removesuffix(tokenizer.eos_token) for text in outputs]
        ids = tokenizer(texts, add_special_tokens=False).input_ids
        answer = self.line.ask(
            kind="score", evaluation=evaluation[0], index=index, ids=ids, ended=ended
        )
        scores: list[float] = answer["scores"]
        return scores
