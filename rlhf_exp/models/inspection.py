"""What can be known of a model without loading its weights: config, file headers, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rlhf_exp.errors import UserError
from rlhf_exp.models.pretrained import INDEX, WEIGHTS, is_encoder, shard_names, tensor_shapes


def check_weight_files(model: str | Path) -> None:
    """Check that a folder's weights are there and whole, by the headers of the files.

    Args:
        model: A folder; a hub id is not looked at.

    Raises:
        UserError: There are none, or a file of them is missing, damaged or cut off.
    """
    folder = Path(model)
    if folder.is_dir():
        for name in _weight_files(folder):
            tensor_shapes(folder / name)


def _weight_files(folder: Path) -> list[str]:
    """Return the names of the files that hold a model's weights."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        found = f"only pickled weights, {pickled[0]}" if pickled else "no weights"
        raise UserError(
            f"{folder}: {found}; a model's folder needs {WEIGHTS}, or {INDEX} and the files that "
            "it names, as save_pretrained writes them"
        )
    return shard_names(index)


def policy_problems(config: PreTrainedConfig) -> Iterator[str]:
    """Yield why a model of this config cannot be a policy."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or is_encoder(config):
        yield (
            f"a {config.model_type} is no causal language model, so it cannot write answers; give "
            "a decoder, such as a llama or gpt2"
        )
    elif config.is_encoder_decoder:
        yield f"a {config.model_type} has an encoder; give a model that is a decoder alone"


def vocabulary_problems(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Yield why a tokenizer does not fit a model's embedding.

    An embedding with more rows than the tokenizer has tokens fits.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is None:
        return
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= rows}
    if beyond:
        first = min(beyond)
        yield (
            f"the tokenizer has {len(tokenizer)} tokens and the embedding {rows} rows: token "
            f"{first}, {beyond[first]!r}, has none; give it one with "
            f"model.resize_token_embeddings({max(beyond) + 1}) and save the model, or give the "
            "tokenizer that the model was trained with"
        )
