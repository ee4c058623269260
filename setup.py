"""Says at once what pip would not, or not clearly; everything else is in pyproject.toml.

The pip of Apple's own Python 3.9 complains of a dependency before it looks at our Python, and there
is no MLX for Intel Macs and Intel Pythons.
"""

import platform
import sys

from setuptools import setup

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        f"fastvlm-mlx needs Python 3.11 or newer; this is {platform.python_version()}. Make the "
        "environment with a newer one (on a Mac: brew install python), after removing this one."
    )
if sys.platform == "darwin" and platform.machine() != "arm64":
    sys.exit(
        "fastvlm-mlx needs an Apple-silicon Mac and an arm64 Python, as MLX does; this Python is "
        f"for {platform.machine()}."
    )

setup()
