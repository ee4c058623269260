"""Recipes: how many bits each module gets, by name pattern.

A recipe is a default for the language model and projector, another for the vision tower, and rules
that override both; the first rule whose pattern matches wins. `read_recipe` reads one from TOML:

    name = "mine"
    bits = 4                  # 2, 3, 4, 5, 6, 8; 0 leaves weights in floating point
    group_size = 64           # 32, 64, 128; without it the largest of 64 and 32 that fits
    mode = "affine"           # or mxfp4, mxfp8, nvfp4, which fix bits and group size
    vision_bits = 8

    [modules]                 # patterns as in a shell; the first that matches counts
    "language_model.model.embed_tokens" = { bits = 6 }
    "*.mlp.down_proj" = { bits = 6, group_size = 32 }
    "projector.*" = false
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import filter as matching
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastvlm_mlx.checkpoint.quantized import Quantization
from fastvlm_mlx.errors import OptionError

__all__ = [
    "BITS",
    "GROUPS",
    "MODES",
    "NAMED",
    "Packing",
    "Recipe",
    "Rule",
    "mixed",
    "packing",
    "read_recipe",
    "uniform",
]

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
MODES: dict[str, tuple[int, int] | None] = {
    "affine": None,
    "mxfp4": (4, 32),
    "mxfp8": (8, 32),
    "nvfp4": (4, 16),
}
"""Mode -> the (bits, group size) that it fixes."""
NAMED = ("uniform", "mixed", "auto")
_HIGHER = {2: 4, 3: 5, 4: 6, 5: 8, 6: 8, 8: 8}


@dataclass(frozen=True)
class Packing:
    """Bits, mode and group size of some modules; without a group size, what fits each width."""

    bits: int
    group_size: int | None = None
    mode: str = "affine"

    def for_module(self, name: str, width: int) -> Quantization | None:
        """The quantization of a matrix `width` inputs wide; None if no group divides it.

        Raises OptionError if an explicit group size does not fit the language model or projector.
        The tower has widths of many kinds: there a smaller group is taken instead.
        """
        if self.group_size is None or (width % self.group_size and name.startswith("vision.")):
            sizes: Sequence[int] = (64, 32)
        else:
            sizes = (self.group_size,)
        size = next((s for s in sizes if width % s == 0), None)
        if size is not None:
            return Quantization(self.bits, size, self.mode)
        if self.group_size is None or name.startswith("vision."):
            return None
        fitting = [str(g) for g in GROUPS if width % g == 0]
        raise OptionError(
            f"group_size {self.group_size} does not divide the {width} inputs of {name}; "
            + (f"use {' or '.join(fitting)}." if fitting else "leave it in floating point.")
        )


@dataclass(frozen=True)
class Rule:
    """A pattern of module names and what they get; None is floating point."""

    match: str
    packing: Packing | None


@dataclass(frozen=True)
class Recipe:
    """What each module gets."""

    name: str
    default: Packing | None = None
    """Of the language model and the projector."""
    vision: Packing | None = None
    """Of the tower's matrix products."""
    rules: tuple[Rule, ...] = ()

    def quantization(self, modules: Mapping[str, int]) -> dict[str, Quantization]:
        """Module -> quantization, for modules given as name -> inputs.

        Raises OptionError for a group size that does not fit and a pattern that matches nothing.
        """
        chosen: dict[str, Quantization] = {}
        unused = {rule.match for rule in self.rules}
        for name, width in modules.items():
            rule = next((r for r in self.rules if fnmatchcase(name, r.match)), None)
            unused -= {r.match for r in self.rules if fnmatchcase(name, r.match)}
            if rule is not None:
                packing = rule.packing
            else:
                packing = self.vision if name.startswith("vision.") else self.default
            how = packing.for_module(name, width) if packing else None
            if how is not None:
                chosen[name] = how
        if unused:
            raise OptionError(
                f"Recipe {self.name}: {sorted(unused)[0]!r} matches no module; names look like "
                f"{next(iter(modules))!r} (see --dry-run)."
            )
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """For conversion.json."""
        return asdict(self)


