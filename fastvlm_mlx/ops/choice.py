"""Competing forms of an operation are timed once per device and shape; the winner is remembered.

The file in the user's cache directory is only ever a hint: one that is missing, damaged or cannot
be written costs a new timing, never an error.
"""

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

CALLS, RUNS = 3, 5  # calls per evaluation, so that waiting for the GPU weighs less; evaluations
MARGIN = 0.03  # within it, the form listed first: forms do not change with the noise of a run

Run = Callable[[], mx.array]

_winners: dict[str, str] = {}
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
    with _lock:
        if _winners.get(key) not in forms:
            known = _read().get(_environment(), {}).get(key)
            if known in forms:
                _winners[key] = known
            else:
                winner = _time(forms, prepare)
                _winners[key] = winner or forms[0]
                if winner:
                    _remember(key, winner)
        return _winners[key]


def winners() -> dict[str, str]:
    """What has been chosen so far in this process."""
    return dict(_winners)


def _can_time() -> bool:
    """Only Metal has competing forms."""
    return mx.metal.is_available()


def _time(forms: tuple[str, ...], prepare: Callable[[], Mapping[str, Run]]) -> str | None:
    """The fastest form, or None where nothing could be timed: then the next process tries again."""
    seconds: dict[str, float] = {}
    with suppress(Exception):  # out of memory, say: the case itself may still run
        runs = prepare()
        for form in forms:
            with suppress(Exception):  # a form that cannot be built does not win
                seconds[form] = measure(runs[form])
    limit = min(seconds.values(), default=0.0) * (1 + MARGIN)
    return next((form for form in forms if form in seconds and seconds[form] <= limit), None)


def measure(run: Run) -> float:
    """Median seconds of an evaluation of a few calls, after one that compiles."""
    times = []
    for _ in range(RUNS + 1):
        calls = [run() for _ in range(CALLS)]
        start = time.perf_counter()
        mx.eval(calls)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


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
