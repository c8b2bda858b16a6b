"""What a model does to its head's outputs before it calls them logits: a scale and a soft cap.

Families differ in it, and their configs name it in their own ways (Granite divides by
`logits_scaling`, Cohere multiplies by `logit_scale`, MiniCPM3 divides the states, Gemma 2 caps).
So it is measured: the model's own forward is called with its trunk's output replaced by given
states, and the numbers that explain its logits are verified on other states.

S states, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from rlhf_exp.algo.logprobs import UNCHANGED, LogitTransform
from rlhf_exp.errors import UserError

STATES = 8
SMALLEST, LARGEST = 1e-6, 1e5
"""Sizes of the states that logits are measured at: the slope at 0, and beyond any cap."""

_NAMES = ("logit", "cap", "scal", "multiplier")
"""What a config field is named that holds a scale or a cap."""

_found: WeakKeyDictionary[PreTrainedModel, LogitTransform] = WeakKeyDictionary()


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Return what a causal language model does to its head's outputs; measured once a model.

    Raises:
        UserError: its logits are no scaled and capped outputs of its head.
    """
    if model not in _found:
        _found[model] = _measure(model)
    return _found[model]


@torch.no_grad()
def _measure(model: PreTrainedModel) -> LogitTransform:
    head = model.get_output_embeddings()
    device, dtype = head.weight.device, head.weight.dtype
    if device.type == "meta":  # a shape without weights computes nothing
        return UNCHANGED
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(STATES, head.weight.shape[1], generator=generator).to(device, dtype)
        for _ in range(2)
    )
    with torch.autocast(device.type, enabled=False):
        found = _explain(model, first)
        # Sizes at which the second states' logits lie below a cap, near it and beyond it.
        for size in (0.1, 1.0, 10.0, 100.0):
            logits, outputs = _logits(model, second * size), _outputs(model, second * size)
            expected = found.apply_(outputs.clone())
            # Rounding of the outputs counts where it is largest: before the cap.
            limit = 8 * torch.finfo(dtype).eps * expected.abs().max()
            error = (logits - expected).abs().max()
            if not error <= limit:
                raise UserError(
                    f"a {model.config.model_type!r} model computes its logits in a way that is "
                    f"neither its head's outputs nor a scale or a soft cap of them (they differ "
                    f"by {error:.3g}, where {limit:.1g} is rounding); use another model"
                )
    return found


def _explain(model: PreTrainedModel, states: Tensor) -> LogitTransform:
    """Return the scale and the cap by which logits of `states` [S, D] follow from outputs."""
    outputs, logits = _outputs(model, states), _logits(model, states)
    if torch.equal(logits, outputs):
        return UNCHANGED
    large, larger = (_logits(model, states * LARGEST * factor).abs().max() for factor in (1, 10))
    cap = _named(model, larger.item()) if larger < 1.5 * large else None
    size = 1.0
    while cap is not None and logits.abs().max() > 0.5 * cap and size > SMALLEST:
        size /= 4.0
        outputs, logits = _outputs(model, states * size), _logits(model, states * size)
    if cap is not None:
        logits = torch.atanh(logits.double() / cap) * cap
    outputs, logits = outputs.double().flatten(), logits.double().flatten()
    scale = (outputs @ logits / (outputs @ outputs)).item()
    return LogitTransform(_named(model, scale), cap)


def _named(model: PreTrainedModel, value: float) -> float:
    """Return the number in the config that a measured one must be, else the measured one."""
    numbers = [1.0]
    for name, number in model.config.get_text_config().to_dict().items():
        if type(number) in (int, float) and number and any(part in name for part in _NAMES):
            numbers += [float(number), 1.0 / number]
    nearest = min(numbers, key=lambda number: abs(number - value))
    tolerance = torch.finfo(model.get_output_embeddings().weight.dtype).eps
    return nearest if abs(nearest - value) <= 16 * tolerance * abs(value) else value


def _outputs(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return the head's outputs [S, V] float32."""
    return model.get_output_embeddings()(states[None])[0].float()


def _logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Return the logits [S, V] float32 that `model` makes of final `states` [S, D]."""
    tokens = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
    trunk: Any = model.base_model
    own = vars(trunk).get("forward")  # a wrapper's, perhaps
    output = _LenientOutput(last_hidden_state=states[None])
    trunk.forward = lambda *args, **kwargs: output
    try:
        return cast(Tensor, model(input_ids=tokens, use_cache=False).logits)[0].float()
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"a {model.config.model_type!r} model computes its logits of more than its trunk's "
            f"final states ({error}); use another model"
        ) from error
    finally:
        if own is None:
            del trunk.forward
        else:
            trunk.forward = own


class _LenientOutput(BaseModelOutputWithPast):
    """A trunk's output in which everything that a family may add (a router's logits) is `None`."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