def packing(bits: int | None, group_size: int | None = None, mode: str = "affine") -> Packing:
    """A checked `Packing`. Raises OptionError."""
    if mode not in MODES:
        raise OptionError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
    fixed = MODES[mode]
    if fixed is not None:
        if bits not in (None, fixed[0]) or group_size not in (None, fixed[1]):
            raise OptionError(
                f"mode {mode} has {fixed[0]} bits and groups of {fixed[1]}; leave out bits and "
                "group size."
            )
        return Packing(*fixed, mode)
    if isinstance(bits, bool) or bits not in BITS:
        raise OptionError(f"bits is {bits!r}; expected one of {', '.join(map(str, BITS))}.")
    if group_size is not None and group_size not in GROUPS:
        raise OptionError(
            f"group_size is {group_size!r}; expected one of {', '.join(map(str, GROUPS))}."
        )
    return Packing(bits, group_size, mode)


def uniform(text: Packing, vision: Packing | None = None) -> Recipe:
    """The same for every matrix of the language model and projector."""
    bits = f"{text.bits}-bit" if text.mode == "affine" else text.mode
    return Recipe(f"uniform {bits}", text, vision)


def mixed(text: Packing, modules: Iterable[str], vision: Packing | None = None) -> Recipe:
    """More bits for embeddings, lm_head, projector, and the first and last eighth of the layers."""
    if text.mode != "affine":
        raise OptionError("Recipe 'mixed' raises bits, which needs mode affine.")
    higher = Packing(_HIGHER[text.bits], text.group_size)
    names = list(modules)
    numbers = [int(m[1]) for m in (re.search(r"\.layers\.(\d+)\.", name) for name in names) if m]
    layers = max(numbers) + 1
    edge = max(1, layers // 8)
    patterns = [
        "*.embed_tokens",
        "*.lm_head",
        "projector.*",
        *(f"*.layers.{i}.*" for i in range(layers) if i < edge or i >= layers - edge),
    ]
    rules = tuple(Rule(p, higher) for p in patterns if matching(names, p))
    return Recipe(f"mixed {text.bits}/{higher.bits}-bit", text, vision, rules)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML file. Raises OptionError, naming unknown keys."""
    try:
        contents = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"The recipe {path} cannot be read ({error}).") from error
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"The recipe {path} is not TOML ({error}).") from error
    known = {"name", "bits", "group_size", "mode", "vision_bits", "modules"}
    _check_keys(path, contents, known)
    modules = contents.get("modules", {})
    if not isinstance(modules, dict):
        raise OptionError(f"{path}: modules is {modules!r}; expected a table of patterns.")
    keys = ("bits", "group_size", "mode")
    own: dict[str, Any] = {key: contents[key] for key in keys if key in contents}
    rules = []
    for pattern, value in modules.items():
        where = f"{path}: modules.{pattern!r}"
        if value is False:
            rules.append(Rule(pattern, None))
            continue
        if not isinstance(value, dict):
            raise OptionError(f"{where} is {value!r}; expected a table or false.")
        _check_keys(where, value, {"bits", "group_size", "mode"})
        inherited = {k: v for k, v in own.items() if k != "mode" or "mode" not in value}
        if value.get("mode", "affine") != "affine":
            inherited = {}
        rules.append(Rule(pattern, _packing(where, {**inherited, **value})))
    vision = contents.get("vision_bits", 0)
    return Recipe(
        name=str(contents.get("name", path.stem)),
        default=_packing(str(path), own) if own else None,
        vision=_packing(f"{path}: vision_bits", {"bits": vision}) if vision != 0 else None,
        rules=tuple(rules),
    )


def _packing(where: str, values: Mapping[str, Any]) -> Packing | None:
    if values.get("bits") == 0 and not isinstance(values["bits"], bool):
        return None
    try:
        return packing(values.get("bits"), values.get("group_size"), values.get("mode", "affine"))
    except OptionError as error:
        raise OptionError(f"{where}: {error}") from error


def _check_keys(where: object, contents: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(contents.keys() - known)
    if unknown:
        raise OptionError(
            f"{where}: unknown key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}; "
            f"expected {', '.join(sorted(known))}."
        )
