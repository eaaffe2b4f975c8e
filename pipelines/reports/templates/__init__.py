"""The HTML templates of the reports. Everything that goes into one is escaped, but for what a template made itself."""

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **values: Any) -> Markup:
    """A template of this folder, filled in."""
    return Markup(_environment().get_template(template).render(**values))


@cache
def _environment() -> Environment:
    loader = PackageLoader("pipelines.reports")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"show": show, "is_numeric": is_numeric}
    return environment


def show(value: object) -> str:
    """A value in a table's cell."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def is_numeric(value: object) -> bool:
    """Whether a cell is set to the right: a number, or a text that begins as one ("81 %")."""
    return bool(re.match(r"[-+−]?[\d.]", show(value))) or value is None
