"""Sequence classifiers whose scores can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "</s>",
    "good",
    "bad",
    "Human",
    ":",
    "Assistant",
    "why",
]


def words_tokenizer(*, pair: bool = False, template: str | None = None) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if pair else {}
    if pair:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", eos_token="</s>", model_max_length=12, **marks
    )
    tokenizer.chat_template = template
    return tokenizer


def decoder(folder: Path, labels: int = 1, pad: int | None = None, **kind: str) -> Path:
    """A Llama whose blocks add nothing, so that a score is a function of the last token alone.

    Its embedding of token i is e_i; the norm divides by sqrt(1/11 + 1e-6) = 0.3015; the first
    label's weight for token i is i, the second's 3 i.
    """
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=11,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=12,
        num_labels=labels,
        pad_token_id=pad,
        rms_norm_eps=1e-6,
    )
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and "norm" not in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(11))
        row = torch.arange(11.0)
        model.score.weight.copy_(torch.stack([row, 3 * row, row])[:labels])
    model.save_pretrained(folder)
    words_tokenizer(template=kind.get("template")).save_pretrained(folder)
    return folder
