"""SVG elements as escaped markup: geometry in attributes, looks in the page's style sheet.

No `style` attribute is ever written: the page's security policy would refuse it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike

from rlhf_exp.data.visible import visible

Value = str | float | int


def element(tag: str, *children: str, **attributes: Value) -> Markup:
    """Return one element; strings are escaped, `Markup` children are taken as they are.

    Args:
        tag: name of the element; from this package's code, never from data.
        *children: its content.
        **attributes: `class_` is written `class`, other underscores as hyphens. Numbers are cut to
            two decimals.
    """
    parts = [
        Markup(' {}="{}"').format(_name(name), _value(value)) for name, value in attributes.items()
    ]
    inside = Markup("").join(
        child if isinstance(child, Markup) else escape(visible(child)) for child in children
    )
    return Markup("<{0}{1}>{2}</{0}>").format(tag, Markup("").join(parts), inside)


def group(children: Iterable[Markup], **attributes: Value) -> Markup:
    """Return a `g` element."""
    return element("g", *children, **attributes)


def polyline(xs: ArrayLike, ys: ArrayLike, **attributes: Value) -> list[Markup]:
    """Return a path for each unbroken stretch of points [N]; a lonely point becomes a dot."""
    found = []
    for points in stretches(xs, ys):
        if len(points) == 1:
            (x, y), *_ = points
            dot = {**attributes, "class_": f"dot {attributes.get('class_', '')}".strip()}
            found.append(element("circle", cx=x, cy=y, r=2.5, **dot))
        else:
            found.append(element("path", d="M" + _points(points), **attributes))
    return found


def band(xs: ArrayLike, low: ArrayLike, high: ArrayLike, **attributes: Value) -> list[Markup]:
    """Return the areas between two curves [N], broken where either has a gap."""
    bottom = np.asarray(low, dtype=np.float64)
    top = np.where(np.isfinite(bottom), np.asarray(high, dtype=np.float64), np.nan)
    bottom = np.where(np.isfinite(top), bottom, np.nan)
    found = []
    for upper, lower in zip(stretches(xs, top), stretches(xs, bottom), strict=True):
        outline = [*upper, *reversed(lower)]
        found.append(element("path", d="M" + _points(outline) + "Z", **attributes))
    return found


def stretches(xs: ArrayLike, ys: ArrayLike) -> list[list[tuple[float, float]]]:
    """Split points [N] at gaps (NaN)."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(np.asarray(xs, float), np.asarray(ys, float), strict=True):
        if np.isfinite(x) and np.isfinite(y):
            found[-1].append((float(x), float(y)))
        elif found[-1]:
            found.append([])
    return [points for points in found if points]


def _points(points: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _name(name: str) -> str:
    # SVG's attributes keep their capitals: `viewBox`, `preserveAspectRatio`.
    return name.rstrip("_").replace("_", "-")


def _value(value: Value) -> str:
    return visible(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
