"""PPO by trlx, run by an interpreter that has trlx and its old libraries: `python -I FOLDER FD`.

FOLDER is this one, FD a connection to the process that starts it (`session.py`). It says hello, is
told where its plan is (`plan.py`), has responses scored and evaluations judged (`session.py`), and
ends when it is done or the other end is gone. It imports nothing of this project but the files
beside it, which are named so that they hide none of trlx's world.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import trlx
from transformers import AutoModelForCausalLM, AutoTokenizer
from trlx.data.configs import TRLConfig
from trlx.utils.modeling import logprobs_of_labels
from trlx_line import WorkerChannel
from trlx_trainer import HandedPpo, Stopped

LIBRARIES = ("trlx", "transformers", "tokenizers", "accelerate", "torch")
TOLERANCE = 1e-3  # nats: between two versions of transformers, 1e-6 was seen


def work(line: WorkerChannel) -> None:
    """Carry out the plan."""
    answer = line.ask(kind="hello", versions={name: version(name) for name in LIBRARIES})
    plan = json.loads(Path(answer["plan"]).read_text(encoding="utf-8"))
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


def rows(path: str) -> list[dict[str, Any]]:
    """Read JSON lines."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


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


@torch.no_grad()
def check(folder: str, expected: dict[str, Any]) -> None:
    """Check that model and tokenizer compute here as they do on the other side.

    Raises:
        ValueError: They are read in another way here.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, ids in zip(expected["texts"], expected["text_ids"], strict=True):
        own_ids = tokenizer(text, add_special_tokens=False).input_ids
        if own_ids != ids:
            raise ValueError(f"the tokenizer makes {own_ids} of {text!r}, where {ids} is expected")
    tokens = torch.tensor([expected["ids"]])
    logits = AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits
    logprobs = logprobs_of_labels(logits[:, :-1], tokens[:, 1:])[0]
    error = float((logprobs - torch.tensor(expected["logprobs"])).abs().max())
    if not error < TOLERANCE:
        raise ValueError(f"log-probabilities differ by {error:.3g} nats from those expected")


def main() -> None:
    """Work, and tell how it ended."""
    line = WorkerChannel(int(sys.argv[1]))
    end = {"kind": "done"}
    try:
        with suppress(Stopped):
            work(line)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        end = {"kind": "failed", "error": message, "traceback": traceback.format_exc()}
    sys.stdout.flush()  # once the other end knows, it ends this process
    line.send(**end)
    os._exit(0)  # libraries of that time leave threads behind


if __name__ == "__main__":
    main()
