"""What somebody sees whose Python cannot run this."""

import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[1] / "setup.py"


@pytest.mark.parametrize(
    ("as_if", "message"),
    [
        ("sys.version_info = (3, 9, 6)", "needs Python 3.11 or newer; this is 3.9.6"),
        (
            "sys.platform = 'darwin'; platform.machine = lambda: 'x86_64'",
            "this Python is for x86_64",
        ),
        ("sys.platform = 'darwin'; platform.machine = lambda: 'arm64'", None),
        ("", None),
    ],
)
def test_a_python_that_cannot_run_it_is_told_before_anything_is_fetched(
    tmp_path: Path, as_if: str, message: str | None
) -> None:
    code = (
        "import platform, sys, types\n"
        "setuptools = sys.modules['setuptools'] = types.ModuleType('setuptools')\n"
        "setuptools.setup = lambda: print('going on')\n"
        "platform.python_version = lambda: '.'.join(map(str, sys.version_info[:3]))\n"
        f"{as_if}\nexec(open({str(SETUP)!r}).read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if message is None:
        assert (done.returncode, done.stdout) == (0, "going on\n")
    else:
        assert done.returncode == 1 and message in done.stderr and not done.stdout
