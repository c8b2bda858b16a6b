"""What a study tries next: Optuna's distributions and its TPE sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_exp.search.journal import imported
from rlhf_exp.store.fingerprint import key_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

DIGITS = 4


def distribution_of(
    ends: tuple[float, float] | None,
    log: bool,
    step: float | None,
    choices: list[float] | None,
    whole: bool,
) -> BaseDistribution:
    """Return the distribution of one hyperparameter.

    Args:
        ends: Smallest and largest value.
        log: Whether the scale is logarithmic.
        step: Distance of the values.
        choices: The values themselves.
        whole: Whether they are whole numbers.
    """
    kinds = imported().distributions
    if choices is not None:
        listed = [int(one) if whole else one for one in choices]
        return kinds.CategoricalDistribution(listed)
    assert ends is not None
    if whole:
        return kinds.IntDistribution(int(ends[0]), int(ends[1]), log, int(step or 1))
    return kinds.FloatDistribution(*ends, log, step)


def sampler_of(startup: int, together: bool, stream: tuple[int, ...]) -> BaseSampler:
    """Return TPE (Bergstra et al. 2011), with all hyperparameters in one density.

    Args:
        startup: Trials drawn at random before it goes by results.
        together: Whether others run at the same time; it then keeps away from what they try.
        stream: Names the stream of random numbers.
    """
    seed = int(key_of({"stream": stream}), 16) % 2**32
    return imported().samplers.TPESampler(
        n_startup_trials=startup, multivariate=True, constant_liar=together, seed=seed
    )


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Return values as they are tried: with four digits, so that they can be read and typed."""
    return {
        key: value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")
        for key, value in values.items()
    }


def fitting(values: Mapping[str, float], space: Mapping[str, BaseDistribution]) -> dict[str, float]:
    """Return those of the values that the space contains."""
    found = {}
    for key, distribution in space.items():
        try:
            inside = distribution._contains(distribution.to_internal_repr(values[key]))
        except (KeyError, ValueError):
            inside = False
        if inside:
            found[key] = values[key]
    return found
