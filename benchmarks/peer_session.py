"""`fastvlm bench peers` at the command line: checkpoints for all sides, then the runs."""

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastvlm_mlx.checkpoint.source import checkpoint_folder
from fastvlm_mlx.cli.output import loading_progress, say
from fastvlm_mlx.errors import BenchmarkError, OptionError
from fastvlm_mlx.opening import load
from fastvlm_mlx.testing import random_checkpoint

from .comparison import compare_times
from .measuring import Effort
from .peers import DIALECTS, Peer, beside
from .record import OURS, Record, Skipped
from .running import Step
from .session import Keeper, new_record
from .subjects import Choice, describe
from .tables import Report, heading

__all__ = ["run_peers"]


def run_peers(
    choice: Choice,
    wanted: Sequence[tuple[str, Path]],
    size: int | None,
    effort: Effort,
    path: Path | None,
    command: Sequence[str],
) -> bool:
    """Measure this library and its peers in turn; True if every peer could be measured.

    A given checkpoint is read by all sides, so it must be in a layout that they know; random
    weights are written in each one's own.
    """
    if choice.bits is not None:
        raise OptionError("--bits is not for peers: all sides run the checkpoint as it is.")
    if choice.source is not None and size is not None:
        raise OptionError("--size needs --random: a checkpoint has a size of its own.")
    record = new_record(command, None)
    with contextlib.ExitStack() as stack:
        folders = _checkpoints(choice, [name for name, _ in wanted], size, stack)
        with loading_progress() as progress:
            vlm = load(
                folders[wanted[0][0]], dtype=choice.dtype, feature_cache=None,
                announce=say, progress=progress,
            )  # fmt: skip
        subject = describe(choice, vlm)
        peers, skipped = [], []
        for name, python in wanted:
            try:
                peer = Peer(name, python, folders[name], subject.dtype)
                stack.callback(peer.close)
                peers.append(peer)
            except BenchmarkError as error:
                skipped.append(Skipped(f"peer {name}", None, f"failed: {error}"))
        versions = {peer.name: peer.version for peer in peers}
        software = replace(record.software, peers=versions)
        keeper = Keeper(replace(record, subject=subject, software=software), path)
        with Report(heading(record.machine, software, subject)) as report, keeper:
            for reason in skipped:
                keeper.add(reason)
                report.add(reason)
            step = Step("in turn", vlm.config.vision.image_size, lambda tick: None)  # type: ignore[arg-type,return-value]
            watch = report.watch
            for result in beside(vlm, peers, effort, lambda *runs: watch(step, *runs)):
                keeper.add(result)
                report.add(result)
        print(*ratios(keeper.record), sep="\n")
    return keeper.record.finished


def ratios(record: Record) -> list[str]:
    """How many times as long as ours each peer takes."""
    lines = []
    for m in record.measurements:
        ours = record.find(m.kind, m.image_size)
        if m.implementation == OURS or ours is None or m.headline is None:
            continue
        ratio, low, high, _ = compare_times(ours.seconds[m.headline], m.seconds[m.headline])
        name = "TTFT" if m.kind == "ttft" else m.kind
        lines.append(
            f"{name}: {m.implementation} takes {ratio:.2f} times as long ({low:.2f} to {high:.2f})"
        )
    return lines


def _checkpoints(
    choice: Choice, names: Sequence[str], size: int | None, stack: contextlib.ExitStack
) -> dict[str, Path]:
    if choice.source is not None:
        folder = stack.enter_context(checkpoint_folder(choice.source, announce=say))
        return dict.fromkeys(names, folder)
    root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    say(f"Writing random {choice.random} for {', '.join(names)} ...")
    return {
        name: random_checkpoint(root / name, str(choice.random), DIALECTS[name], image_size=size)
        for name in names
    }
