"""Sections that set this machine beside the paper: accuracy against latency."""

from collections.abc import Sequence

from ..paper import FIGURE_1A, MODELS, ModelRow
from ..record import Record
from .document import Section, Table
from .latency import sizes_of
from .plots import Curve, Curves, Dot
from .words import all_circumstances, interval, language_model, run_names

__all__ = ["encoders_section", "models_section"]

_AXIS = "time to first token (encoder + prefill of the visual tokens)"
_ACCURACY = "GQA, TextVQA, POPE, DocVQA and SeedBench"
_THEIRS = (
    "The paper's times are from its own machine: M1 Max, encoder by Core ML on the Neural Engine, "
    "language model by MLX in float16 on the GPU."
)
_DATA = "15+1.1"
"""Training data (millions of samples) of the rows of Table 6 that are compared."""


def encoders_section(records: Sequence[Record]) -> Section:
    """Figure 1a: encoders in front of Qwen2-0.5B, and FastVLM's points as timed here."""
    published: dict[str, list[Dot]] = {}
    for point in FIGURE_1A:
        dot = Dot(point.ttft_ms, point.avg5, f"{point.side}")
        published.setdefault(point.encoder, []).append(dot)
    ours = {int(dot.label): dot for dot in published.pop("FastViTHD")}
    accuracy = {side: dot.y for side, dot in ours.items()}
    here = _measured_curves(records, "Qwen2-0.5B", accuracy)
    curves = [_curve(name, dots, "other") for name, dots in published.items()]
    curves.append(_curve("FastVLM, paper (M1 Max)", list(ours.values()), "paper"))
    rows = [
        (f"{encoder}, paper", f"{dot.label} px", f"{dot.y:.1f}", f"{dot.x:,.0f}")
        for encoder, dots in [("FastViTHD (FastVLM)", list(ours.values())), *published.items()]
        for dot in dots
    ]
    timed = "; FastVLM's times here are measured" if here else ", and so are all times"
    return Section(
        "accuracy-latency",
        "Accuracy against time to first token",
        "Encoders in front of the same language model, Qwen2-0.5B. "
        f"Accuracy is the paper's{timed}.",
        Curves(
            "FastVLM: accuracy against time to first token",
            _circumstances(records, "Qwen2-0.5B"),
            _AXIS,
            f"accuracy, mean of {_ACCURACY}, %",
            (*curves, *(curve for curve, _ in here)),
            "Numbers at points: input side in pixels. Accuracy is the paper's at every point (its "
            "Figure 1a: Qwen2-0.5B in the LLaVA-1.5 setup; those weights are not published)."
            f"{_HERE if here else ''} {_THEIRS}",
        ),
        (
            Table(
                "TTFT as in the paper, whose own times are read off a figure, about 1 ms uncertain",
                ("encoder", "input", "accuracy, %", "TTFT, ms"),
                (*rows, *(row for _, some in here for row in some)),
                words=2,
            ),
        ),
    )


_HERE = " Filled diamonds: timed on the machine named above."


def models_section(records: Sequence[Record]) -> Section:
    """Table 6: FastVLM's language models, trained on the same data, and LLaVA-1.5."""
    groups: dict[str, list[ModelRow]] = {}
    for row in MODELS:
        if row.model == "FastVLM" and row.data == _DATA:
            groups.setdefault(row.language_model, []).append(row)
    llava = next(row for row in MODELS if row.model == "LLaVA-1.5")
    curves = [_curve("LLaVA-1.5 7B", [_dot(llava)], "other")]
    rows: list[tuple[str, ...]] = []
    for name, group in groups.items():
        curves.append(_curve(f"FastVLM {_short(name)}", [_dot(row) for row in group], "paper"))
    for label, group in [("LLaVA-1.5", [llava]), *((f"FastVLM {k}", v) for k, v in groups.items())]:
        rows += [
            (f"{label}, paper", f"{r.side} px", f"{r.avg5:.1f}", f"{r.ttft_ms:,.0f}", r.name)
            for r in group
        ]
    for name, group in groups.items():
        accuracy = {r.side: r.avg5 for r in group if r.side and r.avg5 is not None}
        for curve, some in _measured_curves(records, name, accuracy):
            curves.append(curve)
            rows += [(*row, _DASH) for row in some]
    here = any(curve.look == "here" for curve in curves)
    return Section(
        "models",
        "FastVLM's language models",
        "The published sizes of FastVLM, trained on the same data, and LLaVA-1.5. "
        "Accuracy is the paper's.",
        Curves(
            "FastVLM's language models: accuracy against time to first token",
            _circumstances(records, *groups),
            _AXIS,
            f"accuracy, mean of {_ACCURACY}, %",
            tuple(curves),
            "Numbers at points: input side in pixels. Accuracy is the paper's at every point "
            f"(Table 6, {_DATA.replace('+', ' M pairs and ')} M instructions)."
            f"{_HERE if here else ''} {_THEIRS}",
        ),
        (
            Table(
                "TTFT as in the paper",
                ("model", "input", "accuracy, %", "TTFT, ms", "row of Table 6"),
                tuple(rows),
                words=2,
            ),
        ),
    )


_DASH = "–"


def _short(language_model: str) -> str:
    return language_model.removeprefix("Qwen2-").replace("Vicuna-7B", "Vicuna 7B")


def _dot(row: ModelRow) -> Dot:
    assert row.ttft_ms is not None and row.avg5 is not None
    return Dot(row.ttft_ms, row.avg5, str(row.side))


def _curve(name: str, dots: list[Dot], look: str) -> Curve:
    """A lone point's label is part of its name."""
    if len(dots) == 1:
        return Curve(f"{name}, {dots[0].label}", (Dot(dots[0].x, dots[0].y),), look)
    return Curve(name, tuple(dots), look)


def _measured_curves(
    records: Sequence[Record], language: str, accuracy: dict[int, float]
) -> list[tuple[Curve, list[tuple[str, ...]]]]:
    """FastVLM with that language model as timed in each run, and the rows of a table."""
    found: list[tuple[Curve, list[tuple[str, ...]]]] = []
    runs = [r for r in records if language_model(r) == language and r.find("ttft")]
    for record, name in zip(runs, run_names(runs), strict=True):
        dots: list[Dot] = []
        rows: list[tuple[str, ...]] = []
        for side in sizes_of(record, "ttft"):
            measurement = record.find("ttft", side)
            if measurement is None or "paper" not in measurement.seconds or side not in accuracy:
                continue
            time = measurement.summaries["paper"]
            dots.append(
                Dot(
                    1000 * time.median,
                    accuracy[side],
                    str(side),
                    x_interval=(1000 * time.low, 1000 * time.high),
                )
            )
            label = f"FastVLM {_short(language)}, {name}"
            rows.append((label, f"{side} px", f"{accuracy[side]:.1f}", interval(time)))
        if dots:
            found.append((Curve(f"FastVLM {_short(language)}, {name}", tuple(dots), "here"), rows))
    return found


def _circumstances(records: Sequence[Record], *languages: str) -> str:
    """Of the runs that are in the figure."""
    runs = [r for r in records if language_model(r) in languages]
    nothing = "Published points only: no run of this language model in the report"
    return all_circumstances(runs) if runs else nothing
