"""A conversion from beginning to end: plan, write, verify, describe, put in place.

Nothing appears at the destination before all of it is complete; `checkpoint/writing.py` sees to it.
"""

import os
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastvlm_mlx.checkpoint.dialects import Dialect
from fastvlm_mlx.checkpoint.loading import Examined, examine_checkpoint
from fastvlm_mlx.checkpoint.quantized import Quantization
from fastvlm_mlx.checkpoint.source import checkpoint_folder
from fastvlm_mlx.checkpoint.writing import (
    SHARD_BYTES,
    TOKENIZER_FILES,
    ShardedWriter,
    check_target,
    new_directory,
    write_json,
)
from fastvlm_mlx.errors import CheckpointError, OptionError
from fastvlm_mlx.vlm import DTYPES

from .calibration import samples
from .card import Licence, copy_licence, licence_of, model_card
from .layered import observe_by_layer
from .layouts import layout_of, processor_files
from .plan import Plan, make_plan
from .recipes import NAMED, Packing, Recipe, mixed, packing, read_recipe, uniform
from .sensitivity import automatic
from .streaming import small_cache, write_values
from .verification import Thresholds, memory_shortage, observe, summary, verify

__all__ = ["Conversion", "Options", "convert_checkpoint", "describe_result"]

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""Told (what is being done, done, total): in bytes while "writing", else in steps."""

_SLACK = 64 << 20
"""Room for tokenizer files, licence and a file system's own needs."""


