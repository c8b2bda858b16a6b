"""The scorer of responses: its protocol, and scoring by a reward model.

`score_samples` scores the sampler's responses. A reward model over the policy's frozen trunk
(`SharedTrunkScorer`) then reads the states that the sampler has kept.

A reward model with the policy's tokenizer reads the token ids as they were sampled; one with
another tokenizer reads the text, and one with another chat template reads the dialogue as that
template writes it (`PromptRows`). It reads the prompt and the response's content, ended by the
end-of-sequence token whether the response ended by that token, by a stop string or not at all: the
reward model was trained on ended responses only, and `missing_eos_penalty` says how an unfinished
one is punished, not the model's extrapolation.

B rows, S tokens of a row, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf_exp.batch import Samples
from rlhf_exp.data.rows import History, Row, reward_fields
from rlhf_exp.data.tokenized import RaggedArray
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.models.frozen_trunk import Branch
from rlhf_exp.models.reward_model import RewardModel, scores_from_branch


class Scorer(Protocol):
    """Gives each response a number; higher is better."""

    def __call__(self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        """Score responses.

        Args:
            tokens: [B, S] int64, prompt and response, right-padded.
            prompt_lengths: [B] int64.
            content_lengths: [B] int64, response tokens without what ended the response.

        Returns:
            [B] float32 on the CPU.
        """


class PromptRows:
    """The rows that prompts were written from, by the prompts' token ids.

    Scorers are handed token ids, in which a policy's chat template and a cut have left their marks
    and of which a row's other fields are no part.
    """

    def __init__(self) -> None:
        self._rows: dict[bytes, Row] = {}
        self._unclear: dict[bytes, tuple[Row, Row]] = {}

    def add(self, prompts: RaggedArray, rows: Iterable[Row]) -> None:
        """Remember the row of each prompt."""
        for ids, row in zip(prompts, rows, strict=True):
            key = np.asarray(ids, np.int32).tobytes()
            known = self._rows.get(key)
            if known is not None and reward_fields(known) != reward_fields(row):
                self._unclear[key] = (known, row)
            self._rows[key] = row

    def histories(self, tokens: Tensor, prompt_lengths: Tensor) -> list[History]:
        """Return the dialogues of the prompts at the beginning of `tokens` [B, S]."""
        return [self._rows[key].history for key in _prompt_keys(tokens, prompt_lengths)]

    def fields(self, tokens: Tensor, prompt_lengths: Tensor) -> list[dict[str, object]]:
        """Return what a reward sees of the rows of the prompts at the beginning of `tokens` [B, S].

        Raises:
            UserError: two rows with different fields have become one prompt.
        """
        keys = _prompt_keys(tokens, prompt_lengths)
        for key in keys:
            if key in self._unclear:
                first, second = self._unclear[key]
                raise UserError(
                    f"{first.origin} and {second.origin} have different fields, and the model "
                    "reads the same prompt: longer prompts lose their start. The reward asks for "
                    "the row, and nothing says which one it is; raise seq_length, or take one of "
                    "the two out"
                )
        return [reward_fields(self._rows[key]) for key in keys]


def _prompt_keys(tokens: Tensor, prompt_lengths: Tensor) -> list[bytes]:
    rows = zip(tokens.cpu().numpy(), prompt_lengths.tolist(), strict=True)
    return [np.asarray(row[:length], np.int32).tobytes() for row, length in rows]


class ModelScorer:
    """Scores by a reward model.

    Attributes:
        rows: Of the prompts to be scored; their dialogues are read where the reward model has a
            chat template of its own.

    Args:
        model: The reward model, where it computes.
        codec: The policy's codec.
        reward_codec: The reward model's own codec if it differs from the policy's.
        world: Device and precision.
        batch: Rows of one forward.
        seq_length: Most tokens that the reward model reads; longer rows lose their start.
        device: Where the reward model computes; by default the process's own device.
    """

    def __init__(
        self,
        model: RewardModel,
        codec: Codec,
        reward_codec: Codec | None,
        world: World,
        batch: int,
        seq_length: int,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or world.device
        self.model = model.eval().requires_grad_(False)
        self.half = world.setup.precision == "bfloat16"
        self.codec, self.reward_codec, self.rows = codec, reward_codec, PromptRows()
        self.batch, self.seq_length = batch, seq_length

    def autocast(self) -> torch.autocast:
        """Mixed precision on the reward model's device, where the run has it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor) -> Tensor:
        """See `Scorer`."""
        if self.reward_codec is None:
            whole, lengths = ended(tokens, prompt_lengths + content_lengths, self.codec.eos_id)
        elif self.reward_codec.prompt_format == "chat_template":
            histories = self.rows.histories(tokens, prompt_lengths)
            answers = contents_of(tokens, prompt_lengths, content_lengths, self.codec)
            prompts = self.reward_codec.encode_prompts(histories)
            responses = self.reward_codec.encode_responses(answers)
            eos = self.reward_codec.eos_id
            joined = [[*p, *r, eos] for p, r in zip(prompts, responses, strict=True)]
            whole, lengths = _padded(joined, self.reward_codec.pad_id)
        else:
            rows = [
                row[:length].tolist()
                for row, length in zip(tokens, prompt_lengths + content_lengths, strict=True)
            ]
            # Without the policy's special tokens, which mean nothing to another tokenizer.
            texts = self.codec.tokenizer.batch_decode(
                rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            whole, lengths = _encode(texts, self.reward_codec)
        return self._forward(whole, lengths)

    def _forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        scores = torch.empty(len(tokens), dtype=torch.float32)
        # Rows of like length together: a batch costs as much as its longest row.
        order = torch.argsort(lengths, stable=True)
        for part in order.split(self.batch):
            rows, sizes = _crop_left(tokens[part], lengths[part], self.seq_length)
            with self.autocast():
                values = self.model.scores(rows.to(self.device), sizes.to(self.device))
            scores[part] = values.float().cpu()
        return scores


class SharedTrunkScorer(ModelScorer):
    """Scores by a reward model over the policy's frozen trunk.

    Token ids are scored as by any reward model with the policy's tokenizer.

    Args:
        model: The reward model.
        branch: Its blocks above that trunk.
        codec: The policy's codec, and the reward model's.
        world: Device and precision.
        batch: Rows of one forward.
        seq_length: Most tokens that the reward model reads of token ids.
    """

    def __init__(
        self,
        model: RewardModel,
        branch: Branch,
        codec: Codec,
        world: World,
        batch: int,
        seq_length: int,
    ) -> None:
        super().__init__(model, codec, None, world, batch, seq_length)
        self.branch = branch

    @torch.no_grad()
    def of_states(self, states: Tensor, closing: Tensor, ends: Tensor) -> Tensor:
        """Return scores [B] float32 on the CPU.

        Args:
            states: [B, S, D] that leave the trunk, of prompts and responses.
            closing: [B, D] the same of an end-of-sequence token after the content.
            ends: [B] int64, the position of that token.
        """
        scores = torch.empty(len(states), dtype=torch.float32)
        for part in torch.argsort(ends.cpu(), stable=True).split(self.batch):
            last = ends[part]
            # A response may have no token after its content.
            width = int(last.max()) + 1
            rows = states.new_zeros(len(part), width, states.shape[2])
            known = min(width, states.shape[1])
            rows[:, :known] = states[part, :known]
            rows[torch.arange(len(part)), last] = closing[part]
            with self.autocast():
                values = scores_from_branch(self.model, self.branch, rows, last)
            scores[part] = values.float().cpu()
        return scores


def score_samples(scorer: Scorer, samples: Samples) -> Tensor:
    """Return the scores [B] float32 of sampled responses."""
    states, closing = samples.states, samples.closing
    if isinstance(scorer, SharedTrunkScorer) and states is not None and closing is not None:
        ends = samples.prompt_lengths + samples.content_lengths
        if int(ends.max()) < scorer.seq_length:  # else rows lose their start first
            return scorer.of_states(states, closing, ends)
    return scorer(samples.tokens.cpu(), samples.prompt_lengths.cpu(), samples.content_lengths.cpu())


def ended(tokens: Tensor, lengths: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """Put the end-of-sequence token after `lengths` tokens of each row.

    Returns:
        Tokens [B, max(lengths) + 1] and lengths [B]; what stands beyond a row's length is padding.
    """
    width = int(lengths.max()) + 1
    whole = torch.full((len(tokens), width), eos_id, dtype=tokens.dtype)
    inside = torch.arange(width) < lengths[:, None]
    source = tokens[:, :width].cpu()
    whole[:, : source.shape[1]] = torch.where(
        inside[:, : source.shape[1]], source, whole[:, : source.shape[1]]
    )
    return whole, lengths + 1


def texts_of(
    tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor, codec: Codec
) -> tuple[list[str], list[str]]:
    """Return the texts of prompts and of responses without their white space at the ends."""
    prompts, responses = [], []
    for row, prompt, content in zip(
        tokens.tolist(), prompt_lengths.tolist(), content_lengths.tolist(), strict=True
    ):
        prompts.append(codec.decode(row[:prompt]))
        responses.append(codec.decode(row[prompt : prompt + content]).strip())
    return prompts, responses


def contents_of(
    tokens: Tensor, prompt_lengths: Tensor, content_lengths: Tensor, codec: Codec
) -> list[str]:
    """Return the responses' texts, without special tokens, which mean nothing to others."""
    rows = zip(tokens.tolist(), prompt_lengths.tolist(), content_lengths.tolist(), strict=True)
    texts: list[str] = codec.tokenizer.batch_decode(
        [row[start : start + length] for row, start, length in rows],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return texts


def score_shared(
    scorer: Scorer,
    tokens: Tensor,
    prompt_lengths: Tensor,
    content_lengths: Tensor,
    world: World,
) -> Tensor:
    """Return the scores [B] float32 of the same B rows in every process, each scoring its share."""
    share = world.share(len(tokens))
    rows = torch.from_numpy(share.rows)
    scores = scorer(tokens[rows], prompt_lengths[rows], content_lengths[rows])
    return world.gather(scores).cpu()[: len(tokens)]


def _encode(texts: list[str], codec: Codec) -> tuple[Tensor, Tensor]:
    """Return the texts as a reward model's own tokenizer begins them, each ended by its eos."""
    found = codec.tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
    rows = [[*(ids[:-1] if ids[-1:] == [codec.eos_id] else ids), codec.eos_id] for ids in found]
    return _padded(rows, codec.pad_id)


def _padded(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return rows of ids as tokens [B, S], right-padded, and their lengths [B]."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), pad_id)
    for line, row in enumerate(rows):
        tokens[line, : len(row)] = torch.tensor(row)
    return tokens, lengths


def _crop_left(tokens: Tensor, lengths: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Trim a batch to its longest row, and each row on the left to `room` tokens."""
    longest = int(lengths.max())
    if longest <= room:
        return tokens[:, :longest], lengths
    shift = (lengths - room).clamp(min=0)
    index = (torch.arange(room) + shift[:, None]).clamp(max=tokens.shape[1] - 1)
    return tokens.gather(1, index), lengths.clamp(max=room)
