"""Judges that score each answer: by this project's reward models, or by sequence classifiers.

A sequence classifier comes from the hub or a folder and may be of any family that
`AutoModelForSequenceClassification` knows, decoder or encoder. One label is the reward; of two, the
second is the good one, and its log-odds are the reward.

Legend: N answers, B rows of a batch, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import special
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_exp.data.chat_template import TemplateRefusal, render_messages
from rlhf_exp.data.literal_text import LiteralText
from rlhf_exp.data.parsing import parse_prompt, split_turns
from rlhf_exp.data.rows import History
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.judges.protocol import AnswerPair, Verdict
from rlhf_exp.evaluation.statistics import TIE_BAND, outcome_signs, paired
from rlhf_exp.models.pretrained import Attention, load_config, load_pretrained, load_tokenizer
from rlhf_exp.models.reward_model import RewardModel

Score = Callable[[Sequence[str], Sequence[str]], NDArray[np.float64]]
"""(N prompts, N answers) -> [N] scores, of which the difference of two is a log-odds."""
_ROLES = {"System": "system", "Human": "user", "Assistant": "assistant", "": "user"}
# Tokenizers that know no limit give a number of this size.
_NO_LIMIT = 1_000_000


class RewardJudge:
    """Prefers the answer with the higher score, unless the two are too close.

    Attributes:
        name: the judge's name in reports.

    Args:
        score: a reward model, as a function of texts.
        tie_band: Bradley-Terry probabilities that count as a tie.
    """

    def __init__(self, name: str, score: Score, tie_band: tuple[float, float] = TIE_BAND) -> None:
        self.name = name
        self.score, self.tie_band = score, tie_band

    def verdicts(self, pairs: Sequence[AnswerPair]) -> list[Verdict]:
        """See `Judge`."""
        prompts = [pair.prompt for pair in pairs] * 2
        answers = [pair.answer_a for pair in pairs] + [pair.answer_b for pair in pairs]
        scores = self.score(prompts, answers)
        return score_verdicts(scores[: len(pairs)], scores[len(pairs) :], self.tie_band)


def score_verdicts(
    scores_a: ArrayLike, scores_b: ArrayLike, tie_band: tuple[float, float] = TIE_BAND
) -> list[Verdict]:
    """Return the verdicts that follow from scores [N] of both answers; see `outcome_signs`.

    Raises:
        ValueError: unequal lengths, or a score that is not finite.
    """
    a, b = paired(scores_a, scores_b)
    signs, chances = outcome_signs(a, b, tie_band), special.expit(b - a)
    return [Verdict(int(s), probability=float(p)) for s, p in zip(signs, chances, strict=True)]


class RewardModelTextScorer:
    """Scores texts by a reward model that the reward stage wrote.

    It reads prompt and answer, ended by the end-of-sequence token, as in training.

    Attributes:
        cut: rows so far that were too long and lost their beginning.

    Args:
        model: the reward model.
        codec: its tokenizer and prompt format.
        seq_length: most tokens of a row; by default the length of the model's context.
        device: device to compute on.
        batch: rows of one forward pass.
    """

    def __init__(
        self,
        model: RewardModel,
        codec: Codec,
        seq_length: int | None = None,
        device: torch.device | str = "cpu",
        batch: int = 16,
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.codec, self.device, self.batch, self.cut = codec, device, batch, 0
        context = getattr(model.trunk.config, "max_position_embeddings", None)
        self.seq_length = min(length for length in (seq_length, context, 2**31) if length)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> NDArray[np.float64]:
        """Return the rewards [N] of N answers."""
        heads = self.codec.encode_prompts([history_of(prompt) for prompt in prompts])
        tails = self.codec.encode_responses(answers)
        rows = [[*head, *tail, self.codec.eos_id] for head, tail in zip(heads, tails, strict=True)]
        self.cut += sum(len(row) > self.seq_length for row in rows)
        rows = [row[-self.seq_length :] for row in rows]
        scores = np.zeros(len(rows))
        # Rows of like length together: a batch costs as much as its longest row.
        order = np.argsort([len(row) for row in rows], kind="stable")
        for start in range(0, len(rows), self.batch):
            part = order[start : start + self.batch]
            scores[part] = self._forward([rows[number] for number in part])
        return scores

    def _forward(self, rows: list[list[int]]) -> NDArray[np.float64]:
        width = max(len(row) for row in rows)
        tokens = [row + [self.codec.pad_id] * (width - len(row)) for row in rows]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        rewards = self.model.scores(torch.tensor(tokens, device=self.device), lengths)
        values: NDArray[np.float64] = rewards.double().cpu().numpy()
        return values


def history_of(prompt: str) -> History:
    """Return the dialogue in a prompt's text.

    Raises:
        UserError: it has no turn to answer.
    """
    try:
        return parse_prompt(prompt)
    except ValueError as error:
        raise UserError(f"no prompt for a judge: {error}: {prompt[:80]!r}") from error


class ClassifierTextScorer:
    """Scores texts by a sequence classifier.

    It reads the dialogue in the tokenizer's chat template, if it has one; otherwise, if the
    tokenizer joins two texts (`[CLS] ... [SEP] ... [SEP]`), prompt and answer as these; otherwise
    prompt and answer as one text. A row that is too long loses its beginning.

    Attributes:
        name: folder's name or hub id.
        cut: rows so far that were too long.

    Args:
        path: a folder, or a hub id.
        revision: revision of a hub id.
        device: device to compute on.
        dtype: number format of the weights.
        attention: as for `load_causal_lm`.
        batch: rows of one forward pass.

    Raises:
        UserError: there is no model, or it has three labels or more.
    """

    def __init__(
        self,
        path: str | Path,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        attention: Attention = "sdpa",
        batch: int = 16,
    ) -> None:
        config = check_classifier(path, revision)
        self.name = Path(path).name if Path(path).is_dir() else str(path)
        self.tokenizer = load_tokenizer(path, revision)
        self._literal = LiteralText(self.tokenizer)
        kind: Any = AutoModelForSequenceClassification
        self.model = load_pretrained(kind, path, config, revision, dtype, attention).eval()
        torch.nn.Module.to(self.model, device)
        self.batch, self.cut = batch, 0
        self._longest_input = _longest_input(self.model, self.tokenizer)

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> NDArray[np.float64]:
        """Return the rewards [N] of N answers."""
        rows = [self._encode(*texts) for texts in zip(prompts, answers, strict=True)]
        scores = np.zeros(len(rows))
        # Rows of like length together: a batch costs as much as its longest row.
        order = np.argsort([len(row["input_ids"]) for row in rows], kind="stable")
        for start in range(0, len(rows), self.batch):
            part = order[start : start + self.batch]
            scores[part] = self._forward([rows[number] for number in part])
        return scores

    def _encode(self, prompt: str, answer: str) -> dict[str, list[int]]:
        """Return the model's input for one answer: ids, and token types if it has any."""
        tokenizer, answer = self.tokenizer, answer.strip()
        pair = tokenizer.cls_token is not None and tokenizer.sep_token is not None
        encoding: Any
        if tokenizer.chat_template:
            # The template writes its own special tokens; those that a text names are text.
            marked = self._literal.mark(prompt), self._literal.mark(answer)
            text = rendered_dialogue(tokenizer, self.name, *marked)
            encoding = {"input_ids": self._literal.encode_marked(text)}
        elif pair:
            # Either text is cut where both are too long, so that the marks between them stay.
            tokenizer.truncation_side = "left"
            texts = (prompt.strip(), answer)
            options: dict[str, Any] = {"split_special_tokens": True, "verbose": False}
            uncut = len(tokenizer(*texts, **options)["input_ids"])
            self.cut += uncut > self._longest_input
            options |= {"truncation": True, "max_length": self._longest_input}
            encoding = tokenizer(*texts, **options)
        else:
            text = _plain_dialogue(prompt, answer)
            encoding = tokenizer(text, split_special_tokens=True, verbose=False)
        row = {
            name: list(encoding[name])
            for name in ("input_ids", "token_type_ids")
            if name in encoding
        }
        if len(row["input_ids"]) > self._longest_input:
            self.cut += 1
            row = {name: values[-self._longest_input :] for name, values in row.items()}
        return row

    @torch.no_grad()
    def _forward(self, rows: list[dict[str, list[int]]]) -> NDArray[np.float64]:
        lengths = [len(row["input_ids"]) for row in rows]
        padding = self._padding(rows)
        inputs = {
            name: _padded([row[name] for row in rows], padding if name == "input_ids" else 0)
            for name in rows[0]
        }
        inputs["attention_mask"] = _padded([[1] * length for length in lengths], 0)
        config = self.model.config
        pad_token_id, config.pad_token_id = config.pad_token_id, padding
        try:
            device = self.model.device
            logits = self.model(
                **{name: rows_of_input.to(device) for name, rows_of_input in inputs.items()}
            ).logits
        finally:
            config.pad_token_id = pad_token_id
        values = logits.float().cpu().double()
        scores = values[:, 0] if values.shape[1] == 1 else values[:, 1] - values[:, 0]
        if not torch.isfinite(scores).all():
            raise UserError(f"{self.name}: a reward is not finite; try another number format")
        return cast(NDArray[np.float64], scores.numpy())

    def _padding(self, rows: list[dict[str, list[int]]]) -> int:
        """Return the id to pad rows with.

        Decoders read the last token that is not padding, so without an id of its own the model gets
        one that no row ends with.
        """
        pad_token_id = self.model.config.pad_token_id
        if pad_token_id is not None:
            return int(pad_token_id)
        last = {row["input_ids"][-1] for row in rows}
        return next(number for number in range(len(last) + 1) if number not in last)


