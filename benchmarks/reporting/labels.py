"""Labels beside the points and lines that they name, where there is room for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from .words import visible

__all__ = ["Label", "place_labels"]

Points = Sequence[tuple[float, float]]

_SIZE = 9
_DISTANCES = (7, 13, 20, 30)  # points
# Direction from the anchor, and where the text's own left and lower edge then lie in its box.
_DIRECTIONS = (
    (1, 0, 0, 0.5), (0, 1, 0.5, 0), (0, -1, 0.5, 1), (-1, 0, 1, 0.5),
    (0.8, 0.8, 0, 0), (0.8, -0.8, 0, 1), (-0.8, 0.8, 1, 0), (-0.8, -0.8, 1, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Label:
    """A text and the points, best first, of which it may stand beside any one."""

    text: str
    anchors: tuple[tuple[float, float], ...]
    colour: str
    bold: bool = False


def place_labels(axes: Axes, labels: Sequence[Label], lines: Sequence[Points]) -> None:
    """Write each label where it covers least of the points, the lines and the labels before it."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    pixels = figure.dpi / 72
    room = axes.get_window_extent()
    taken = [box for line in lines for box in _boxes(axes, line, pixels)]
    for label in labels:
        weight = "bold" if label.bold else "normal"
        text = visible(label.text)
        probe = axes.annotate(text, (0, 0), xycoords="figure pixels", size=_SIZE, weight=weight)
        extent = probe.get_window_extent()
        probe.remove()
        best, best_cost = (Bbox.null(), (0.0, 0.0, 0.0, 0.0)), float("inf")
        for rank, anchor in enumerate(label.anchors):
            x, y = axes.transData.transform(anchor)
            for distance in _DISTANCES:
                for number, (dx, dy, across, up) in enumerate(_DIRECTIONS):
                    left = x + dx * distance * pixels - across * extent.width
                    lower = y + dy * distance * pixels - up * extent.height
                    box = Bbox.from_bounds(left, lower, extent.width, extent.height)
                    covered = sum(_shared(box, other) for other in taken)
                    outside = extent.width * extent.height - _shared(box, room)
                    cost = covered + outside + pixels * (4 * distance + 2 * number + 12 * rank)
                    if cost < best_cost:
                        best, best_cost = (box, (left, lower, *anchor)), cost
        box, (left, lower, x, y) = best
        taken.append(box)
        at = axes.transData.transform((x, y))
        axes.annotate(
            text, (x, y), ((left - at[0]) / pixels, (lower - at[1]) / pixels),
            textcoords="offset points", ha="left", va="bottom", size=_SIZE, color=label.colour,
            weight=weight, annotation_clip=False,
        )  # fmt: skip


def _boxes(axes: Axes, line: Points, pixels: float) -> list[Bbox]:
    """What a line with markers covers, as many small boxes."""
    screen = [axes.transData.transform(point) for point in line]
    boxes = [_around(x, y, 5 * pixels) for x, y in screen]
    for (x0, y0), (x1, y1) in pairwise(screen):
        steps = max(2, round(max(abs(x1 - x0), abs(y1 - y0)) / (4 * pixels)))
        for step in range(1, steps):
            at = step / steps
            boxes.append(_around(x0 + at * (x1 - x0), y0 + at * (y1 - y0), 2 * pixels))
    return boxes


def _around(x: float, y: float, radius: float) -> Bbox:
    return Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)


def _shared(a: Bbox, b: Bbox) -> float:
    """Area that both cover, in pixels."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(0, width) * max(0, height))
