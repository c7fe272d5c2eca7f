"""The page of a comparison: verdict, picture, table, command, in this order; one HTML file."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Sequence
from html import escape

import pandas as pd

from tract_hub.studies.verdict import Outcome

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 76rem; }
h1 { font-size: 1.1rem; font-weight: 600; opacity: .75; margin: 0; }
.verdict { font-size: 1.4rem; line-height: 1.35; margin: .5rem 0 1rem; }
img { width: 100%; border-radius: 6px; background: white; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #8886; text-align: left;
  white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem; border: 1px solid #8886;
  border-radius: 6px; font-size: .85rem; }
.facts { font-size: .85rem; opacity: .8; }
"""


def write_page(
    title: str,
    found: Sequence[Outcome],
    picture: bytes,
    lines: pd.DataFrame,
    facts: Sequence[str],
    arguments: Sequence[str],
) -> str:
    """Return the page as HTML; the first outcome is the verdict, the picture is a PNG."""
    verdict, *others = [escape(one.sentence) for one in found] or ["Nothing is finished yet."]
    image = base64.b64encode(picture).decode()
    command = escape(f"tract-hub {shlex.join(arguments)}")
    # Turned round: a column an arm fits a narrow screen.
    body = lines.set_index("arm").T.to_html(border=0)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="verdict">{verdict}</p>
<img alt="{verdict}" src="data:image/png;base64,{image}">
{"".join(f"<p>{other}</p>" for other in others)}
<div class="wide">{body}</div>
<pre>{command}</pre>
<div class="facts">{"".join(f"<p>{escape(fact)}</p>" for fact in facts)}</div>
</body></html>
"""
