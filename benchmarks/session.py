"""One `fastvlm bench` run at the command line: measure, show, keep what there is."""

import datetime
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastvlm_mlx.cli.output import loading_progress, say

from .machine import conditions_now, describe_software, this_machine
from .measuring import Effort
from .record import Machine, Measurement, Record, Skipped, Subject, check_replaceable, write_record
from .running import perform, plan
from .subjects import Choice, build, describe
from .tables import Report, heading

__all__ = ["Keeper", "machine_folder", "new_record", "public_command", "run_session"]


def run_session(
    choice: Choice,
    kinds: Sequence[str],
    sizes: Sequence[int],
    effort: Effort,
    context: int | None,
    path: Path | None,
    command: Sequence[str],
) -> bool:
    """Measure and print; True if nothing failed. What was measured is on disk at all times."""
    started_under = new_record(command, None)  # before our own work counts as load
    with loading_progress() as progress:
        vlm = build(choice, announce=say, progress=progress)
    keeper = Keeper(replace(started_under, subject=describe(choice, vlm)), path)
    record = keeper.record
    with Report(heading(record.machine, record.software, record.subject)) as report, keeper:
        for result in perform(plan(choice, vlm, kinds, sizes, effort, context), report.watch):
            keeper.add(result)
            report.add(result)
    return keeper.record.finished


def new_record(command: Sequence[str], subject: Subject | None) -> Record:
    """A record without measurements, of now and here."""
    return Record(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=public_command(command),
        machine=this_machine(),
        conditions=conditions_now(),
        software=describe_software(),
        subject=subject or Subject("", {}, "", "", None, ()),
        finished=False,
    )


class Keeper:
    """A growing record, written after every result; unfinished until its context ends well.

    An earlier record at its place stays until there is a result to replace it with. Raises
    BenchmarkError for a place that cannot be written, or that holds something else.
    """

    def __init__(self, record: Record, path: Path | None) -> None:
        self.record = record
        self._path = _file(path, record) if path is not None else None
        if self._path is not None and self._path.exists():
            check_replaceable(self._path)
        else:
            self._save()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = any(s.reason.startswith("failed") for s in self.record.skipped)
        self.record = replace(self.record, finished=kind is None and not failed)
        if self._path is not None and (self.record.measurements or self.record.skipped):
            self._save()
            state = "" if self.record.finished else ", incomplete"
            say(f"The record is in {self._path}{state}.")

    def add(self, result: Measurement | Skipped) -> None:
        """Append and write."""
        record = self.record
        if isinstance(result, Measurement):
            self.record = replace(record, measurements=(*record.measurements, result))
        else:
            self.record = replace(record, skipped=(*record.skipped, result))
        self._save()

    def _save(self) -> None:
        if self._path is not None:
            write_record(self.record, self._path)


def public_command(command: Sequence[str]) -> tuple[str, ...]:
    """The command without the folders of this computer: of a path only the last part."""
    return tuple("=".join(map(_last_part, word.split("="))) for word in command)


def _last_part(word: str) -> str:
    return Path(word).name if word.startswith(("/", "~")) else word


def machine_folder(machine: Machine) -> str:
    """A folder name for results: "apple-m1-max-32-core-gpu-64gb", "linux-2core"."""
    if machine.device == "CPU" and not machine.system.startswith("macOS"):
        return f"linux-{machine.cores}core"
    chip = machine.gpu or machine.chip or "unknown"
    parts = [chip]
    if machine.gpu_cores:
        parts.append(f"{machine.gpu_cores}-core-gpu")
    if machine.memory:
        parts.append(f"{machine.memory / 2**30:.0f}gb")
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _file(path: Path, record: Record) -> Path:
    if not (path.is_dir() or str(path).endswith(os.sep)):
        return path
    bits = f"-{record.subject.bits}bit" if record.subject.bits else ""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{record.subject.model}-{record.subject.dtype}{bits}")
    return path / machine_folder(record.machine) / f"{name}.json"