def check_classifier(path: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """Return the config of a classifier, checked without loading its weights.

    Raises:
        UserError: there is no model, it is no sequence classifier, or has three labels or more.
    """
    config = load_config(path, revision)
    labels = int(config.num_labels or 0)
    named = any(str(name).endswith("SequenceClassification") for name in config.architectures or ())
    if not named or labels > 2:
        actual = f"{labels} labels" if named else f"architecture {config.architectures}"
        raise UserError(
            f"{path}: {actual}; a judge is a sequence classifier with one label (the reward) or "
            "two (bad, good)"
        )
    return config


def _longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    limits = [_positions(model), tokenizer.model_max_length]
    return min(int(limit) for limit in (*limits, _NO_LIMIT) if limit)


def _positions(model: PreTrainedModel) -> int | None:
    """Return the longest row that a model has positions for; `None` if nothing limits it."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # Some encoders begin to count after the padding token's id.
            return module.num_embeddings - (
                0 if module.padding_idx is None else module.padding_idx + 1
            )
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return limit


def rendered_dialogue(
    tokenizer: PreTrainedTokenizerBase, name: str, prompt: str, answer: str
) -> str:
    """Return a dialogue in a judge's chat template.

    Raises:
        UserError: the template refuses it.
    """
    try:
        return render_messages(tokenizer, messages_of(prompt, answer))
    except TemplateRefusal as error:
        raise UserError(
            f"{name}: its chat template refuses the dialogue {prompt[:80]!r}: {error}"
        ) from error


def messages_of(prompt: str, answer: str) -> list[dict[str, str]]:
    """Return the dialogue as messages.

    Turns of one speaker in a row, which many templates refuse, are joined.
    """
    turns = [(_ROLES[role], text) for role, text in split_turns(prompt)]
    messages: list[dict[str, str]] = []
    for role, text in [*turns, ("assistant", answer)]:
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
        else:
            messages.append({"role": role, "content": text})
    return messages


def _plain_dialogue(prompt: str, answer: str) -> str:
    """Return the dialogue as it is written: after HH's cue on the same line, else on a new one."""
    prompt = prompt.strip()
    return f"{prompt} {answer}" if prompt.endswith("Assistant:") else f"{prompt}\n\n{answer}"


def _padded(rows: list[list[int]], filler: int) -> Tensor:
    """Return the rows as a tensor [B, S], padded on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])
