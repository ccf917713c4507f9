"""Draw the pictures of the course: a small pen that writes SVG, the same bytes on every machine."""

from __future__ import annotations

from html import escape

INK, GREY, LIGHT = "#1A1A1A", "#6B6B6B", "#D9D9D9"
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALE_BLUE, PALE_VERMILION, PALE_GREEN = "#D6E9F5", "#FBE1D1", "#D3EFE5"
PALE_PURPLE, PALE_ORANGE, PALE_SKY, PALE_GREY = "#F6E3EE", "#FBEBCB", "#E0F1FB", "#F2F2F2"

SANS = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Drawing:
    """Collect shapes on an opaque white ground; a screen reader says `title`. Lengths are in pixels."""

    def __init__(self, width: int, height: int, title: str):
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def rect(self, x, y, w, h, *, fill="none", stroke=INK, width=1.2, rx=4, dash=None) -> None:
        self._shape("rect", x=x, y=y, width=w, height=h, rx=rx, **_pen(fill, stroke, width, dash))

    def circle(self, x, y, r, *, fill="none", stroke=INK, width=1.2) -> None:
        self._shape("circle", cx=x, cy=y, r=r, **_pen(fill, stroke, width))

    def line(self, x1, y1, x2, y2, *, stroke=INK, width=1.5, dash=None) -> None:
        self._shape("line", x1=x1, y1=y1, x2=x2, y2=y2, **_pen("none", stroke, width, dash))

    def path(self, d: str, *, fill="none", stroke=INK, width=1.5, dash=None) -> None:
        self._shape("path", d=d, **_pen(fill, stroke, width, dash))

    def arrow(self, x1, y1, x2, y2, *, stroke=INK, width=1.5, dash=None, head=7) -> None:
        """Draw a line from the first point to the second, with a head at the second."""
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        ux, uy = (x2 - x1) / length, (y2 - y1) / length
        bx, by = x2 - head * ux, y2 - head * uy
        self.line(x1, y1, bx, by, stroke=stroke, width=width, dash=dash)
        side = head * 0.55
        corners = [(x2, y2), (bx - side * uy, by + side * ux), (bx + side * uy, by - side * ux)]
        points = " ".join(f"{_number(x)},{_number(y)}" for x, y in corners)
        self._shape("polygon", points=points, fill=stroke)

    def text(
        self, x, y, text, *, size=14, anchor="middle", fill=INK, weight="normal", mono=False, italic=False
    ) -> None:
        """Write text whose vertical middle is at `y`, in as many lines as it has."""
        lines = str(text).split("\n")
        for i, line in enumerate(lines):
            # The baseline is set by hand: viewers disagree on `dominant-baseline`.
            baseline = y + size * (0.35 + 1.25 * (i - (len(lines) - 1) / 2))
            attributes = {"font-weight": weight} if weight != "normal" else {}
            if italic:
                attributes["font-style"] = "italic"
            attributes |= {"font-family": MONO if mono else SANS, "xml:space": "preserve"}
            self._shape(
                "text", line, x=x, y=baseline, font_size=size, text_anchor=anchor, fill=fill, **attributes
            )

    def box(
        self, x, y, w, h, label="", *, fill=PALE_GREY, stroke=INK, size=14, rx=4, width=1.2, **text
    ) -> None:
        """Draw a rectangle with a label in its middle."""
        self.rect(x, y, w, h, fill=fill, stroke=stroke, rx=rx, width=width)
        if label != "":
            self.text(x + w / 2, y + h / 2, label, size=size, **text)

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">'
        )
        ground = f'<rect width="{self.width}" height="{self.height}" fill="#FFFFFF"/>'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", ground, *self.shapes, "</svg>", ""])

    def _shape(self, tag: str, content: str | None = None, **attributes) -> None:
        written = " ".join(
            f'{k.replace("_", "-")}="{_number(v)}"' for k, v in attributes.items() if v is not None
        )
        self.shapes.append(
            f"<{tag} {written}/>" if content is None else f"<{tag} {written}>{escape(content)}</{tag}>"
        )


def _pen(fill: str, stroke: str, width: float, dash: str | None = None) -> dict:
    return {"fill": fill, "stroke": stroke, "stroke_width": width, "stroke_dasharray": dash}


def _number(value) -> str:
    """Write a coordinate with at most one decimal, so that no machine's rounding shows."""
    if isinstance(value, str):
        return escape(value)
    return f"{value:.1f}".rstrip("0").rstrip(".")
