"""The peer for whole iterations: TRL's PPO trainer, untouched, measured from outside.

usage: python -m side_by_side.trl_worker SETTING_AS_JSON        (run by `benchmarks/ppo.py`, in the
environment that `benchmarks/setup_trl.sh` makes)

How it is measured: a callback holds the trainer's loop at the end of each iteration until the
harness asks for the next; `generate` of the policy and the first training forward mark where
sampling ends and updating begins.

How it is set: `gradient_accumulation_steps=1` with the whole iteration as the per-device batch.
TRL steps its optimizer every `gradient_accumulation_steps` minibatches, so only this gives one step
for each minibatch. No gradient checkpointing, and padding that is never sampled.
"""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    PreTrainedModel,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from side_by_side.protocol import Line, Reading, peak_bytes, resident_bytes
from side_by_side.reward import counted_share
from side_by_side.setting import Setting


class CountedReward(nn.Module):
    """`reward.counted_share` in the shape of a sequence classification model, as TRL expects."""

    base_model_prefix = "backbone"

    def __init__(self, setting: Setting) -> None:
        """Count by the lengths and the vocabulary of `setting`."""
        super().__init__()
        shape = setting.shape

        def backbone(input_ids: Tensor, **_: Any) -> SimpleNamespace:  # noqa: ANN401
            share = counted_share(input_ids, setting.prompt_tokens, shape.vocabulary)
            return SimpleNamespace(hidden_states=(share.unsqueeze(-1),))

        self.backbone = backbone
        self.score = nn.Identity()


class Stopwatch(TrainerCallback):
    """Holds the training loop between iterations and reports each of them.

    Attributes:
        marks: seconds (`time.perf_counter`) at the events of the iteration under way.
    """

    def __init__(self, line: Line, setting: Setting, started_bytes: int) -> None:
        """Report over `line`; `started_bytes` was resident before any model was loaded."""
        self.line, self.setting, self.started_bytes = line, setting, started_bytes
        self.marks: dict[str, float] = {}
        self.updates = self.tokens = 0
        self.reward: float | None = None

    def attach(self, trainer: PPOTrainer) -> None:
        """Watch the trainer's policy, model and optimizer."""
        generate = trainer.policy_model.generate

        def timed(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - passes through
            output = generate(*args, **kwargs)
            self.tokens += output.sequences[:, self.setting.prompt_tokens :].numel()
            self.marks["sampled"] = time.perf_counter()
            return output

        trainer.policy_model.generate = timed
        trainer.model.register_forward_pre_hook(lambda *_: self._trains())
        trainer.optimizer.optimizer.register_step_post_hook(lambda *_: self._stepped())

    def _trains(self) -> None:
        self.marks.setdefault("scored", time.perf_counter())

    def _stepped(self) -> None:
        self.updates += 1

    def _begin(self) -> None:
        self.line.wait()
        self.marks, self.updates, self.tokens = {"begin": time.perf_counter()}, 0, 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Wait for the first iteration to be asked for."""
        self.line.ready(self.started_bytes)
        self._begin()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:  # noqa: ANN401
        """Remember the iteration's mean score."""
        self.reward = (logs or {}).get("objective/scores", self.reward)

    def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Report the iteration and wait for the next to be asked for."""
        end, marks = time.perf_counter(), self.marks
        seconds = {
            "sample": marks["sampled"] - marks["begin"],
            "score": marks["scored"] - marks["sampled"],
            "update": end - marks["scored"],
            "total": end - marks["begin"],
        }
        samples = self.setting.rollouts
        self.line.answer(
            Reading(seconds, peak_bytes(), samples, self.tokens, self.updates, self.reward)
        )
        self._begin()


def freeze_trunk(model: PreTrainedModel, trained_blocks: int | None) -> None:
    """Leave the last blocks, the final norm and the head trainable (`None`: everything)."""
    if trained_blocks is None:
        return
    trunk = model.gpt_neox
    trunk.embed_in.requires_grad_(False)
    for block in trunk.layers[: len(trunk.layers) - trained_blocks]:
        block.requires_grad_(False)


def trainer_config(setting: Setting) -> PPOConfig:
    """Return TRL's options for the setting."""
    return PPOConfig(
        output_dir=str(setting.path("trl_output")),
        use_cpu=True,
        bf16=setting.precision == "bfloat16",
        gradient_checkpointing=False,
        per_device_train_batch_size=setting.rollouts,
        gradient_accumulation_steps=1,
        num_mini_batches=setting.minibatches,
        num_ppo_epochs=setting.epochs,
        total_episodes=setting.rollouts * 1_000_000,  # the harness ends it
        local_rollout_forward_batch_size=setting.rollouts,
        response_length=setting.response_tokens,
        temperature=1.0,
        stop_token_id=None,
        learning_rate=setting.lr,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=setting.beta2,
        weight_decay=0.0,
        kl_coef=setting.kl_coef,
        cliprange=setting.clip_range,
        cliprange_value=setting.clip_range,
        vf_coef=setting.vf_coef,
        gamma=setting.gamma,
        lam=setting.lam,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=setting.seed,
    )


def main() -> None:
    """Train until the harness wants no more."""
    setting = Setting.from_json(sys.argv[1])
    line = Line()
    stopwatch = Stopwatch(line, setting, resident_bytes())
    policy = GPTNeoXForCausalLM.from_pretrained(setting.path("policy"), dtype=torch.float32)
    classifier = GPTNeoXForSequenceClassification
    value = classifier.from_pretrained(setting.path("value"), dtype=torch.float32)
    reward: nn.Module = (
        CountedReward(setting)
        if setting.counted_reward
        else classifier.from_pretrained(setting.path("reward"), dtype=torch.float32)
    )
    for model in (policy, value):
        freeze_trunk(model, setting.trained_blocks)
    prompts = np.load(setting.path("prompts.npy"))
    padding = SimpleNamespace(pad_token_id=setting.unused_token, eos_token_id=setting.unused_token)
    trainer = PPOTrainer(
        args=trainer_config(setting),
        processing_class=padding,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[:1].tolist()}),
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
        callbacks=[stopwatch],
    )
    stopwatch.attach(trainer)
    trainer.train()


if __name__ == "__main__":
    main()
