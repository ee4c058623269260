"""What a record says about the computer and the software; whatever is not told is None."""

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

import fastvlm_mlx
from fastvlm_mlx.blas import openblas_loaded
from fastvlm_mlx.memory import physical_memory

from .record import Conditions, Machine, Software

__all__ = [
    "conditions_now",
    "describe_software",
    "others_busy",
    "process_memory",
    "this_machine",
]


def this_machine() -> Machine:
    """The computer that this process runs on."""
    mac = sys.platform == "darwin"
    info: dict[str, Any] = dict(mx.device_info()) if device() != "CPU" else {}
    gpu = str(info["device_name"]) if "device_name" in info else None
    display = _mac_display() if mac else {}
    memory = info.get("memory_size", info.get("total_memory")) if info else None
    return Machine(
        chip=_output("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
        if mac
        else _linux_chip(),
        cores=os.cpu_count(),
        gpu=gpu or display.get("sppci_model"),
        gpu_cores=_number(display.get("sppci_cores")),
        memory=int(memory) if memory else physical_memory(),
        system=_system(),
        device=device(),
    )


def conditions_now() -> Conditions:
    """Power and load at this moment."""
    try:
        load: float | None = round(os.getloadavg()[0], 2)
    except OSError:
        load = None
    if sys.platform == "darwin":
        return Conditions(_mac_power(), _mac_low_power(), load)
    return Conditions(_linux_power(), _linux_low_power(), load)


def describe_software(peers: dict[str, str] | None = None) -> Software:
    """Versions of everything that computes."""
    return Software(
        package=version("fastvlm-mlx"),
        commit=_commit(Path(fastvlm_mlx.__file__).parent),
        python=platform.python_version(),
        mlx=version("mlx"),
        mlx_lm=_version("mlx-lm"),
        blas=_blas(),
        openblas_coretype=os.environ.get("OPENBLAS_CORETYPE"),
        peers=peers or {},
    )


def device() -> str:
    """What MLX computes on."""
    if mx.default_device() == mx.cpu:
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def others_busy() -> float | None:
    """Seconds that all cores have worked for other programs since the machine started.

    Only the difference of two calls means something. None where the system does not tell.
    """
    found = re.match(r"cpu\s+(.+)", _text("/proc/stat"))
    if not found:
        return None
    user, nice, system, _, _, irq, soft, steal = map(int, found.group(1).split()[:8])
    busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])  # our own, and of children that have ended


def process_memory() -> int | None:
    """Resident bytes of this process now."""
    found = re.search(r"VmRSS:\s+(\d+) kB", _text("/proc/self/status"))
    if found:
        return int(found.group(1)) * 1024
    told = _number(_output("ps", "-o", "rss=", "-p", str(os.getpid())))
    return told * 1024 if told else None


def _system() -> str:
    machine = platform.machine()
    if sys.platform == "darwin":
        # A Python built for an earlier system is told 16.0 for 26.0 (cpython issue 135675).
        release = _output("/usr/bin/sw_vers", "-productVersion") or platform.mac_ver()[0]
        return f"macOS {release}, {machine}"
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text("/etc/os-release"), re.MULTILINE)
    return f"{found.group(1) if found else platform.system()}, {machine}"


def _linux_chip() -> str | None:
    found = re.search(r"^model name\s*:\s*(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or None


def _mac_display() -> dict[str, Any]:
    text = _output("/usr/sbin/system_profiler", "SPDisplaysDataType", "-json", seconds=20)
    try:
        return dict(json.loads(text or "{}")["SPDisplaysDataType"][0])
    except (ValueError, KeyError, IndexError, TypeError):
        return {}


def _mac_power() -> str | None:
    told = _output("/usr/bin/pmset", "-g", "batt") or ""
    return "mains" if "AC Power" in told else "battery" if "Battery Power" in told else None


def _mac_low_power() -> bool | None:
    # Macs that also have a high power mode say powermode: 0 automatic, 1 low, 2 high.
    settings = _output("/usr/bin/pmset", "-g") or ""
    found = re.search(r"^\s*(?:low)?powermode\s+(\d)", settings, re.MULTILINE)
    return found.group(1) == "1" if found else None


def _linux_power() -> str | None:
    states = {
        _text(folder / "type").strip(): _text(folder / "online").strip()
        for folder in sorted(Path("/sys/class/power_supply").glob("*"))
    }
    if states.get("Mains") == "1":
        return "mains"
    return "battery" if "Battery" in states else "mains" if "Mains" in states else None


def _linux_low_power() -> bool | None:
    profile = _text("/sys/firmware/acpi/platform_profile").strip()
    return profile == "low-power" if profile else None


def _blas() -> str | None:
    if device() == "CUDA":
        return None
    if sys.platform == "darwin":
        return "Accelerate"
    return "OpenBLAS" if openblas_loaded() else "bundled"


def _commit(folder: Path) -> str | None:
    # The checkout must be the package's own, not one that happens to lie above site-packages. And
    # on a Mac without developer tools, git is a stand-in that opens a window to install them.
    root = folder.resolve().parent
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "--short=10", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _output(*command: str, seconds: float = 5) -> str | None:
    """What a command prints, stripped; None if it is missing, fails or says nothing."""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=seconds,
            check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _number(text: object) -> int | None:
    found = re.match(r"\s*(\d+)", str(text))
    return int(found.group(1)) if found else None
