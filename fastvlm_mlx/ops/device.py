"""Which family of forms applies where this process runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import mlx.core as mx

Backend = Literal["reference", "metal", "cuda", "cpu"]

_assumed: ContextVar[Backend | None] = ContextVar("fastvlm_assumed_backend", default=None)


def backend() -> Backend:
    """The backend of the default device, or "reference" where FASTVLM_OPS asks for plain forms."""
    if os.environ.get("FASTVLM_OPS") == "reference":
        return "reference"
    if assumed := _assumed.get():
        return assumed
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def is_assumed() -> bool:
    """Whether the backend is only assumed: graphs may be built for it, but nothing can run."""
    return _assumed.get() is not None


def has_matrix_units() -> bool:
    """Whether the GPU is of a generation with matrix units (M5: applegpu_g17 and later)."""
    architecture = str(device_info().get("architecture", ""))
    generation = "".join(c for c in architecture.partition("applegpu_g")[2] if c.isdigit())
    return generation.isdigit() and int(generation) >= 17


def float32_is_exact() -> bool:
    """Whether MLX multiplies float32 matrices in float32: with matrix units it does in TF32."""
    return not has_matrix_units() or os.environ.get("MLX_ENABLE_TF32") == "0"


def device_info() -> dict[str, Any]:
    """What MLX says of the default device."""
    return dict(mx.device_info())


@contextmanager
def assume(name: Backend) -> Iterator[None]:
    """Build graphs as if this were the backend, to count or export another device's kernels."""
    token = _assumed.set(name)
    try:
        yield
    finally:
        _assumed.reset(token)
