"""The templates of reports: everything written into a page is escaped and made visible."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from rlhf_exp.safe_text import clipped, visible

FOLDER = Path(__file__).parent


def fill(template: str, **values: object) -> Markup:
    """Return a template of this package, filled.

    Args:
        template: Its path below the package, such as `run/comparisons.html`.
        values: The template's variables; strings are untrusted, `Markup` is written as it is.
    """
    return Markup(_environment().get_template(template).render(clipped=clipped, **values))


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_make_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _make_visible(value: object) -> object:
    """Make acting characters of a string that a template writes visible; markup is ours."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
