"""Draws what `plots.py` describes, with matplotlib; imported only when figures are wanted."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatch
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .canvas import BLUE, GREY, INK, PALE, PALETTE, VERMILION, new_axes, style
from .labels import Label, place_labels
from .plots import Bars, Curve, Curves, Plot, Ratios
from .words import duration, visible

__all__ = ["draw"]

_STEPS = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 2, 5), (1,))
"""Ticks within a decade, by how many decades there are."""
_PART_COLOURS = ("#e69f00", "#f0e442", BLUE, "#009e73", "#cc79a7")


def draw(plot: Plot, footnote: bool = True) -> Figure:
    """The plot as a matplotlib figure, independent of pyplot and of the user's settings.

    Without `footnote` where the same words stand under it as text.
    """
    if not footnote:
        plot = replace(plot, footnote="")
    with style():
        return _draw(plot)


@singledispatch
def _draw(plot: object) -> Figure:
    raise TypeError(f"no figure for {type(plot).__name__}")


@_draw.register
def _curves(plot: Curves) -> Figure:
    above = 0.38 if plot.guides else 0
    figure, axes = new_axes(plot.title, plot.subtitle, plot.footnote, 4.0, above=above)
    dots = [dot for curve in plot.curves for dot in curve.dots]
    if plot.y_milliseconds:
        _logarithmic(axes, "y", [dot.y for dot in dots])
        sides = sorted({dot.x for dot in dots})
        axes.set_xticks(sides, [f"{side:.0f}" for side in sides])
        spread = (sides[-1] - sides[0]) or sides[0]
        axes.set_xlim(sides[0] - 0.06 * spread, sides[-1] + 0.2 * spread)
    else:
        _logarithmic(axes, "x", [dot.x for dot in dots], wider=1.35)
        low, high = min(dot.y for dot in dots), max(dot.y for dot in dots)
        margin = 0.12 * (high - low) or 1
        axes.set_ylim(max(low - margin, 0), min(high + margin, 101))
    axes.set_xlabel(plot.x_label, loc="right")
    axes.set_title(plot.y_label, loc="left", fontsize=10, color=GREY, x=-0.06, pad=6 + 72 * above)

    colours = iter(PALETTE * (1 + len(plot.curves) // len(PALETTE)))
    names, sizes = [], []
    for curve in plot.curves:
        colour = {"paper": BLUE, "other": GREY, "limit": INK}.get(curve.look) or next(colours)
        _line(axes, curve, colour)
        ends = tuple((dot.x, dot.y) for dot in reversed(curve.dots))
        names.append(Label(curve.name, ends, colour, curve.look != "other"))
        sizes += [Label(d.label, ((d.x, d.y),), colour) for d in curve.dots if d.label]
    _guides(axes, plot)
    lines = [[(dot.x, dot.y) for dot in curve.dots] for curve in plot.curves]
    place_labels(axes, [*sizes, *names], lines)
    return figure


def _line(axes: Axes, curve: Curve, colour: str) -> None:
    xs, ys = [dot.x for dot in curve.dots], [dot.y for dot in curve.dots]
    looks: dict[str, dict[str, Any]] = {
        "here": {"marker": "D", "markersize": 6.5, "linewidth": 2, "zorder": 4},
        "paper": {"marker": "o", "markersize": 7, "linewidth": 2, "zorder": 3},
        "other": {"marker": "o", "markersize": 5, "linewidth": 1.2, "zorder": 2},
        "limit": {"linestyle": (0, (5, 3)), "linewidth": 1.3, "zorder": 1},
    }
    if len(curve.dots) == 1:
        looks["limit"] = {"marker": "_", "markersize": 18, "markeredgewidth": 2, "zorder": 1}
    filled: dict[str, Any] = {} if curve.look == "here" else {"markerfacecolor": "white"}
    axes.plot(xs, ys, color=colour, label=curve.name, **looks[curve.look], **filled)
    for dot in curve.dots:
        for interval, bar in ((dot.x_interval, "x"), (dot.y_interval, "y")):
            if interval is None:
                continue
            pair = ((interval, (dot.y, dot.y)), ((dot.x, dot.x), interval))[bar == "y"]
            axes.plot(*pair, color=colour, linewidth=1, zorder=2.5, label="_interval")


def _guides(axes: Axes, plot: Curves) -> None:
    before, lifted = -math.inf, False
    for guide in sorted(plot.guides, key=lambda g: g.x):
        axes.axvline(guide.x, color=PALE, linewidth=1, zorder=0.5, label="_guide")
        x = float(axes.transData.transform((guide.x, 0))[0])
        # Labels that would touch take turns in two rows.
        lifted = x - before < 45 and not lifted
        before = x
        axes.annotate(
            guide.label, (guide.x, 1), (0, 16 if lifted else 3),
            xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", va="bottom", fontsize=9, color=GREY,
        )  # fmt: skip


@_draw.register
def _bars(plot: Bars) -> Figure:
    labels = ["\n".join(map(visible, bar.label.splitlines())) for bar in plot.bars]
    letters = max(len(line) for label in labels for line in label.splitlines())
    left = min(max(0.85, 0.3 + 0.085 * letters), 3.0)
    several = len(plot.parts) > 1
    colours = _PART_COLOURS if several else (BLUE,)
    height = 0.55 * len(plot.bars) + 0.5
    figure, axes = new_axes(plot.title, plot.subtitle, plot.footnote, height, left)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    longest = max(max(bar.whole, sum(bar.parts), bar.interval[1]) for bar in plot.bars)
    axes.set_xlim(0, longest * 1.2)
    axes.set_ylim(len(plot.bars) - 0.5, -0.6)
    axes.set_yticks(range(len(plot.bars)), labels, color=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.set_xlabel(plot.x_label, loc="right")
    for number, name in enumerate(plot.parts):
        starts = [sum(bar.parts[:number]) for bar in plot.bars]
        widths = [bar.parts[number] for bar in plot.bars]
        colour = colours[number % len(colours)]
        axes.barh(range(len(plot.bars)), widths, 0.62, starts, color=colour, label=name)
        for row, (start, width) in enumerate(zip(starts, widths, strict=True)):
            if several and width > 0.09 * longest:
                axes.text(
                    start + width / 2, row, duration(width), ha="center", va="center",
                    fontsize=8.5, color="white" if colour == BLUE else INK,
                )  # fmt: skip
    for row, bar in enumerate(plot.bars):
        below = row + 0.23  # clear of the figures in the bar
        axes.plot(bar.interval, (below, below), color=INK, linewidth=1, label="_interval")
        end = max(bar.whole, sum(bar.parts), bar.interval[1])
        axes.annotate(
            duration(bar.whole), (end, row), (6, 0), textcoords="offset points", va="center",
            weight="bold", color=INK,
        )  # fmt: skip
    if several:
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=len(plot.parts), frameon=False,
            fontsize=9, handlelength=0.9, handleheight=0.9, columnspacing=1.4, handletextpad=0.5,
            labelcolor=INK,
        )  # fmt: skip
    return figure


@_draw.register
def _ratios(plot: Ratios) -> Figure:
    rows = len(plot.ratios)
    figure, axes = new_axes(plot.title, plot.subtitle, plot.footnote, 0.5 * rows + 0.4, left=2.9)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    values = [v for r in plot.ratios for v in (r.paper, r.here, *(r.interval or ())) if v]
    axes.set_xscale("log")
    axes.set_xlim(min(1.0, *values) / 2, max(values) * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_ylim(rows - 0.5, -0.6)
    axes.set_yticks(range(rows), [ratio.claim for ratio in plot.ratios], color=INK, fontsize=9)
    axes.set_xlabel(plot.x_label, loc="right")
    axes.axvline(1, color=PALE, linewidth=1, label="_guide")
    for row, ratio in enumerate(plot.ratios):
        axes.plot((ratio.paper,), (row,), "o", color=BLUE, markerfacecolor="white", markersize=8)
        ends = [(ratio.paper, BLUE, f"{ratio.paper:#.3g}×")]
        if ratio.here is not None:
            axes.plot((ratio.paper, ratio.here), (row, row), color=PALE, linewidth=2, zorder=0.9)
            filling = "white" if ratio.estimated else VERMILION
            axes.plot(
                (ratio.here,), (row,), "D", color=VERMILION, markersize=7, markerfacecolor=filling,
                label=ratio.claim,
            )  # fmt: skip
            if ratio.interval:
                axes.plot(ratio.interval, (row, row), color=VERMILION, linewidth=1)
            about = "~" if ratio.estimated else ""
            ends.append((ratio.here, VERMILION, f"{about}{ratio.here:#.3g}×"))
        for number, (value, colour, text) in enumerate(sorted(ends)):
            right = number == len(ends) - 1
            axes.annotate(
                text, (value, row), (8 if right else -8, 0),
                textcoords="offset points", ha="left" if right else "right", va="center",
                fontsize=9, color=colour,
            )  # fmt: skip
    for y, words, colour in ((1.0, "○ paper", BLUE), (1.0, "◆ this machine", VERMILION)):
        axes.annotate(
            words, (0 if colour == BLUE else 0.16, y), (0, 4), xycoords="axes fraction",
            textcoords="offset points", va="bottom", color=colour, fontsize=9,
        )  # fmt: skip
    return figure


def _logarithmic(axes: Axes, which: str, values: Sequence[float], wider: float = 1.25) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = min(values) / wider, max(values) * wider
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low, high)
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=_STEPS[min(int(decades), 3)]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_tick))


def _tick(milliseconds: float, _: int | None) -> str:
    value, unit = (milliseconds, "ms") if milliseconds < 1000 else (milliseconds / 1000, "s")
    return f"{value:g} {unit}"
