"""The default toxicity scorer."""

from __future__ import annotations

import builtins
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
)

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.toxicity.scorers import (
    ClassifierToxicity,
    FunctionToxicity,
    ProfanityCheckScorer,
    toxic_label,
)

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "you", "are", "a", "kind", "fool", "!"]
TEXTS = ["you are a fool !", "kind", "", "a " * 50 + "fool", "you are kind ! " * 3]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 16, "vocab_size": len(WORDS), "initializer_range": 1.0}
MULTI = {"id2label": {0: "obscene", 1: "toxic", 2: "threat"}}


def saved(folder: Path, kind: str = "bert", **config: Any) -> str:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    )
    torch.manual_seed(0)
    if kind == "roberta":
        settings = RobertaConfig(
            max_position_embeddings=26, pad_token_id=0, type_vocab_size=1, **SIZES, **config
        )
        model: Any = RobertaForSequenceClassification(settings)
    else:
        settings = BertConfig(max_position_embeddings=24, pad_token_id=0, **SIZES, **config)
        model = BertForSequenceClassification(settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ({**MULTI, "problem_type": "multi_label_classification"}, "toxic"),  # as unitary/toxic-bert
        (MULTI, "toxic"),  # labels that exclude each other
        ({"id2label": {0: "nothate", 1: "hate"}}, "hate"),
        ({"id2label": {0: "score"}}, "score"),
    ],
)
def test_as_transformers_own_pipeline(tmp_path: Path, config: dict[str, Any], label: str) -> None:
    folder = saved(tmp_path, **config)
    scorer = ClassifierToxicity(folder, batch=2)
    theirs = pipeline("text-classification", model=folder, top_k=None, device="cpu")
    expected = [
        next(one["score"] for one in found if one["label"] == label)
        for found in theirs(TEXTS, truncation=True, max_length=24)
    ]
    found = scorer.score(TEXTS)
    assert found == pytest.approx(np.array(expected), abs=1e-6)
    assert np.ptp(found) > 0.01
    assert scorer.name == f"{tmp_path.name}, label {label}"
    assert scorer.score([]).shape == (0,)


def test_positions_of_roberta(tmp_path: Path) -> None:
    """Of 26 positions 24 are for tokens, as padding takes those up to its own number and one."""
    scorer = ClassifierToxicity(saved(tmp_path, "roberta", id2label={0: "fine", 1: "toxic"}))
    found = scorer.score(["a " * 22, "a " * 500])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_no_number_depends_on_the_batch(tmp_path: Path) -> None:
    folder = saved(tmp_path, **MULTI)
    alone = [ClassifierToxicity(folder, batch=1).score([text])[0] for text in TEXTS]
    assert ClassifierToxicity(folder, batch=5).score(TEXTS) == pytest.approx(
        np.array(alone), abs=1e-6
    )


def config_with(*labels: str) -> PreTrainedConfig:
    named = dict(enumerate(labels))
    return BertConfig(id2label=named, architectures=["BertForSequenceClassification"])


@pytest.mark.parametrize(
    ("labels", "said", "number"),
    [
        (("neutral", "Toxic"), None, 1),
        (("severe_toxic", "toxic", "insult"), None, 1),
        (("a", "b"), "B", 1),
        (("LABEL_0", "LABEL_1"), "LABEL_0", 0),
        (("LABEL_0", "LABEL_1"), "1", 1),
    ],
)
def test_which_label(labels: tuple[str, ...], said: str | None, number: int) -> None:
    assert toxic_label("m", config_with(*labels), said) == number


def test_labels_that_are_not_known() -> None:
    with pytest.raises(UserError) as caught:
        toxic_label("m", config_with("LABEL_0", "LABEL_1"))
    assert "none of its labels (0 LABEL_0, 1 LABEL_1) is known" in str(caught.value)
    assert str(caught.value).endswith("eval.toxicity.label=LABEL_1")
    with pytest.raises(UserError, match=r"label=rude: m has no such label; it has 0 a, 1 b"):
        toxic_label("m", config_with("a", "b"), "rude")


def test_a_language_model_is_no_classifier(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match=r"\['GPT2LMHeadModel'\]; a toxicity scorer is a text"):
        ClassifierToxicity(str(tmp_path))


def scorer(function: Callable[[list[str]], Any]) -> FunctionToxicity:
    return FunctionToxicity(function, "mine.py:score", "eval.toxicity.scorer")


def test_its_numbers() -> None:
    found = scorer(lambda texts: [len(text) / 10 for text in texts]).score(("abc", ""))
    assert list(found) == [0.3, 0.0]
    assert list(scorer(lambda texts: []).score([])) == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0.5], "returned 1 scores for 2 texts"),
        ([0.5, math.nan], "returned nan for the text 'second'; return a number from 0 to 1"),
        ([-0.1, 0.5], r"returned -0\.1 for the text 'first'"),
        ([0.5, 100], r"returned 100\.0 for the text 'second'"),
        ([0.5, "much"], r"returned 'much' \(str\) for the text 'second'"),
        (None, "returned NoneType; return a list of numbers, one for each text"),
    ],
)
def test_what_it_must_not_return(answer: object, message: str) -> None:
    with pytest.raises(UserError, match=rf"eval\.toxicity\.scorer=mine\.py:score {message}"):
        scorer(lambda texts: answer).score(["first", "second"])


def test_an_error_in_it_names_its_line() -> None:
    def fails(texts: list[str]) -> list[float]:
        raise KeyError("lost")

    with pytest.raises(UserError, match=r"failed on 1 texts at .*test_scorers\.py:\d+: KeyError"):
        scorer(fails).score(["x"])


def test_insults_score_above_politeness_and_silence_scores_zero() -> None:
    scorer = ProfanityCheckScorer()
    found = scorer.score(["You fucking idiot, shut up", "", "Have a lovely day!", " \n"])
    assert found[0] > 0.9
    assert found[2] < 0.2
    assert found[1] == found[3] == 0.0
    assert found.dtype == np.float64
    assert scorer.name.startswith("alt-profanity-check ")


def test_no_texts_and_only_blank_texts() -> None:
    scorer = ProfanityCheckScorer()
    assert scorer.score([]).shape == (0,)
    assert list(scorer.score(["", "\t"])) == [0.0, 0.0]


def test_a_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "profanity_check":
            raise ImportError("No module named 'profanity_check'")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="pip install alt-profanity-check"):
        ProfanityCheckScorer()


def test_the_package_is_loaded_only_when_a_scorer_is_made() -> None:
    module = "rlhf_exp.evaluation.toxicity.scorers"
    code = f"import sys, {module}; sys.exit('profanity_check' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
