"""What a figure shows, as plain data; `figures.py` draws it, and tables print the same numbers."""

from dataclasses import dataclass

__all__ = ["Bar", "Bars", "Curve", "Curves", "Dot", "Guide", "Plot", "Ratio", "Ratios"]


@dataclass(frozen=True)
class Dot:
    """A measured or published point."""

    x: float
    y: float
    label: str = ""
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """Points that belong together."""

    name: str
    dots: tuple[Dot, ...]
    look: str
    """"here" (measured on a machine of the report), "paper" (FastVLM as published), "other"
    (other networks as published) or "limit" (a bound: a dashed line without points)."""


@dataclass(frozen=True)
class Guide:
    """A vertical line with a label at its top."""

    x: float
    label: str


@dataclass(frozen=True)
class Curves:
    """Points over a logarithmic axis of milliseconds, or of pixels if `y_milliseconds`."""

    title: str
    subtitle: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    footnote: str
    guides: tuple[Guide, ...] = ()
    y_milliseconds: bool = False
    """Milliseconds upwards, logarithmic, over linear sides in pixels."""


@dataclass(frozen=True)
class Bar:
    """One row: the parts of a time, in the order in which they happen, and the whole."""

    label: str
    parts: tuple[float, ...]
    """Milliseconds."""
    whole: float
    """Measured by a clock around the parts, which is not exactly their sum."""
    interval: tuple[float, float]


@dataclass(frozen=True)
class Bars:
    """Stacked horizontal bars over a linear axis of milliseconds."""

    title: str
    subtitle: str
    x_label: str
    parts: tuple[str, ...]
    bars: tuple[Bar, ...]
    footnote: str


@dataclass(frozen=True)
class Ratio:
    """A published ratio and the one measured here, None where it was not."""

    claim: str
    paper: float
    here: float | None
    interval: tuple[float, float] | None = None
    estimated: bool = False
    """Scaled up from a part that was measured."""


@dataclass(frozen=True)
class Ratios:
    """Pairs of ratios over a logarithmic axis."""

    title: str
    subtitle: str
    x_label: str
    ratios: tuple[Ratio, ...]
    footnote: str


Plot = Curves | Bars | Ratios
