"""Records -> the document: which sections there are, and what is missing."""

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..record import Machine, Record
from .claims import claims_section
from .document import Document, Fact, Section, Table
from .encoder import encoder_section, roofline_section
from .latency import (
    by_size,
    everything,
    facts,
    parts_section,
    peers_section,
)
from .nano import Evaluation, nano_section
from .published import encoders_section, models_section
from .words import (
    all_circumstances,
    gigabytes,
    has_fastvithd,
    language_model,
    machine_name,
    role,
    run_names,
)

__all__ = ["compose"]

_KINDS = {
    "encoder": "fastvlm bench encoder",
    "ttft": "fastvlm bench ttft",
    "decode": "fastvlm bench decode",
    "memory": "fastvlm bench memory",
    "cold_start": "fastvlm bench all",
    "roofline": "fastvlm bench roofline",
    "prefill": "fastvlm bench claims",
}
"""What a full report measures, and what measures it."""


def compose(records: Sequence[Record], evaluation: Evaluation | None = None) -> Document:
    """The report of some runs, of an evaluation of nano, or of both."""
    commands = tuple(dict.fromkeys(map(_command, records)))
    records = _joined(records)
    plain, claims, peers, rooflines = (
        _named(r for r in records if role(r) == kind)
        for kind in ("", "claims", "peers", "roofline")
    )
    plain.sort(key=lambda run: not has_fastvithd(run[0]))  # the published encoder first
    measured = [record for record, _ in plain]
    sections: list[Section | None] = [by_size(*run) for run in plain]
    if records:
        sections.append(encoders_section(measured))
    if any(language_model(r) not in (None, "Qwen2-0.5B") for r in measured):
        sections.append(models_section(measured))
    sections += [claims_section(*run) for run in claims]
    sections += [parts_section(*run) for run in plain]
    sections.append(encoder_section(measured, [record for record, _ in rooflines]))
    sections += [roofline_section(*run) for run in rooflines]
    sections += [peers_section(*run) for run in (*plain, *peers)]
    if evaluation:
        sections.append(nano_section(evaluation))
    runs = _named(records)
    if records:
        sections.append(_machines(runs))
    sections += [everything(*run) for run in runs]
    return Document(
        title=_title(records, measured),
        subtitle=all_circumstances(records) or (evaluation.where if evaluation else ""),
        facts=_facts(plain),
        sections=_with_own_names([section for section in sections if section]),
        missing=tuple(_missing(runs, evaluation)),
        commands=commands,
    )


def _joined(records: Sequence[Record]) -> list[Record]:
    """The runs, with rooflines of one model on one machine, one size each, as one."""
    joined: dict[object, Record] = {}
    for number, record in enumerate(records):
        what = (record.machine, record.subject.model, record.subject.dtype, record.subject.bits)
        key = what if role(record) == "roofline" else number
        first = joined.get(key)
        measurements = (*first.measurements, *record.measurements) if first else ()
        joined[key] = replace(first, measurements=measurements) if first else record
    return list(joined.values())


def _named(records: Iterable[Record]) -> list[tuple[Record, str]]:
    chosen = list(records)
    return list(zip(chosen, run_names(chosen), strict=True))


def _title(records: Sequence[Record], measured: Sequence[Record]) -> str:
    if not records:
        return "nano: accuracy and latency"
    models = list(dict.fromkeys(record.subject.model for record in measured))
    machines = list(dict.fromkeys(machine_name(record.machine) for record in records))
    which = f" ({models[0]})" if len(models) == 1 else ""
    return f"FastVLM{which} on {' and '.join(machines)}"


def _facts(runs: Sequence[tuple[Record, str]]) -> tuple[Fact, ...]:
    """Of the first run that has any."""
    for record, name in runs:
        if found := facts(record, name if len(runs) > 1 else ""):
            return found
    return ()


def _command(record: Record) -> str:
    words = record.command[record.command[:1] == ("fastvlm",) :]
    return shlex.join(["fastvlm", *words])


