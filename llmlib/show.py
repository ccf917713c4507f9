"""Show library code, tokens and graphs of values in a notebook."""

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from html import escape
from types import ModuleType
from typing import Any

from IPython.display import HTML, SVG
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

# Every output brings its own light ground and dark text, so that it reads in a dark theme too.
CARD = (
    "background:#fff;color:#1a1a1a;border:1px solid #d0d0d0;border-radius:6px;padding:10px 14px;margin:4px 0"
)
CAPTION = "font-size:12px;color:#606060"
MONO = "font-family:ui-monospace,'DejaVu Sans Mono',monospace;font-size:13px"
FILLS = ("#CFE5F3", "#FBE3C2", "#CDEBDD", "#F3DCE8", "#E3E3E3")


def source(thing: Callable | ModuleType) -> HTML:
    """Show the source code of a library's function, class or module, in colour."""
    name = thing.__name__ if isinstance(thing, ModuleType) else f"{thing.__module__}.{thing.__qualname__}"
    code = textwrap.dedent(inspect.getsource(thing))
    coloured = highlight(code, PythonLexer(), HtmlFormatter(noclasses=True, nobackground=True))
    return HTML(
        f'<div style="{CARD};overflow-x:auto;line-height:1.35">'
        f'<div style="{CAPTION}">{name}</div><div style="{MONO}">{coloured}</div></div>'
    )


def tokens(rows: Mapping[str, Sequence[tuple[str | bytes, int]]]) -> HTML:
    """Show texts as coloured tokens with their IDs, one row a tokenizer.

    `rows` maps a tokenizer's name to its (piece, ID) pairs. A piece is text, or bytes: those that are no
    UTF-8 are written as \\xNN. A space is drawn as ·, a line end as ↵.
    """
    return HTML("".join(_row(name, pairs) for name, pairs in rows.items()))


def _row(name: str, pairs: Sequence[tuple[str | bytes, int]]) -> str:
    fills = (FILLS[i % len(FILLS)] for i in range(len(pairs)))
    boxes = "".join(
        _token(piece, token_id, fill) for (piece, token_id), fill in zip(pairs, fills, strict=True)
    )
    return (
        f'<div style="{CARD}"><div style="{CAPTION}">{escape(name)}: {len(pairs)} tokens</div>'
        f'<div style="display:flex;flex-wrap:wrap;gap:4px 2px">{boxes}</div></div>'
    )


def _token(piece: str | bytes, token_id: int, fill: str) -> str:
    text = piece.decode("utf-8", "backslashreplace") if isinstance(piece, bytes) else piece
    visible = escape(text.replace(" ", "·").replace("\n", "↵"))
    style = f"background:{fill};border-radius:3px;padding:1px 4px;text-align:center;{MONO}"
    number = f'<span style="font-size:10px;color:#505050">{token_id}</span>'
    return f'<span style="{style}">{visible}<br>{number}</span>'


def graph(root: Any, **names: Any) -> SVG:
    """Draw how a value was made: data in blue, gradients in red, on each arrow the local gradient.

    A value has `data`, `grad`, `op`, `parents` and `local_grads`, as those of chapter 01 have. Keywords name
    values: `graph(loss, w=w, b=b)`.
    """
    order = _parents_first(root, [])
    name_of = {value: name for name, value in names.items()}
    x, y = _places(order)
    shapes = [_arrow(value, i, x, y) for value in order for i in range(len(value.parents))]
    shapes += [_node(value, name_of.get(value), x[value], y[value]) for value in order]
    width, bottom, top = max(x.values()) + 52, max(y.values()) + 45, min(y.values()) - 78
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {width} {bottom - top}" width="{width}"'
    ground = f'<rect y="{top}" width="100%" height="100%" fill="#FFFFFF"/>'
    return SVG(f'{head} style="max-width:100%">{ground}{"".join(shapes)}</svg>')


def _parents_first(value: Any, order: list) -> list:
    if value not in order:
        for parent in value.parents:
            _parents_first(parent, order)
        order.append(value)
    return order


def _places(order: list) -> tuple[dict[Any, float], dict[Any, float]]:
    """Place each value one column left of the first that uses it, and beside the middle of its parents."""
    column, y, n_leaves = {order[-1]: 0}, {}, 0
    for value in reversed(order):
        for parent in value.parents:
            column[parent] = max(column.get(parent, 0), column[value] + 1)
    x = {value: 52.0 + 124.0 * (max(column.values()) - column[value]) for value in order}
    for value in order:
        if value.parents:
            y[value] = sum(y[parent] for parent in value.parents) / len(value.parents)
        else:
            y[value], n_leaves = 84.0 * n_leaves, n_leaves + 1
        while any(
            x[value] == x[other] and abs(y[value] - y[other]) < 84 for other in y if other is not value
        ):
            y[value] += 42
    return x, y


def _arrow(value: Any, i: int, x: dict[Any, float], y: dict[Any, float]) -> str:
    """Draw the arrow from parent number `i`; it bends around what may lie between, and away from a twin."""
    parent = value.parents[i]
    (x1, y1), (x2, y2) = (x[parent] + 40, y[parent]), (x[value] - 40, y[value])
    is_twin = value.parents.count(parent) > 1
    bend = 44 * (2 * i - 1) if is_twin else -104 * (x[value] - x[parent] > 124)
    mid_x, mid_y = (x1 + x2) / 2, (y1 + y2) / 2
    return (
        f'<path d="M{x1} {y1} Q{mid_x} {mid_y + bend} {x2} {y2}" fill="none" stroke="#909090"/>'
        f'<circle cx="{x2}" cy="{y2}" r="3" fill="#909090"/>'
    ) + _label(mid_x, mid_y + bend / 2 - 7, f"×{value.local_grads[i]:.3g}", "#606060")


def _node(value: Any, name: str | None, x: float, y: float) -> str:
    title = "  ".join(filter(None, [name, value.op and f"[{value.op}]"])) or "constant"
    box = f'<rect x="{x - 40}" y="{y - 31}" width="80" height="62" rx="5" fill="#F7F7F7" stroke="#606060"/>'
    labels = [
        _label(x, y - 14, title, "#1A1A1A"),
        _label(x, y + 5, f"{value.data:.4g}", "#0072B2", "bold"),
        _label(x, y + 23, f"grad {value.grad:.4g}", "#D55E00"),
    ]
    return box + "".join(labels)


def _label(x: float, y: float, text: str, colour: str, weight: str = "normal") -> str:
    font = f'font-family="Helvetica, Arial, sans-serif" font-size="12" font-weight="{weight}"'
    halo = 'paint-order="stroke" stroke="#FFFFFF" stroke-width="3"'
    text = escape(text.replace("-", "−"))
    return f'<text x="{x}" y="{y}" text-anchor="middle" fill="{colour}" {font} {halo}>{text}</text>'
