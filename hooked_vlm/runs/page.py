"""A page of tables and pictures that needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import pandas as pd
from jinja2 import Environment
from matplotlib.figure import Figure

Part = tuple[str, str]  # a title, and what stands under it, in HTML

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: .2rem .6rem; text-align: right }
tr:nth-child(even) { background: #f3f3f3 } img { max-width: 100% }
</style></head><body>
<h1>{{ title }}</h1>
{% for name, content in parts %}<h2>{{ name }}</h2>
{{ content|safe }}
{% endfor %}</body></html>
"""


def page(title: str, parts: Sequence[Part]) -> str:
    """The page."""
    return str(Environment(autoescape=True).from_string(PAGE).render(title=title, parts=parts))


def table(frame: pd.DataFrame) -> str:
    """A table, its numbers to three digits."""
    return str(frame.round(3).to_html(index=False, border=0))


def picture(figure: Figure) -> str:
    """A figure, inside of the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'


def reasons(excluded: pd.DataFrame) -> str:
    """How many items were excluded, by reason."""
    counts = excluded["reason"].value_counts().rename_axis("reason").rename("items")
    return table(counts.reset_index()) if len(counts) else ""
