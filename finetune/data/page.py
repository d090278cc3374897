"""Previewed rows as one HTML file that needs nothing else: no script, no address, and every text escaped.

Contents, roles, names and paths are escaped by Jinja whatever they hold, after what hides or reorders text was made
visible; and the page's own policy forbids scripts and requests, should anything ever slip through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import jinja2

from finetune.data.preview import PreviewedRow
from finetune.data.visible import visible

TEMPLATE = Path(__file__).with_name("page.html.jinja")
BUFFER = 1000  # pieces of the page that are written together


def page(title: str, rows: Iterable[PreviewedRow]) -> Iterator[str]:
    """The page, piece by piece, so that memory does not grow with the rows.

    Args:
        title: what the rows are.
        rows: in the order in which they are shown.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"visible": visible, "visible_lines": partial(visible, lines=True)}
    stream = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).stream(title=title, rows=rows)
    stream.enable_buffering(BUFFER)
    return iter(stream)