def _with_own_names(sections: list[Section]) -> tuple[Section, ...]:
    """Several runs have several sections of a kind: encoder, encoder-2, ..."""
    seen: Counter[str] = Counter()
    named = []
    for section in sections:
        seen[section.name] += 1
        number = seen[section.name]
        named.append(section if number == 1 else replace(section, name=f"{section.name}-{number}"))
    return tuple(named)


def _missing(runs: list[tuple[Record, str]], evaluation: Evaluation | None) -> list[str]:
    lines = []
    for record, name in runs:
        for skipped in record.skipped:
            at = f" at {skipped.image_size} px" if skipped.image_size else ""
            lines.append(f"{name}: {skipped.kind}{at} was skipped: {skipped.reason}")
    measured = {m.kind for record, _ in runs for m in record.measurements}
    skipped_kinds = {s.kind for record, _ in runs for s in record.skipped}
    for kind, command in _KINDS.items():
        if kind not in measured | skipped_kinds:
            what = "claims" if kind == "prefill" else kind.replace("_", " ")
            lines.append(f"{what}: no record has it; `{command} --json` does")
    if evaluation is None:
        lines.append(
            "nano's accuracy over input sizes: `python -m training.nano.evaluate --json FILE`, "
            "then `fastvlm bench report --nano FILE`"
        )
    elif nano_section(evaluation) is None:
        lines.append("nano's accuracy over input sizes: the evaluation has no TTFT")
    return lines


def _machines(runs: list[tuple[Record, str]]) -> Section:
    """What all runs share in one table, what they differ in beside one another in a second."""
    columns = [_facts_of(record) for record, _ in runs]
    shared, different = [], []
    for label in columns[0]:
        values = [column[label] for column in columns]
        if len(set(values)) > 1:
            different.append((label, *(value or "–" for value in values)))
        elif values[0]:
            shared.append((label, values[0]))
    tables = [Table("Machine and software", ("", "of every run"), tuple(shared), words=2)]
    if different:
        header = ("", *(name for _, name in runs))
        tables.append(Table("Where the runs differ", header, tuple(different), words=len(header)))
    return Section(
        "machine",
        "Machine and software",
        "As the runs recorded them; what a system does not tell is left out.",
        tables=tuple(tables),
    )


def _facts_of(record: Record) -> dict[str, str]:
    machine, software, subject = record.machine, record.software, record.subject
    conditions = record.conditions
    parameters = ", ".join(
        f"{part.replace('_', ' ')} {count / 1e6:,.1f} M"
        for part, count in subject.parameters.items()
    )
    blas = software.blas or ""
    if software.openblas_coretype:
        blas += f", OPENBLAS_CORETYPE={software.openblas_coretype}"
    low = {True: "on", False: "off", None: ""}[conditions.low_power_mode]
    return {
        "chip": machine.chip or "",
        "CPU cores": str(machine.cores or ""),
        "GPU": _gpu(machine),
        "memory": f"{gigabytes(machine.memory)} GB" if machine.memory else "",
        "system": machine.system,
        "MLX computes on": machine.device,
        "power": conditions.power_source or "",
        "low-power mode": low,
        "load average before": ""
        if conditions.load_average is None
        else f"{conditions.load_average:g}",
        "model": subject.model,
        "parameters": parameters,
        "type": f"language model {subject.dtype}, vision {subject.vision_dtype}"
        + (f", {subject.bits} bits" if subject.bits else ""),
        "operations": ", ".join(dict.fromkeys(f"{o.op}: {o.form}" for o in subject.operations)),
        "fastvlm-mlx": software.package
        + (f", commit {software.commit}" if software.commit else ""),
        "MLX, mlx-lm, Python": f"{software.mlx}, {software.mlx_lm}, {software.python}",
        "BLAS": blas,
        "others measured": ", ".join(f"{k} {v}" for k, v in software.peers.items()),
        "date": record.date,
    }


def _gpu(machine: Machine) -> str:
    cores = f"{machine.gpu_cores} cores" if machine.gpu_cores else ""
    return ", ".join(part for part in (machine.gpu, cores) if part)
