"""Numbers, machines and runs in words."""

from collections.abc import Sequence

from ..record import Machine, Record
from ..summary import Summary

__all__ = [
    "all_circumstances",
    "circumstances",
    "duration",
    "gigabytes",
    "has_fastvithd",
    "interval",
    "language_model",
    "machine_name",
    "milliseconds",
    "of_run",
    "role",
    "run_names",
    "visible",
    "where",
]

FASTVITHD = 122.7e6
"""Parameters of the folded encoder, without the head that a VLM never uses."""

LANGUAGE_MODELS = {"Qwen2-0.5B": 0.494e9, "Qwen2-1.5B": 1.544e9, "Qwen2-7B": 7.616e9}
"""Parameters, embeddings included; Vicuna and others are no language model of a release."""


def duration(milliseconds: float) -> str:
    """Three significant digits: in ms below a second, in s from there."""
    value, unit = (milliseconds, "ms") if milliseconds < 999.5 else (milliseconds / 1000, "s")
    return f"{value:#.3g}".rstrip(".") + f" {unit}" if value < 999.5 else f"{value:,.0f} {unit}"


def milliseconds(seconds: float) -> str:
    """Milliseconds, three significant digits or, above 100, whole."""
    value = 1000 * seconds
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{decimals}f}"


def interval(summary: Summary) -> str:
    """Milliseconds: the median and its confidence interval."""
    low, high = milliseconds(summary.low), milliseconds(summary.high)
    return f"{milliseconds(summary.median)} ({low} to {high})"


def gigabytes(size: int) -> str:
    """GB of 10^9 bytes."""
    return f"{size / 1e9:.2f}"


def visible(text: str) -> str:
    """On one line; what cannot be printed (or turns the direction of writing) shows as such."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def machine_name(machine: Machine) -> str:
    """Chip, cores and GPU cores, as far as the system told."""
    parts = [machine.chip or "unknown chip"]
    if machine.device == "CUDA" and machine.gpu:
        return f"{machine.gpu}, {parts[0]}"
    if machine.cores:
        parts.append(f"{machine.cores} cores")
    if machine.gpu_cores:
        parts.append(f"{machine.gpu_cores}-core GPU")
    return ", ".join(parts)


def circumstances(record: Record) -> str:
    """The line under a figure's title: machine, versions, model, type, date."""
    return all_circumstances([record])


def all_circumstances(records: Sequence[Record]) -> str:
    """The same of several runs; what they share is said once."""
    groups: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        what = record.subject
        dtype = what.dtype if what.bits is None else f"{what.bits} bits, {what.dtype}"
        shared = (machine_name(record.machine), record.software.mlx, record.date[:10])
        groups.setdefault(shared, {})[f"{what.model}, {dtype}"] = record
    lines = []
    for (_, mlx, date), runs in groups.items():
        machine = next(iter(runs.values())).machine
        lines.append(where(machine, mlx, "; ".join(runs), date))
    return " | ".join(lines)


def where(machine: Machine, mlx: str, what: str, date: str) -> str:
    """Machine, version of MLX, what was measured, and the day of an ISO 8601 date."""
    return " · ".join((machine_name(machine), f"MLX {mlx} on {machine.device}", what, date[:10]))


def has_fastvithd(record: Record) -> bool:
    """Whether the encoder is the published one, by its size; nano's is not."""
    return abs(record.subject.parameters.get("vision", 0) / FASTVITHD - 1) < 0.05


def language_model(record: Record) -> str | None:
    """Which of the released language models the run's has the size of; None if none."""
    count = record.subject.parameters.get("language_model", 0)
    for name, parameters in LANGUAGE_MODELS.items():
        if abs(count / parameters - 1) < 0.05:
            return name
    return None


_HERE = "this machine"


def of_run(title: str, name: str) -> str:
    """A title that names the run, unless there is only one."""
    return title if name == _HERE else f"{title}: {name}"


def role(record: Record) -> str:
    """What the run was for: "claims", "peers", "roofline"; "" if it is a plain measurement."""
    kinds = {m.kind for m in record.measurements}
    if "prefill" in kinds or "FastViTHD" in record.subject.parameters:
        return "claims"
    if record.software.peers:
        return "peers"
    return "roofline" if kinds == {"roofline"} else ""


def run_names(records: Sequence[Record]) -> list[str]:
    """A short name for each run, as long as it must be to tell them apart."""
    if len(records) == 1:
        return [_HERE]
    roles = [role(r) if role(r) != r.subject.model else "" for r in records]
    models = [f"{r.subject.model} {kind}".strip() for r, kind in zip(records, roles, strict=True)]
    machines = [machine_name(r.machine) for r in records]
    candidates = (
        [r.machine.gpu or r.machine.chip or "unknown chip" for r in records],
        models,
        machines,
        [f"{model}, {machine}" for model, machine in zip(models, machines, strict=True)],
        [f"{m}, {r.subject.dtype}, {r.date[:16]}" for m, r in zip(models, records, strict=True)],
    )
    for names in candidates:
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(models, 1)]
