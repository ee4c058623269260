"""What is asked of a Mac, and what is made of its answers, as they are printed there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvlm_mlx.benchmarks import machine
from fastvlm_mlx.benchmarks.record import Conditions

# Of an M3 Pro with two displays, macOS 15; the keys of an M1 under macOS 11 are the same.
DISPLAYS = {
    "SPDisplaysDataType": [
        {
            "_name": "Apple M3 Pro",
            "spdisplays_mtlgpufamilysupport": "spdisplays_metal3",
            "spdisplays_ndrvs": [{"_name": "DELL U2722DE", "_spdisplays_pixels": "2560 x 1440"}],
            "spdisplays_vendor": "sppci_vendor_Apple",
            "sppci_bus": "spdisplays_builtin",
            "sppci_cores": "14",
            "sppci_device_type": "spdisplays_gpu",
            "sppci_model": "Apple M3 Pro",
        }
    ]
}
BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=19267683)\t87%; discharging; 6:48 remaining present: true
"""
MAINS = "Now drawing from 'AC Power'\n"  # a desktop: no battery is listed
SETTINGS = """System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                1 (sleep prevented by powerd)
 hibernatemode        3
 ttyskeepawake        1
 displaysleep         2
 tcpkeepalive         1
 {mode}
 womp                 0
"""


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A Mac that answers these commands; everything else fails."""
    answers = {
        "sysctl -n machdep.cpu.brand_string": "Apple M3 Pro\n",
        "system_profiler SPDisplaysDataType -json": json.dumps(DISPLAYS, indent=2),
        "sw_vers -productVersion": "26.1\n",
        "pmset -g batt": BATTERY,
        "pmset -g": SETTINGS.format(mode="lowpowermode         0"),
    }

    def run(command: tuple[str, ...], **_: Any) -> Any:
        program, *arguments = command
        # A LaunchAgent or cron may have no /usr/sbin on its PATH.
        assert Path(program).is_absolute()
        words = " ".join([Path(program).name, *arguments])
        if words not in answers:
            raise FileNotFoundError(program)
        return subprocess.CompletedProcess(command, 0, answers[words], "")

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(machine, "device", lambda: "CPU")  # else MLX tells of the real GPU
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("platform.mac_ver", lambda: ("16.0", ("", "", ""), "arm64"))
    return answers


def test_a_mac_is_described(mac: dict[str, str]) -> None:
    found = machine.this_machine()
    assert (found.chip, found.gpu, found.gpu_cores) == ("Apple M3 Pro", "Apple M3 Pro", 14)
    assert found.system == "macOS 26.1, arm64"
    assert found.memory is not None and found.memory > 1 << 30
    mac.clear()
    found = machine.this_machine()
    assert (found.chip, found.gpu, found.gpu_cores) == (None, None, None)
    assert found.system == "macOS 16.0, arm64"


@pytest.mark.parametrize(
    "answer", ["", "not JSON", "{}", '{"SPDisplaysDataType": []}', '{"SPDisplaysDataType": [1]}']
)
def test_a_profiler_that_tells_nothing(mac: dict[str, str], answer: str) -> None:
    mac["system_profiler SPDisplaysDataType -json"] = answer
    assert machine.this_machine().gpu_cores is None


@pytest.mark.parametrize(
    ("mode", "low"),
    [
        ("lowpowermode         0", False),
        ("lowpowermode         1", True),
        ("powermode            0", False),  # MacBook Pro and Mac mini with a high power mode
        ("powermode            1", True),
        ("powermode            2", False),
        ("lessbright           1", None),  # an old Mac that has neither
    ],
)
def test_power_of_a_mac(mac: dict[str, str], mode: str, low: bool | None) -> None:
    mac["pmset -g"] = SETTINGS.format(mode=mode)
    found = machine.conditions_now()
    assert found == Conditions("battery", low, found.load_average)
    mac["pmset -g batt"] = MAINS
    assert machine.conditions_now().power_source == "mains"
    mac["pmset -g batt"] = "Now drawing from 'UPS Power'\n"
    assert machine.conditions_now().power_source is None


def test_what_is_no_text_is_no_crash() -> None:
    """A display may be called anything, and a LaunchAgent may know no encoding."""
    code = "import sys; sys.stdout.buffer.write(b'a\\xffb')"
    assert machine._output(sys.executable, "-c", code) == "a\ufffdb"
    assert machine._output("/no/such/program") is None
    slow = "import time; time.sleep(20)"
    assert machine._output(sys.executable, "-c", slow, seconds=0.2) is None


def test_git_is_asked_in_a_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere it may be a stand-in of macOS, which opens a window; or tell of another project."""
    asked: list[str] = []
    monkeypatch.setattr(machine, "_output", lambda *words, **_: asked.append(words[-1]) or "abc")
    (tmp_path / ".git").mkdir()
    package = tmp_path / "lib" / "site-packages" / "fastvlm_mlx"
    package.mkdir(parents=True)
    assert machine._commit(package) is None and asked == []
    assert machine._commit(tmp_path / "fastvlm_mlx") == "abc+" and len(asked) == 2
