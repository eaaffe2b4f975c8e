"""The HTML templates of the reports. Values are escaped, except for HTML that another template has rendered."""

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sana_model.files.redact import redact


def render(template: str, **values: Any) -> Markup:
    """Render a template of this folder, without secrets. Raises jinja2.UndefinedError if a value that it uses is missing."""
    return Markup(redact(_environment().get_template(template).render(**values)))


@cache
def _environment() -> Environment:
    loader = PackageLoader("pipelines.reports")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"show": show, "is_numeric": is_numeric}
    return environment


def show(value: object) -> str:
    """The text of a value in a table's cell: integers with separators, other numbers with 4 significant digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def is_numeric(value: object) -> bool:
    """Whether a cell is aligned right: a number, a missing value, or a text that begins like a number ("81 %")."""
    return bool(re.match(r"[-+−]?[\d.]", show(value))) or value is None
