"""A conversion from beginning to end: plan, write, verify, describe, put in place.

Nothing appears at the destination before all of it is complete; `checkpoint/writing.py` sees to it.
"""

import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastvlm_mlx.checkpoint.loading import Examined, examine_checkpoint
from fastvlm_mlx.checkpoint.source import checkpoint_folder
from fastvlm_mlx.checkpoint.writing import (
    TOKENIZER_FILES,
    ShardedWriter,
    check_target,
    new_directory,
    write_json,
)
from fastvlm_mlx.errors import CheckpointError

from .card import Licence, copy_licence, licence_of, model_card
from .layouts import processor_files
from .options import Options, Progress, Say
from .plan import Plan
from .planning import choose_dtypes, plan_conversion
from .proof import prove, summary
from .recipes import Recipe
from .streaming import small_cache, write_values

__all__ = ["Conversion", "Options", "convert_checkpoint", "describe_result"]

_SLACK = 64 << 20
"""Room for tokenizer files, licence and a file system's own needs."""


@dataclass(frozen=True)
class Conversion:
    """What was done, or would be."""

    plan: Plan
    report: Mapping[str, Any]
    """The contents of conversion.json; empty after a dry run."""


def convert_checkpoint(
    source: str,
    destination: str | os.PathLike[str],
    options: Options | None = None,
    *,
    revision: str | None = None,
    dry_run: bool = False,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Convert `source` (directory, .zip, Hub id, "nano") to the directory `destination`.

    `say` gets a line for what a person should know. The source is never modified; `destination` is
    complete or untouched. Raises OptionError, CheckpointError or HubError; CheckpointError also for
    a result that fails verification.
    """
    options = options or Options()
    say = say or (lambda line: None)
    progress = progress or (lambda what, done, total: None)
    target = Path(destination).expanduser()
    started = time.perf_counter()
    with checkpoint_folder(source, revision, say) as folder:
        _check_places(folder, target)
        if not dry_run:
            check_target(target, overwrite=options.overwrite)
        examined = examine_checkpoint(folder)
        run = _Run(_public_name(source), revision, examined, options, progress)
        recipe, plan = plan_conversion(source, examined, options, say, progress)
        if dry_run:
            return Conversion(plan, {})
        with new_directory(target, overwrite=options.overwrite) as temporary:
            _check_space(temporary, plan)
            errors = run.write(temporary, recipe, plan)
            written = time.perf_counter() - started
            verification = prove(examined, temporary, plan, options, say, progress)
            report = run.report(target.name, recipe, plan, errors, verification)
            report["seconds"] = {
                "written": round(written, 1),
                "all": round(time.perf_counter() - started, 1),
            }
            report["peak_memory_gb"] = round(_peak_memory() / 1e9, 2)
            licence = licence_of(folder)
            report["licence"] = str(licence)
            _describe(temporary, report, licence)
            failures = verification.get("failures", [])
            if failures and not options.keep_failed:
                raise CheckpointError(
                    f"Verification failed: {'; '.join(failures)}. Nothing was written; look at the "
                    "result with --keep-failed."
                )
    if failures:
        raise CheckpointError(
            f"Verification failed: {'; '.join(failures)}. The result was kept in {target}."
        )
    return Conversion(plan, report)


@dataclass(frozen=True)
class _Run:
    """One conversion's inputs, and its steps."""

    source: str
    """As the result names it."""
    revision: str | None
    examined: Examined
    options: Options
    progress: Progress

    def write(self, temporary: Path, recipe: Recipe, plan: Plan) -> dict[str, float]:
        self.progress("looking at the tower", 0, 1)
        with small_cache():
            contents, values = plan.layout.values()
        metadata = {**plan.layout.metadata, "source": self.source, "recipe": recipe.name}
        writer = ShardedWriter(
            temporary,
            list(plan.tensors.values()),
            metadata,
            shard_bytes=self.options.shard_bytes,
            progress=lambda done, total: self.progress("writing", done, total),
        )
        with small_cache(), writer:
            errors = write_values(plan, values, writer)
        quantization = plan.config_entry()
        if quantization:
            contents["quantization"] = contents["quantization_config"] = quantization
        contents["torch_dtype"] = choose_dtypes(self.examined, self.options)[0]
        write_json(temporary / "config.json", contents)
        for name in TOKENIZER_FILES:
            if (self.examined.folder / name).is_file():
                shutil.copyfile(self.examined.folder / name, temporary / name)
        if self.options.layout == "mlx-vlm":
            processor_files(temporary, self.examined)
        return errors

    def report(
        self,
        name: str,
        recipe: Recipe,
        plan: Plan,
        errors: Mapping[str, float],
        verification: Mapping[str, Any],
    ) -> dict[str, Any]:
        dtype, vision_dtype = choose_dtypes(self.examined, self.options)
        return {
            "name": name,
            "source": self.source,
            "source_on_hub": "/" in self.source,
            "revision": self.revision,
            "source_dialect": self.examined.dialect.value,
            "source_training_form": self.examined.training_form,
            "source_bytes": self.examined.file_bytes,
            "layout": self.options.target_layout,
            "bytes": plan.nbytes,
            "bits_per_weight": round(plan.bits_per_weight(), 4),
            "dtype": dtype,
            "vision_dtype": vision_dtype,
            "recipe": recipe.to_dict(),
            "verification": dict(verification),
            "modules": {
                module: {
                    **asdict(how),
                    "weights": plan.weights(module),
                    "bytes": plan.module_bytes(module),
                    "kept": module in plan.kept,
                    "weight_error": errors.get(module),
                }
                for module, how in plan.quantization.items()
            },
            "versions": {p: version(p) for p in ("fastvlm-mlx", "mlx", "mlx-lm")},
        }


def _public_name(source: str) -> str:
    """A Hub id as it is, of a path the last part only: results are made to be published."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def _check_places(source: Path, target: Path) -> None:
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(
            f"{target} is the source, or one contains the other; the source is never modified. "
            "Choose another place."
        )


def _check_space(temporary: Path, plan: Plan) -> None:
    needed, free = plan.nbytes + _SLACK, shutil.disk_usage(temporary).free
    if needed > free:
        raise CheckpointError(
            f"{temporary.parent} has {free / 1e6:.0f} MB free, but {needed / 1e6:.0f} MB are "
            "needed; free some space or choose another place. Nothing was changed."
        )


def _describe(folder: Path, report: Mapping[str, Any], licence: Licence) -> None:
    write_json(folder / "conversion.json", report)
    copy_licence(licence, folder)
    (folder / "README.md").write_text(model_card(report, licence), encoding="utf-8")


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_result(conversion: Conversion) -> list[str]:
    """Lines for the terminal."""
    report = conversion.report
    return [
        f"{report['bytes'] / 1e6:.1f} MB, {report['bits_per_weight']:.2f} bits per weight, "
        f"recipe {report['recipe']['name']}, {report['seconds']['all']:.0f} s, "
        f"peak memory {report['peak_memory_gb']:.2f} GB; licence: {report['licence']}",
        *summary(report["verification"]),
    ]
