"""Every message of the package's own errors and warnings, read from its source.

A message is what stands where a ``TractError`` or a ``TractWarning`` is made: a text, or what a
function of the same file returns. Where it holds a value, it has ``…``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tract_hub import errors

PACKAGE = Path(errors.__file__).parent
OWN = {name for name, kind in vars(errors).items() if isinstance(kind, type)}


def messages() -> dict[str, str]:
    """Return message → where it is made, as file:line."""
    found: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and call.args and _makes_message(call):
                where = f"{path.relative_to(PACKAGE)}:{call.lineno}"
                for text in _texts(call.args[0], functions):
                    found.setdefault(text, where)
    return found


def texts() -> set[str]:
    """Return every text in the package, with ``…`` for the values in it."""
    return {
        text
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Constant, ast.JoinedStr))
        for text in _texts(node, {})
    }


def _makes_message(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    warns = name == "warnings.warn" and any("TractWarning" in ast.unparse(a) for a in call.args)
    return warns or name in OWN


def _texts(node: ast.expr, functions: dict[str, ast.FunctionDef]) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
    elif isinstance(node, ast.Call):
        function = functions.get(ast.unparse(node.func).removeprefix("self."))
        for inner in ast.walk(function) if function else ():
            if isinstance(inner, ast.Return) and inner.value is not None:
                yield from _texts(inner.value, functions)