@dataclass(frozen=True)
class Options:
    """What to make of a checkpoint; checked when made. Raises OptionError."""

    bits: int | None = None
    """Of the language model and projector; None leaves them in floating point."""
    group_size: int | None = None
    mode: str = "affine"
    recipe: str | None = None
    """"uniform", "mixed", "auto", or a TOML file."""
    target_bits: float | None = None
    """Bits per weight, scales included, that recipe "auto" may spend."""
    vision_bits: int | None = None
    dtype: str | None = None
    """Of what is not quantized. By default bfloat16, and float16 for a folded tower."""
    layout: str = "fastvlm"
    fuse_only: bool = False
    """Only fuse the tower's training form; Apple's names, the source's dtype."""
    dequantize: bool = False
    verify: bool = True
    samples: int = 4
    keep_failed: bool = False
    overwrite: bool = False
    seed: int = 0
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OptionError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}.")
        if self.samples < 1 or self.shard_bytes < 1:
            raise OptionError("samples and shard_bytes must be at least 1.")
        if self.target_bits is not None and self.recipe != "auto":
            raise OptionError("target_bits belongs to recipe 'auto'.")
        if self.target_bits is not None and not 2 < self.target_bits <= 16:
            raise OptionError(f"target_bits is {self.target_bits!r}; expected 2 to 16.")
        if self.layout != "fastvlm" and self.vision_bits is not None:
            raise OptionError("vision_bits needs layout 'fastvlm'; no other can hold them.")
        quantizes = self.quantizes or self.vision_bits is not None
        if self.fuse_only and (quantizes or self.dequantize or self.layout != "fastvlm"):
            raise OptionError("fuse_only goes with dtype alone.")
        if self.dequantize and quantizes:
            raise OptionError("dequantize contradicts bits, mode, recipe and vision_bits.")
        if self.recipe == "auto" and (self.bits is not None or self.mode != "affine"):
            raise OptionError("Recipe 'auto' takes target_bits; it chooses bits itself.")

    @property
    def quantizes(self) -> bool:
        """Whether the language model and projector are to be quantized."""
        return self.bits is not None or self.mode != "affine" or self.recipe is not None


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
        run = _Run(source, revision, folder, examined, options, say, progress)
        recipe, plan = run.plan()
        if dry_run:
            return Conversion(plan, {})
        with new_directory(target, overwrite=options.overwrite) as temporary:
            _check_space(temporary, plan)
            errors = run.write(temporary, recipe, plan)
            written = time.perf_counter() - started
            verification = run.verify(temporary, plan)
            report = run.report(target.name, recipe, plan, errors, verification)
            report["seconds"] = {
                "written": round(written, 1),
                "all": round(time.perf_counter() - started, 1),
            }
            report["peak_memory_gb"] = round(_peak_memory() / 1e9, 2)
            licence = licence_of(folder)
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
    revision: str | None
    folder: Path
    examined: Examined
    options: Options
    say: Say
    progress: Progress

    def plan(self) -> tuple[Recipe, Plan]:
        options, source = self.options, self.examined
        name = "apple" if options.fuse_only else options.layout
        kept = self._kept(name)
        layout = layout_of(name, source, kept)
        kept = {module: how for module, how in kept.items() if module in layout.modules}
        recipe = self._recipe(layout.modules)
        quantization = recipe.quantization(layout.modules)
        dtype, vision_dtype = self._dtypes(name)
        return recipe, make_plan(
            layout,
            source,
            {m: how for m, how in quantization.items() if m not in kept},
            kept,
            dtype=dtype,
            vision_dtype=vision_dtype,
        )

    def _kept(self, layout: str) -> dict[str, Quantization]:
        """Modules whose packed weights are copied: those of a quantized source, unless told."""
        options, packed = self.options, self.examined.quantized
        if not packed:
            return {}
        bits = sorted({how.bits for how in packed.values()})
        label = f"{Path(self.source).name} is already quantized ({', '.join(map(str, bits))} bits)"
        if options.quantizes:
            self.say(f"warning: {label}; quantizing it again adds to what was lost the first time.")
            return {}
        if options.fuse_only or options.dequantize:
            self.say(f"{label}; it is written as floats, which does not bring anything back.")
            return {}
        self.say(
            f"{label}; its packed weights are copied bit for bit (--dequantize writes floats)."
        )
        folded = self.examined.dialect is Dialect.FOLDED
        return {m: how for m, how in packed.items() if folded or not m.startswith("vision.")}

    def _recipe(self, modules: Mapping[str, int]) -> Recipe:
        options = self.options
        vision = (
            None
            if options.vision_bits is None
            else packing(options.vision_bits, options.group_size)
        )
        if options.fuse_only:
            return Recipe("fused only")
        if not options.quantizes:
            name = "floating point" if vision is None else f"tower {vision.bits}-bit"
            return Recipe(name, None, vision)
        if options.recipe is None or options.recipe == "uniform":
            return uniform(self._packing(), vision)
        if options.recipe == "mixed":
            return mixed(self._packing(), modules, vision)
        if options.recipe == "auto":
            target = 4.5 if options.target_bits is None else options.target_bits
            return automatic(
                self.folder,
                self.examined,
                modules,
                target_bits=target,
                group_size=options.group_size,
                vision=vision,
                dtype=DTYPES[self._dtypes(options.layout)[0]],
                seed=options.seed,
                progress=self.progress,
            )
        path = Path(options.recipe).expanduser()
        if path.suffix != ".toml":
            raise OptionError(
                f"recipe is {options.recipe!r}; expected {', '.join(NAMED)} or a .toml file."
            )
        given = [options.bits, options.group_size, options.vision_bits]
        if any(g is not None for g in given) or options.mode != "affine":
            raise OptionError("A recipe file sets bits, group_size and mode; leave them out.")
        recipe = read_recipe(path)
        if recipe.vision is not None and options.layout != "fastvlm":
            raise OptionError(f"{path}: vision_bits needs layout 'fastvlm'.")
        return recipe

    def _packing(self) -> Packing:
        options = self.options
        bits = 4 if options.bits is None and options.mode == "affine" else options.bits
        return packing(bits, options.group_size, options.mode)

    def _dtypes(self, layout: str) -> tuple[str, str]:
        if self.options.dtype:
            return self.options.dtype, self.options.dtype
        if layout == "fastvlm":
            # The folded tower fits float16, which has eight times bfloat16's precision.
            return "bfloat16", "float16"
        if layout == "apple":
            kinds = Counter(ref.dtype for ref in self.examined.refs.values())
            names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
            own = next((names[k] for k, _ in kinds.most_common() if k in names), "bfloat16")
            return own, own
        return "bfloat16", "bfloat16"

    def write(self, temporary: Path, recipe: Recipe, plan: Plan) -> dict[str, float]:
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
        contents["torch_dtype"] = self._dtypes(self.options.layout)[0]
        write_json(temporary / "config.json", contents)
        for name in TOKENIZER_FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, temporary / name)
        if self.options.layout == "mlx-vlm":
            processor_files(temporary, self.examined)
        return errors

    def verify(self, temporary: Path, plan: Plan) -> dict[str, Any]:
        if not self.options.verify:
            return {"run": False, "reason": "switched off"}
        chosen = samples(self.options.samples, self.options.seed)
        side = self.examined.config.vision.image_size

        def tell(what: str) -> Callable[[int, int], None]:
            return lambda done, total: self.progress(what, done, total)

        names = "running the source", "running the result"
        shortage = memory_shortage(self.examined.config)
        if shortage:
            self.say(f"{shortage}: verifying layer by layer, without answers")
            with small_cache():
                expected = observe_by_layer(self.folder, side, chosen, tell(names[0]))
                found = observe_by_layer(temporary, side, chosen, tell(names[1]))
        else:
            expected = observe(self.folder, side, chosen, progress=tell(names[0]))
            found = observe(temporary, side, chosen, expected.answers, tell(names[1]))
        result = verify(expected, found, Thresholds.for_bits(*_coarsest(plan)))
        return {"run": True, "by_layer": shortage, **result.to_dict()}

    def report(
        self,
        name: str,
        recipe: Recipe,
        plan: Plan,
        errors: Mapping[str, float],
        verification: Mapping[str, Any],
    ) -> dict[str, Any]:
        layout = "apple" if self.options.fuse_only else self.options.layout
        dtype, vision_dtype = self._dtypes(layout)
        return {
            "name": name,
            "source": self.source,
            "source_on_hub": not Path(self.source).expanduser().exists() and "/" in self.source,
            "revision": self.revision,
            "source_dialect": self.examined.dialect.value,
            "source_training_form": self.examined.training_form,
            "source_bytes": self.examined.file_bytes,
            "layout": layout,
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


def _coarsest(plan: Plan) -> tuple[int, int]:
    """Fewest bits in the language model and projector, and in the tower."""

    def least(vision: bool) -> int:
        packed = [h.bits for m, h in plan.quantization.items() if m.startswith("vision.") == vision]
        kinds = [t.dtype for n, t in plan.tensors.items() if n.startswith("vision.") == vision]
        return min([*packed, 16 if {"F16", "BF16"} & set(kinds) else 32])

    return least(False), least(True)


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_result(conversion: Conversion) -> list[str]:
    """Lines for the terminal."""
    report = conversion.report
    return [
        f"{report['bytes'] / 1e6:.1f} MB, {report['bits_per_weight']:.2f} bits per weight, "
        f"recipe {report['recipe']['name']}, {report['seconds']['all']:.0f} s, "
        f"peak memory {report['peak_memory_gb']:.2f} GB",
        summary(report["verification"]),
    ]
