"""Dialogues to token ids and back (`Codec`), and training of a tokenizer for models from scratch.

Prompt and response are tokenized separately, so that the boundary between them is the same wherever
they are joined: in SFT, in the reward model, and after a prompt that the policy has continued.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from rlhf_exp.data.chat_template import ChatTemplate
from rlhf_exp.data.literal_text import LiteralText
from rlhf_exp.data.rows import History, Turn
from rlhf_exp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PromptFormat = Literal["hh", "chat_template", "plain"]
HH_STOP_STRINGS = ("Human:", "human:", "Assistant:", "assistant:")
_HH_GENERATION_PROMPT = "\n\nAssistant:"
_HH_MARKERS = {"human": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
_ANCHOR = "\n"
# Raise it when the same dialogues would be written differently by a chat template.
_RENDERING = 2
EOS = "<|endoftext|>"
PAD = "<|pad|>"
SMALLEST_VOCABULARY = 256 + 2  # every byte, and the two special tokens


class Codec:
    r"""A tokenizer with a prompt format: encodes prompts and responses, decodes ids.

    Formats: `hh` writes the markers of Anthropic's HH data (`\n\nHuman: ...\n\nAssistant:`);
    `chat_template` uses the tokenizer's template, checked against itself (`ChatTemplate`); `plain`
    writes the turns' texts, one a line, to be continued. A system turn is the template's own; with
    `hh` it begins the first human turn, before a blank line; with `plain` it is the first line.

    Attributes:
        eos_id: the token that ends a response in training: the chat template's own end of a turn,
            or else the end-of-sequence token.
        end_ids: all tokens that end a response when it is sampled, `eos_id` among them.
        pad_id: padding token (`eos_id` if the tokenizer has none).
        bos_id: beginning-of-sequence token, which begins every prompt, or `None`.
        vocab_size: number of tokens, added ones included.
        stop_strings: texts that end a response, besides the tokens of `end_ids`.
        warnings: what a user should know of the chat template, a sentence each.
        digest: sha256 of everything that determines the ids of a text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat,
        end_ids: Iterable[int] = (),
    ) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: the tokenizer.
            prompt_format: how a dialogue is written.
            end_ids: tokens that the model's own configs say end a text.

        Raises:
            UserError: the format is unknown, the tokenizer has no end-of-sequence token or no chat
                template that the format needs, or the template contradicts itself.
        """
        _check_tokenizer(tokenizer, prompt_format)
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format
        self.eos_id = int(tokenizer.eos_token_id)
        pad = tokenizer.pad_token_id
        self.pad_id = self.eos_id if pad is None else int(pad)
        self.vocab_size = len(tokenizer)
        self.stop_strings: tuple[str, ...] = HH_STOP_STRINGS if prompt_format == "hh" else ()
        self.warnings: list[str] = []
        self._template: ChatTemplate | None = None
        self._response_suffix = ""
        # A tokenizer that begins every text with a space gets a text before the response instead.
        self._anchor: list[int] = []
        lead = " "
        if prompt_format == "chat_template":
            self._template = ChatTemplate(tokenizer)
            lead = self._template.lead
            self.warnings += self._template.warnings
            self._take_end_of_turn(self._template.end)
        self.end_ids = frozenset({self.eos_id, int(tokenizer.eos_token_id), *end_ids})
        self._literal = LiteralText(tokenizer, self._written_tokens())
        self._prefix = self._prompt_prefix()
        self.bos_id = self._find_bos()
        adds_space = self._adds_space()
        self._response_prefix = "" if adds_space else lead
        if adds_space and not lead:
            self._anchor = self._encode([_ANCHOR], literal=True)[0]
        self.digest = self._digest()

    def render(self, history: History) -> str:
        """Return the text of a prompt, up to where the response begins."""
        if self.prompt_format == "hh":
            turns = _without_system_turn(history)
            return (
                "".join(_HH_MARKERS[turn.role] + turn.text for turn in turns)
                + _HH_GENERATION_PROMPT
            )
        if self.prompt_format == "plain":
            return "\n".join(turn.text for turn in history)
        assert self._template is not None, "made with the format"
        return self._template.prompt(history)

    def refusal(self, history: History, answers: Sequence[str] = ()) -> str | None:
        """Return why a dialogue with these answers cannot be written, or `None` if it can."""
        if self._template is None:
            return None
        reason = self._template.refusal(history, [answer.strip() for answer in answers])
        return None if reason is None else f"the chat template refuses it: {reason}"

    def encode_prompt(self, history: History) -> list[int]:
        """Return the ids of a prompt, with the beginning-of-sequence token if there is one."""
        return self.encode_prompts([history])[0]

    def encode_prompts(self, histories: Sequence[History]) -> list[list[int]]:
        """Return the ids of many prompts, faster than one by one."""
        if self._template is None:
            return self._encode_rendered([self.render(history) for history in histories])
        # Special tokens are those that the template writes, not those that a turn names.
        marked = [self._literal.mark_turns(history) for history in histories]
        plain = [row for row, history in enumerate(histories) if marked[row] == history]
        rendered = [self.render(histories[row]) for row in plain]
        encoded = dict(zip(plain, self._encode_rendered(rendered), strict=True))
        return [
            encoded[row] if row in encoded else self._literal.encode_marked(self.render(history))
            for row, history in enumerate(marked)
        ]

    def encode_decoded(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the ids of prompts given as texts that `decode` returned."""
        # The texts begin with that of the beginning-of-sequence token, if there is one.
        start = self.decode(self._prefix)
        return self._encode_rendered([prompt.removeprefix(start) for prompt in prompts])

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts to be continued as they are, with a prompt's first tokens."""
        return [self._prefix + ids for ids in self._encode(texts, literal=True)]

    def encode_response(self, text: str) -> list[int]:
        """Return the ids of a response, without an end-of-sequence token."""
        return self.encode_responses([text])[0]

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many responses, faster than one by one."""
        whole = [f"{self._response_prefix}{text.strip()}{self._response_suffix}" for text in texts]
        if not self._anchor:
            return self._encode(whole, literal=True)
        size = len(self._anchor)
        anchored = self._encode([_ANCHOR + text for text in whole], literal=True)
        return [
            ids[size:] if ids[:size] == self._anchor else self._encode([text], literal=True)[0]
            for text, ids in zip(whole, anchored, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens included, without any clean-up."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _encode(self, texts: Sequence[str], literal: bool) -> list[list[int]]:
        if not texts:
            return []
        if literal:
            return self._literal.encode(texts)
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def _written_tokens(self) -> list[str]:
        """Return the added tokens that the prompt format writes, special by name or not."""
        if self._template is None:
            return []
        written = self.render((Turn("human", "x"),)) + self._template.end
        return [name for name in self.tokenizer.get_added_vocab() if name in written]

    def _encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        literal = self.prompt_format != "chat_template"
        return [self._prefix + ids for ids in self._encode(texts, literal)]

    def _take_end_of_turn(self, end: str) -> None:
        """Let responses end as the template ends them: by its own token, or by its text."""
        tokenizer = self.tokenizer
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        known = {**tokenizer.get_added_vocab(), **special}
        # Some tokenizers have tokens of white space alone among these, which end nothing.
        found = [text for text in known if text.strip() and text in end]
        if found:
            token = min(found, key=lambda text: (end.index(text), -len(text)))
            self.eos_id, self._response_suffix = int(known[token]), end[: end.index(token)]
            return
        if end.strip():
            self.stop_strings = (end.strip(),)
        self.warnings.append(
            f"{tokenizer.name_or_path or 'the tokenizer'}: its chat template ends an answer with "
            f"{end!r}, which holds no token of its own; answers are taught to end with "
            f"{tokenizer.eos_token!r}"
        )

    def _prompt_prefix(self) -> list[int]:
        """Return the tokens before every text; a chat template writes its own."""
        if self.prompt_format == "chat_template":
            return []
        with_special = list(self.tokenizer("x")["input_ids"])
        bare = self._encode(["x"], literal=True)[0]
        starts = [i for i in range(len(with_special)) if with_special[i : i + len(bare)] == bare]
        return with_special[: starts[0]] if starts else []

    def _find_bos(self) -> int | None:
        if self.prompt_format != "chat_template":
            return self._prefix[0] if len(self._prefix) == 1 else None
        first = self.encode_prompt((Turn("human", "x"),))[0]
        return first if first == self.tokenizer.bos_token_id else None

    def _adds_space(self) -> bool:
        """Return whether the tokenizer itself puts a space before a text (SentencePiece)."""
        ids = self._encode([":"], literal=True)[0] + self._encode(["x"], literal=True)[0]
        return self.decode(ids).endswith(": x")

    def _digest(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # The calls in `__init__` have reset truncation and padding, which earlier calls leave.
            state = json.loads(backend.to_str())
        else:
            state = sorted(self.tokenizer.get_vocab().items())
        template = None if self._template is None else [_RENDERING, self._template.text]
        parts = [state, self.prompt_format, template, self.eos_id, self.pad_id, self._prefix]
        content = json.dumps([*parts, self._response_prefix], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


def _without_system_turn(history: History) -> History:
    """Return a history whose system turn begins the first human turn."""
    if history[0].role != "system":
        return history
    first = next(number for number, turn in enumerate(history) if turn.role == "human")
    joined = Turn("human", f"{history[0].text}\n\n{history[first].text}")
    return (*history[1:first], joined, *history[first + 1 :])


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> None:
    name = tokenizer.name_or_path or "the tokenizer"
    if prompt_format not in get_args(PromptFormat):
        valid = ", ".join(get_args(PromptFormat))
        raise UserError(f"data.format is {prompt_format!r}; valid values: {valid}")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{name} has no end-of-sequence token, so no response would ever end; set eos_token in "
            "its tokenizer_config.json, or choose another model.path"
        )
    if prompt_format == "chat_template" and not tokenizer.chat_template:
        raise UserError(
            f"{name} has no chat template, which data.format=chat_template needs; use "
            "data.format=hh or plain, or a model trained for chat"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer (Sennrich et al. 2016) of at most `vocab_size` tokens.

    It depends only on the texts and the size. Padding has its own token; there is no
    beginning-of-sequence token.

    Raises:
        UserError: `vocab_size` cannot hold the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"model.architecture.vocabulary is {vocab_size}; a byte-level tokenizer needs at least "
            f"{SMALLEST_VOCABULARY} (256 bytes and 2 special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
