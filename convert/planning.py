"""From options to a plan: which recipe, which dtypes, which modules stay as they are."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from fastvlm_mlx.checkpoint.dialects import Dialect
from fastvlm_mlx.checkpoint.loading import Examined
from fastvlm_mlx.checkpoint.quantized import Quantization
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.opening import DTYPES

from .layouts import layout_of
from .options import Options, Progress, Say
from .plan import Plan, make_plan
from .recipes import NAMED, Packing, Recipe, mixed, packing, read_recipe, uniform
from .sensitivity import automatic

__all__ = ["choose_dtypes", "plan_conversion"]


def plan_conversion(
    name: str, source: Examined, options: Options, say: Say, progress: Progress
) -> tuple[Recipe, Plan]:
    """What will be made of `source`, which a person calls `name`. Reads weights for "auto" only.

    Raises OptionError, and CheckpointError if "auto" cannot run the model.
    """
    kept = _kept(name, source, options, say)
    layout = layout_of(options.target_layout, source, kept)
    kept = {module: how for module, how in kept.items() if module in layout.modules}
    dtype, vision_dtype = choose_dtypes(source, options)
    recipe = _recipe(source, options, layout.modules, dtype, progress)
    quantization = recipe.quantization(layout.modules)
    return recipe, make_plan(
        layout,
        source,
        {module: how for module, how in quantization.items() if module not in kept},
        kept,
        dtype=dtype,
        vision_dtype=vision_dtype,
    )


def choose_dtypes(source: Examined, options: Options) -> tuple[str, str]:
    """Of what stays in floating point: language model and projector, and tower."""
    if options.dtype:
        return options.dtype, options.dtype
    if options.target_layout == "fastvlm":
        # The folded tower fits float16, which has eight times bfloat16's precision.
        return "bfloat16", "float16"
    if options.target_layout == "apple":
        kinds = Counter(ref.dtype for ref in source.refs.values())
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        own = next((names[k] for k, _ in kinds.most_common() if k in names), "bfloat16")
        return own, own
    return "bfloat16", "bfloat16"


def _kept(name: str, source: Examined, options: Options, say: Say) -> dict[str, Quantization]:
    """Modules whose packed weights are copied: those of a quantized source, unless told."""
    packed = source.quantized
    if not packed:
        return {}
    bits = sorted({how.bits for how in packed.values()})
    label = f"{Path(name).name} is already quantized ({', '.join(map(str, bits))} bits)"
    if options.quantizes:
        say(f"warning: {label}; quantizing it again adds to what was lost the first time.")
        return {}
    if options.fuse_only or options.dequantize:
        say(f"{label}; it is written as floats, which does not bring anything back.")
        return {}
    say(f"{label}; its packed weights are copied bit for bit (--dequantize writes floats).")
    folded = source.dialect is Dialect.FOLDED
    return {m: how for m, how in packed.items() if folded or not m.startswith("vision.")}


def _recipe(
    source: Examined,
    options: Options,
    modules: Mapping[str, int],
    dtype: str,
    progress: Progress,
) -> Recipe:
    bits = options.vision_bits
    vision = None if bits is None else packing(bits, options.group_size)
    if options.fuse_only:
        return Recipe("fused only")
    if not options.quantizes:
        return Recipe("floating point" if vision is None else f"tower {bits}-bit", None, vision)
    if options.recipe is None or options.recipe == "uniform":
        return uniform(_packing(options), vision)
    if options.recipe == "mixed":
        return mixed(_packing(options), modules, vision)
    if options.recipe == "auto":
        return automatic(
            source,
            modules,
            target_bits=4.5 if options.target_bits is None else options.target_bits,
            group_size=options.group_size,
            vision=vision,
            dtype=DTYPES[dtype],
            seed=options.seed,
            progress=progress,
        )
    return _recipe_file(options)


def _recipe_file(options: Options) -> Recipe:
    path = Path(options.recipe or "").expanduser()
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


def _packing(options: Options) -> Packing:
    bits = 4 if options.bits is None and options.mode == "affine" else options.bits
    return packing(bits, options.group_size, options.mode)
