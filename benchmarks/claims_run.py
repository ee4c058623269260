"""A run of the claims: begin or continue a record, then measure what it lacks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.memory import available_memory
from fastvlm_mlx.opening import DTYPES

from .chips import peaks_of
from .claims import CLAIMS, Claim, pieces_of
from .claims_measure import Tick, claims_subject, measure_pieces
from .claims_plan import Budget, plan_piece
from .claims_table import measurement_of
from .options import typed_command
from .record import Measurement, Record, Skipped, read_record
from .session import new_record

__all__ = ["Effort", "begin", "chosen", "run"]


@dataclass(frozen=True)
class Effort:
    """How much to measure."""

    quick: bool = False
    repeat: int = 5
    limit: float = 60.0
    """With `quick`: seconds that one run may take, by prediction."""


def chosen(names: Sequence[str]) -> tuple[Claim, ...]:
    """The claims of these names, all if there is none. Raises OptionError."""
    known = [claim.name for claim in CLAIMS]
    for name in names:
        if name not in known:
            raise OptionError(f"--claim is {name!r}; expected one of {', '.join(known)}.")
    return tuple(claim for claim in CLAIMS if not names or claim.name in names)


def begin(claims: Sequence[Claim], dtype: str | None, resume: Path | None) -> Record:
    """A record without measurements, or with those of the record `resume`.

    Raises OptionError for an unknown dtype or a record of another machine or software, and
    BenchmarkError for one that cannot be read.
    """
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    earlier = None if resume is None else read_record(resume)
    suited = "float16" if mx.default_device() == mx.gpu else "float32"
    record = new_record(typed_command(), None)
    record = replace(record, subject=claims_subject(claims, DTYPES[dtype or suited]))
    if earlier is None:
        return record
    for what, then, now in (
        ("machine", earlier.machine, record.machine),
        ("model", earlier.subject.model, record.subject.model),
        ("dtype", earlier.subject.dtype, record.subject.dtype),
        ("version of MLX", earlier.software.mlx, record.software.mlx),
        ("BLAS", earlier.software.blas, record.software.blas),
    ):
        if then != now:
            raise OptionError(
                f"{resume} was measured with another {what} ({then}; now {now}). Measure anew, "
                "without --resume."
            )
    return replace(record, measurements=earlier.measurements)


def run(
    record: Record, claims: Sequence[Claim], effort: Effort, tick: Tick
) -> Iterator[Measurement | Skipped]:
    """What `record` lacks, each as soon as it is measured or known to be left out."""
    dtype = DTYPES[record.subject.dtype]
    missing = [piece for piece in pieces_of(claims) if measurement_of(piece, record) is None]
    if not missing:
        return
    budget = Budget(
        memory=available_memory(),
        flops_per_second=peaks_of(record.machine, dtype).flops,
        item_bytes=dtype.size,
        quick=effort.quick,
        run_seconds=effort.limit,
        total_seconds=10 if effort.quick else 30,
        repeat=effort.repeat,
    )
    mx.clear_cache()
    plans = [(piece, plan_piece(piece, budget)) for piece in missing]
    yield from measure_pieces(plans, dtype, tick)
