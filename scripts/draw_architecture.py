"""Draw the package's parts and what each imports of the others: docs/architecture.svg.

``python scripts/draw_architecture.py``. Parts stand from the most to the least dependent. An arc to
the right is an import downwards; one to the left, in red, is an import upwards, of which there
should be none. What all parts share is not drawn.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "tract_hub"

# Label → the modules and packages in it, and in a few words what it knows.
PARTS = {
    "cli.py, commands/": (("cli", "commands", "__main__"), "the tract-hub command: its options"),
    "studies/": (("studies",), "inspect, audit, compare, bench: data, training, tables"),
    "__init__.py": (("",), "the public API, and nothing else"),
    "launch.py": (("launch",), "training scripts, run as they are"),
    "integrations/": (("integrations",), "Trainer, DDP, FSDP, DeepSpeed, running scripts"),
    "surgery.py": (("surgery",), "hooks on a live model: here finding and method meet"),
    "locator/": (("locator",), "model zoos, and how to follow pixels to the first layers"),
    "method/": (("method",), "the mathematics: Gram matrix, solve, gate; only torch"),
}
SHARED = ("config", "stem", "errors", "names")

WIDTH, LEFT, RIGHT = 780, 60, 530
HEIGHT, GAP, TOP = 52, 22, 28
INK, FILL, DOWN, UP = "#1f2328", "#f2f5f9", "#3b6ea5", "#c62828"


def imports() -> Iterator[tuple[str, str]]:
    """Yield (module, imported module) for every import of the package's own, wherever it stands.

    Names are relative to the package, ``""`` is its ``__init__``.
    """
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in _imported(node):
                if name.partition(".")[0] == PACKAGE:
                    yield module, name.partition(".")[2]


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        if node.level:
            raise ValueError("a relative import: write it out, as all others are")
        for alias in node.names:  # `from tract_hub.method import gate` imports a module
            below = f"{node.module}.{alias.name}"
            inner = ROOT.joinpath(*below.split("."))
            is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
            yield below if is_module else str(node.module)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
        if isinstance(first, ast.Constant):
            yield str(first.value).rstrip(".")


def edges() -> set[tuple[str, str]]:
    """Return (part, imported part) of all imports from one part to another."""
    ends = {(_part(module), _part(imported)) for module, imported in imports()}
    return {(a, b) for a, b in ends if a is not None and b is not None and a != b}


def _part(module: str) -> str | None:
    top = module.partition(".")[0]
    if top in SHARED:
        return None
    for label, (tops, _) in PARTS.items():
        if top in tops:
            return label
    raise ValueError(f"{PACKAGE}/{top} is in no part: say in PARTS where it belongs")


def svg() -> str:
    """Return the drawing."""
    rows = {label: TOP + i * (HEIGHT + GAP) for i, label in enumerate(PARTS)}
    bottom = TOP + len(rows) * (HEIGHT + GAP)
    body = [_box(y, label, PARTS[label][1]) for label, y in rows.items()]
    shared = ", ".join(f"{name}.py" for name in SHARED)
    body.append(_box(bottom, shared, "settings, what a first layer is, errors: all use them"))
    body += _arcs(rows)
    size = f'width="{WIDTH}" height="{bottom + HEIGHT + TOP}"'
    heads = "".join(_arrow_head(colour) for colour in (DOWN, UP))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">',
            f'<defs>{heads}</defs><rect {size} fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _box(y: int, label: str, purpose: str) -> str:
    return (
        f'<rect x="{LEFT}" y="{y}" width="{RIGHT - LEFT}" height="{HEIGHT}" rx="6" '
        f'fill="{FILL}" stroke="{INK}"/>'
        f'<text x="{LEFT + 14}" y="{y + 21}" font-size="15" font-weight="bold" fill="{INK}">'
        f"{escape(label)}</text>"
        f'<text x="{LEFT + 14}" y="{y + 41}" font-size="13" fill="{INK}">{escape(purpose)}</text>'
    )


def _arcs(rows: dict[str, int]) -> Iterator[str]:
    """Arcs leave a box in its lower half and come in at its upper half, the longest outermost."""
    order = list(rows)
    spans = {ends: order.index(ends[1]) - order.index(ends[0]) for ends in edges()}
    for ends in sorted(spans, key=lambda ends: (spans[ends], ends)):
        leaving = sorted((e for e in spans if e[0] == ends[0]), key=lambda e: -spans[e])
        coming = sorted((e for e in spans if e[1] == ends[1]), key=lambda e: spans[e])
        begin = rows[ends[0]] + HEIGHT * (0.55 + 0.4 * _fraction(leaving, ends))
        end = rows[ends[1]] + HEIGHT * (0.05 + 0.4 * _fraction(coming, ends))
        yield _arc(begin, end, spans[ends])


def _fraction(among: list[tuple[str, str]], ends: tuple[str, str]) -> float:
    return (among.index(ends) + 0.5) / len(among)


def _arc(begin: float, end: float, span: int) -> str:
    side, colour, x = (1, DOWN, RIGHT) if span > 0 else (-1, UP, LEFT)
    reach = x + side * (24 + 38 * abs(span) if span > 0 else 50)
    return (
        f'<path d="M{x},{begin:.1f} C{reach},{begin:.1f} {reach},{end:.1f} '
        f'{x + side * 3},{end:.1f}" fill="none" stroke="{colour}" stroke-width="1.4" '
        f'marker-end="url(#{colour[1:]})"/>'
    )


def _arrow_head(colour: str) -> str:
    return (
        f'<marker id="{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
    )


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.svg").write_text(svg(), encoding="utf-8")
