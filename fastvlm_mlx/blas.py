"""OpenBLAS for MLX on Linux.

MLX's Linux wheel bundles the reference BLAS: a few GFLOP/s, one thread. A library whose
`cblas_sgemm` is visible in the process before MLX is imported takes its place, and is 10 to 25
times faster. Debian and Ubuntu have one as `libopenblas0-pthread`.
"""

import ctypes
import ctypes.util
import sys

__all__ = ["INSTALL_HINT", "load_openblas", "openblas_loaded"]

INSTALL_HINT = "apt install libopenblas0-pthread"
_NAMES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")


def load_openblas() -> bool:
    """Make the system's OpenBLAS visible to MLX; True if it is. Call before importing MLX.

    Does nothing on macOS, where MLX uses Accelerate and the GPU, nor once MLX is imported.
    """
    if not sys.platform.startswith("linux") or "mlx.core" in sys.modules:
        return openblas_loaded()
    for name in (ctypes.util.find_library("openblas"), *_NAMES):
        try:
            if name and hasattr(ctypes.CDLL(name, ctypes.RTLD_GLOBAL), "cblas_sgemm"):
                return True
        except OSError:
            continue
    return False


def openblas_loaded() -> bool:
    """Whether the process's global symbols come from OpenBLAS."""
    return hasattr(ctypes.CDLL(None), "openblas_get_num_threads")
