"""Figures as inline SVG whose colours the page's style sheet sets, for light, dark and print."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Colours that stand for the style sheet's variables until the figure is drawn.
INK, FAINT = "#0a0001", "#0a0002"
ARMS = tuple(f"#0b000{i}" for i in range(7))
VARIABLES = {INK: "--ink", FAINT: "--faint"} | {c: f"--arm-{i}" for i, c in enumerate(ARMS)}
RC = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 12.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.5,
}


@contextmanager
def themed_figure(width: float, height: float) -> Iterator[Figure]:
    """Give a figure of so many inches, to be drawn with this module's colours."""
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def inline_svg(figure: Figure, name: str, says: str) -> Markup:
    """Return a figure as an ``<svg>`` element as wide as its place in the page.

    Args:
        figure: drawn, within ``themed_figure``.
        name: starts its ids, which a page may have once only.
        says: what it shows, for who cannot see it.

    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        drawing = drawing.replace(colour, f"var({variable})")
    drawing = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", drawing)
    box = re.search(r'viewBox="[^"]*"', drawing)
    opening = f'<svg {box[0] if box else ""} role="img" aria-label="{escape(says)}">'
    return Markup(re.sub(r"<svg[^>]*>", opening, drawing, count=1))
