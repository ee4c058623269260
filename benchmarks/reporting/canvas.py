"""A figure's frame: title, subtitle, footnote, axes; SVG and PNG files.

No global state of matplotlib is read or changed, and nothing depends on the time or the user's
settings: the same data give the same file.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .words import visible

__all__ = [
    "BLUE", "GREY", "INK", "PALE", "PALETTE", "VERMILION", "new_axes", "png", "style",
    "svg",
]  # fmt: skip

# Okabe and Ito's palette: told apart with every common form of colour blindness.
BLUE, VERMILION, GREEN, ORANGE = "#0072b2", "#d55e00", "#009e73", "#e69f00"
SKY, PURPLE, INK, GREY, PALE = "#56b4e9", "#cc79a7", "#1f2328", "#6e7781", "#d0d7de"
PALETTE = (VERMILION, GREEN, PURPLE, ORANGE, SKY)

_WIDTH, _LEFT, _RIGHT = 7.2, 0.85, 0.3  # inches
_SETTINGS: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,  # records are not ours: a dollar sign in a name is a dollar sign
    "svg.fonttype": "path",
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#eaeef2",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}


@contextmanager
def style() -> Iterator[None]:
    """The library's own defaults with ours over them, while a figure is drawn or saved."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        # A name in letters that the font lacks shows boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_axes(
    title: str, subtitle: str, footnote: str, height: float, left: float = _LEFT, above: float = 0
) -> tuple[Figure, Axes]:
    """Axes of `height` inches under a title and over a footnote, which take what they need.

    `above` inches stay free over the axes, beyond one line of text.
    """
    figure = Figure(figsize=(_WIDTH, 10))
    FigureCanvasAgg(figure)
    texts = [
        (text, _wrap(figure, text, size), size, weight, colour, spacing)
        for text, size, weight, colour, spacing in (
            (title, 13, "bold", INK, 0.26),
            (subtitle, 9, "normal", GREY, 0.19),
            (footnote, 8, "normal", GREY, 0.165),
        )
    ]
    top = 0.15 + sum(len(lines) * spacing for _, lines, *_, spacing in texts[:2]) + 0.35 + above
    bottom = 0.65 + len(texts[2][1]) * texts[2][5]
    whole = top + height + bottom
    figure.set_size_inches(_WIDTH, whole)
    y = whole - 0.15
    for number, (_, lines, size, weight, colour, spacing) in enumerate(texts):
        if number == 2:
            y = len(lines) * spacing + 0.08
        for line in lines:
            figure.text(
                0.15 / _WIDTH, y / whole, line, fontsize=size, weight=weight, color=colour, va="top"
            )
            y -= spacing
    axes = figure.add_axes(
        (left / _WIDTH, bottom / whole, (_WIDTH - left - _RIGHT) / _WIDTH, height / whole)
    )
    axes.tick_params(length=0)
    return figure, axes


def _wrap(figure: Figure, text: str, size: float) -> list[str]:
    """Lines no wider than the figure; a word that is wider than it is broken."""
    measure = figure.text(0, 0, "", fontsize=size, weight="bold" if size > 10 else "normal")
    room = (_WIDTH - 0.3) * figure.dpi

    def fits(line: str) -> bool:
        measure.set_text(line)
        return bool(measure.get_window_extent().width <= room)

    lines = [""]
    for word in visible(text).split():
        joined = f"{lines[-1]} {word}".strip()
        if fits(joined):
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if not fits(lines[-1] + letter):
                lines.append("")
            lines[-1] += letter
    measure.remove()
    return [line for line in lines if line]


def svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element whose ids begin with `name`: several share one page."""
    buffer = io.StringIO()
    with style(), mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<!--.*?-->\s*|<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text[text.index("<svg") :]


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG file."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    with style():
        figure.savefig(drawn, format="png", dpi=dpi, metadata={"Software": None})
    # A palette takes a third of the bytes, and nobody sees the difference in lines and letters.
    PIL.Image.open(drawn).convert("RGB").quantize(128).save(packed, "PNG", optimize=True)
    return packed.getvalue()
