"""How much memory a model may still take."""

import os
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

__all__ = ["available_memory", "physical_memory"]

_MEMINFO = Path("/proc/meminfo")


def available_memory() -> int | None:
    """Bytes that a model may take now without swapping, of the GPU's memory or the system's.

    None where neither tells.
    """
    if mx.default_device() != mx.cpu:
        info: dict[str, Any] = dict(mx.device_info())
        if mx.metal.is_available():
            return int(info["max_recommended_working_set_size"]) - mx.get_active_memory()
        free = info.get("free_memory", info.get("total_memory", info.get("memory_size")))
        return int(free) if free else None
    told = _MEMINFO.read_text() if _MEMINFO.is_file() else ""
    found = re.search(r"MemAvailable:\s+(\d+) kB", told)
    if found:
        return int(found.group(1)) * 1024
    # macOS tells the whole only; some of it is taken.
    whole = physical_memory()
    return None if whole is None else whole * 3 // 4


def physical_memory() -> int | None:
    """Bytes of memory in this computer; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
