"""Show library code and tokens in a notebook."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from html import escape
from types import ModuleType

from IPython.display import HTML
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
    code = highlight(
        inspect.getsource(thing), PythonLexer(), HtmlFormatter(noclasses=True, nobackground=True)
    )
    return HTML(
        f'<div style="{CARD};overflow-x:auto;line-height:1.35">'
        f'<div style="{CAPTION}">{name}</div><div style="{MONO}">{code}</div></div>'
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
