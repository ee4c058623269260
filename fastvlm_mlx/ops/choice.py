"""Competing forms of an operation are timed once per device and size; the winner is remembered.

The first answer waits for it, so it is kept short: small cases take the form listed first, sizes
alike share a winner, what is timed is never larger than one picture of 1024 x 1024, and a process
spends at most BUDGET seconds on it; what is left then, the next process times.

The file in the user's cache directory is only ever a hint: one that is missing, damaged or cannot
be written costs a new timing, never an error.
"""

import functools
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from .device import device_info, is_assumed

ROUNDS = 5  # evaluations of each form that count
CALLS = 3  # calls per evaluation, so that waiting for the GPU weighs less; one where it is
LONG = 2e-3  # longer than this, in seconds
CASE, BUDGET = 0.15, 3.0  # seconds for the rounds of a case; for all cases of a process
MARGIN = 0.03  # within it, the form listed first: forms do not change with the noise of a run
WORTH = 2**23  # multiply-adds of a case that is timed: below, its launch takes most of the time

Run = Callable[[], mx.array]

_winners: dict[str, str] = {}
_spent = 0.0
_lock = threading.Lock()


def fastest(
    op: str, case: str, forms: tuple[str, ...], prepare: Callable[[], Mapping[str, Run]]
) -> str:
    """The fastest of `forms` for this case of an operation; forms[0] where nothing can be timed.

    `prepare` makes inputs of the case's shapes and returns a call for each form. It is asked only
    where the answer is not known yet, and runs eagerly, also while MLX traces a graph.
    """
    if is_assumed() or not _can_time() or len(forms) == 1:
        return forms[0]
    key = f"{op} {case}"
    winner = _winners.get(key)
    if winner in forms:
        return winner
    with _lock:
        winner = _winners.get(key, _remembered().get(key))
        if winner not in forms:
            winner = _timed(key, forms, prepare)
        _winners[key] = winner
    return winner


def typical(size: int, most: int) -> int:
    """The power of four nearest to `size`, at most `most`: sizes alike share their winner."""
    power = size.bit_length() // 2
    while power > 0 and 4**power > most:
        power -= 1
    return int(4**power)


def winners() -> dict[str, str]:
    """What has been chosen so far in this process."""
    return dict(_winners)


def _can_time() -> bool:
    """Only Metal has competing forms."""
    return mx.metal.is_available()


def _timed(key: str, forms: tuple[str, ...], prepare: Callable[[], Mapping[str, Run]]) -> str:
    """The fastest form, also remembered; forms[0] where nothing could be timed, or not any more."""
    global _spent
    if _spent > BUDGET:
        return forms[0]
    start = time.perf_counter()
    seconds: dict[str, float] = {}
    with suppress(Exception):  # whatever it is, the case itself may still run
        runs = prepare()
        seconds = measure({form: runs[form] for form in forms if form in runs})
    _spent += time.perf_counter() - start
    limit = min(seconds.values(), default=0.0) * (1 + MARGIN)
    for form in forms:
        if form in seconds and seconds[form] <= limit:
            _remember(key, form)
            return form
    return forms[0]


def measure(runs: Mapping[str, Run]) -> dict[str, float]:
    """Median seconds of a call of each form, but for those that fail.

    Forms take turns, because a GPU that was idle raises its clock only after a while. The first
    evaluation compiles, the second tells how long a call takes; neither counts.
    """
    first = {}
    for form, run in runs.items():
        with suppress(Exception):  # a form that cannot be built does not win
            _seconds(run, 1)
            first[form] = _seconds(run, 1)
    calls = CALLS if min(first.values(), default=0.0) < LONG else 1
    times: dict[str, list[float]] = {form: [] for form in first}
    start = time.perf_counter()
    for _ in range(ROUNDS):
        for form, taken in times.items():
            taken.append(_seconds(runs[form], calls) / calls)
        if time.perf_counter() - start > CASE:
            break
    return {form: statistics.median(taken) for form, taken in times.items()}


def _seconds(run: Run, calls: int) -> float:
    arrays = [run() for _ in range(calls)]
    start = time.perf_counter()
    mx.eval(arrays)
    return time.perf_counter() - start


def _environment() -> str:
    """What a measurement holds for."""
    system = platform.mac_ver()[0] or platform.release()
    versions = f"MLX {version('mlx')}, fastvlm-mlx {version('fastvlm-mlx')}"
    device = device_info()
    chip = device.get("device_name", device.get("architecture", "unknown"))
    return f"{chip}, {platform.system()} {system}, {versions}"


def cache_file() -> Path:
    """Where the winners are kept."""
    if sys.platform == "darwin":
        folder = Path("~/Library/Caches")
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return folder.expanduser() / "fastvlm-mlx" / "fastest-forms.json"


def _read() -> dict[str, dict[str, str]]:
    """The winners per environment; whatever does not look like that is left out."""
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError, RecursionError):  # RuntimeError: no home directory
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        environment: {case: form for case, form in cases.items() if isinstance(form, str)}
        for environment, cases in found.items()
        if isinstance(cases, dict)
    }


@functools.cache
def _remembered() -> dict[str, str]:
    """What this process found in the file."""
    return _read().get(_environment(), {})


def _remember(key: str, winner: str) -> None:
    """Add one winner to the file, in one step: readers see the old file or the new one."""
    winners = _read()
    winners.setdefault(_environment(), {})[key] = winner
    with suppress(OSError, RuntimeError):
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        try:
            part.write_text(json.dumps(winners, indent=1, sort_keys=True), encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
