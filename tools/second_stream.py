"""The drawing of GEM's second stream: `python tools/second_stream.py` writes it anew.

Twelve blocks of a vision transformer would not fit: three are drawn, two of them with the second stream alongside.
"""

from pathlib import Path

DRAWING = Path(__file__).parents[1] / "docs" / "images" / "second-stream.svg"

HOST, SECOND, MUTED, TEXT = "#4477aa", "#cc6633", "#888888", "#222222"
WIDTH, HEIGHT = 960, 370
TOP, BOTTOM = 110, 290  # centre lines of the two streams


class Drawing:
    def __init__(self) -> None:
        self.parts: list[str] = []

    def box(self, x: int, y: int, width: int, label: str, colour: str, note: str = "") -> None:
        """A rounded box centred on `(x, y)`, with a label and a smaller note below it."""
        height = 64
        self.parts.append(
            f'<rect x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}" rx="8" '
            f'fill="{colour}" fill-opacity="0.12" stroke="{colour}" stroke-width="2"/>'
        )
        self.text(x, y + (-4 if note else 5), label, weight="bold")
        if note:
            self.text(x, y + 16, note, size=12)

    def text(self, x: int, y: int, text: str, size: int = 14, colour: str = TEXT, weight: str = "normal") -> None:
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" font-weight="{weight}" '
            f'text-anchor="middle">{text}</text>'
        )

    def arrow(self, points: list[tuple[int, int]], colour: str, dashed: bool = False) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes} '
            f'marker-end="url(#{"host" if colour == HOST else "second" if colour == SECOND else "muted"})"/>'
        )

    def plus(self, x: int, y: int) -> None:
        self.parts.append(
            f'<circle cx="{x}" cy="{y}" r="13" fill="white" stroke="{SECOND}" stroke-width="2"/>'
            f'<path d="M{x - 6} {y}H{x + 6}M{x} {y - 6}V{y + 6}" stroke="{SECOND}" stroke-width="2"/>'
        )

    def svg(self, title: str) -> str:
        markers = "".join(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 10 5 0 10z" fill="{colour}"/></marker>'
            for name, colour in (("host", HOST), ("second", SECOND), ("muted", MUTED))
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}" font-family="sans-serif" role="img">\n<title>{title}</title>\n<defs>{markers}</defs>\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
        )


def render() -> str:
    drawing = Drawing()
    drawing.text(150, 34, "the model's own stream, as trained", colour=HOST, weight="bold")
    drawing.text(150, 345, "the second stream: GEM", colour=SECOND, weight="bold")

    drawing.text(40, TOP + 5, "patches")
    drawing.arrow([(72, TOP), (98, TOP)], HOST)
    drawing.box(158, TOP, 116, "blocks 1 … 6", HOST, "attention, MLP")
    for x, block in ((390, "block 7"), (640, "block 12")):
        drawing.box(x, TOP, 130, block, HOST, "q kᵀ attention, MLP")
        drawing.box(x, BOTTOM - 78, 150, "self-self attention", SECOND, "q qᵀ, k kᵀ, v vᵀ, averaged")
        drawing.arrow([(x, TOP + 32), (x, BOTTOM - 112)], MUTED, dashed=True)
        drawing.text(x + 34, TOP + 56, "q, k, v", size=12, colour=MUTED)
        drawing.arrow([(x, BOTTOM - 46), (x, BOTTOM - 15)], SECOND)
        drawing.plus(x, BOTTOM)
    drawing.arrow([(216, TOP), (323, TOP)], HOST)
    drawing.arrow([(455, TOP), (488, TOP)], HOST)
    drawing.text(515, TOP + 5, "…", size=20, colour=HOST)
    drawing.arrow([(540, TOP), (573, TOP)], HOST)
    drawing.arrow([(270, TOP), (270, BOTTOM), (375, BOTTOM)], SECOND)
    drawing.text(250, BOTTOM + 24, "starts here", size=12, colour=SECOND)
    drawing.arrow([(404, BOTTOM), (488, BOTTOM)], SECOND)
    drawing.text(515, BOTTOM + 5, "…", size=20, colour=SECOND)
    drawing.arrow([(540, BOTTOM), (625, BOTTOM)], SECOND)
    drawing.text(515, BOTTOM + 40, "no MLP, nothing flows back", size=12, colour=SECOND)

    drawing.arrow([(705, TOP), (765, TOP)], HOST)
    drawing.box(855, TOP, 176, "image embedding", HOST, "score: is it there?")
    drawing.arrow([(654, BOTTOM), (765, BOTTOM)], SECOND)
    drawing.box(855, BOTTOM, 176, "patch embeddings", SECOND, "heatmap: where?")
    drawing.box(855, BOTTOM - 90, 176, "prompt", MUTED, "“a photo of a cat.”")
    drawing.arrow([(855, BOTTOM - 122), (855, TOP + 34)], MUTED)
    drawing.arrow([(855, BOTTOM - 58), (855, BOTTOM - 34)], MUTED)
    drawing.text(855, 345, "compared by cosine", size=12, colour=MUTED)
    return drawing.svg("GEM: a second stream of self-self attention alongside the last blocks of a frozen transformer")


if __name__ == "__main__":
    DRAWING.write_text(render(), "utf-8")
