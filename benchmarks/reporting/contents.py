"""Records -> the document: which sections there are, and what is missing."""

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from ..record import Machine, Record
from .document import Document, Section, Table
from .latency import (
    by_size,
    encoder_section,
    everything,
    facts,
    parts_section,
    peers_section,
)
from .nano import Evaluation, nano_section
from .published import encoders_section, models_section
from .words import circumstances, gigabytes, language_model, machine_name, run_names

__all__ = ["compose"]

_KINDS = {
    "encoder": "fastvlm bench encoder",
    "ttft": "fastvlm bench ttft",
    "decode": "fastvlm bench decode",
    "memory": "fastvlm bench memory",
    "cold_start": "fastvlm bench all",
}
"""What a full report measures, and what measures it."""


def compose(records: Sequence[Record], evaluation: Evaluation | None = None) -> Document:
    """The report of some runs, of an evaluation of nano, or of both."""
    names = run_names(records)
    runs = list(zip(records, names, strict=True))
    sections: list[Section | None] = [by_size(*run) for run in runs]
    if records:
        sections.append(encoders_section(records, names))
        if any(language_model(r) not in (None, "Qwen2-0.5B") for r in records):
            sections.append(models_section(records, names))
    sections += [parts_section(*run) for run in runs]
    sections.append(encoder_section(records, names))
    sections += [peers_section(*run) for run in runs]
    if evaluation:
        sections.append(nano_section(evaluation))
    if records:
        sections.append(_machines(runs))
    sections += [everything(*run) for run in runs]
    machines = list(dict.fromkeys(machine_name(r.machine) for r in records))
    models = list(dict.fromkeys(r.subject.model for r in records))
    return Document(
        title=f"FastVLM ({', '.join(models)}) on {' and '.join(machines)}" if records else "nano",
        subtitle="; ".join(map(circumstances, records)) or (evaluation.where if evaluation else ""),
        facts=facts(records[0]) if len(records) == 1 else (),
        sections=_with_own_names([section for section in sections if section]),
        missing=tuple(_missing(runs, evaluation)),
        commands=tuple(dict.fromkeys(_command(r) for r in records)),
    )


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
            lines.append(f"{kind.replace('_', ' ')}: no record has it; `{command} --json` does")
    if evaluation is None:
        lines.append(
            "nano's accuracy over input sizes: `python -m training.nano.evaluate --json FILE`, "
            "then `fastvlm bench report --nano FILE`"
        )
    elif nano_section(evaluation) is None:
        lines.append("nano's accuracy over input sizes: the evaluation has no TTFT")
    return lines


def _machines(runs: list[tuple[Record, str]]) -> Section:
    columns = [_facts_of(record) for record, _ in runs]
    return Section(
        "machine",
        "Machine and software",
        "As the runs recorded them; what a system does not tell is left out.",
        tables=(
            Table(
                "Machine and software",
                ("", *(name for _, name in runs)),
                tuple(
                    (label, *(column[label] or "–" for column in columns))
                    for label in columns[0]
                    if any(column[label] for column in columns)
                ),
                words=1 + len(runs),
            ),
        ),
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
