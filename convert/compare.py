"""Recipes side by side on one checkpoint, as a Markdown table on stdout.

    python -m fastvlm_mlx.convert.compare nano
    python -m fastvlm_mlx.convert.compare DIR --recipes uniform:4,auto:4.5,mixed:3 --samples 4

A recipe is NAME:NUMBER, where uniform and mixed take bits and auto takes bits per weight; a second
number is the group size.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastvlm_mlx.blas import load_openblas
from fastvlm_mlx.errors import CheckpointError, FastVLMError, OptionError

__all__ = ["main"]

RECIPES = "uniform:3,auto:3.5,uniform:4,auto:4.5,mixed:3,auto:4.72,mixed:4,auto:5.72,uniform:8"


def main() -> None:
    """Convert with each recipe into a temporary directory and print what verification found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", help="anything that `fastvlm convert` takes")
    parser.add_argument("--recipes", default=RECIPES)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    load_openblas()
    print(
        "| recipe | bits per weight | KL, mean | KL, largest | top-1 | greedy tokens | accuracy |"
    )
    print("|---|---|---|---|---|---|---|")
    try:
        for recipe in given.recipes.split(","):
            print(_row(given.source, recipe, given.samples, given.seed), flush=True)
    except FastVLMError as error:
        sys.exit(f"compare: {error}")


def _row(source: str, recipe: str, samples: int, seed: int) -> str:
    from .conversion import convert_checkpoint
    from .options import Options

    options = Options(**_options(recipe), samples=samples, seed=seed, keep_failed=True)
    with tempfile.TemporaryDirectory(prefix="fastvlm-compare-") as folder:
        target = Path(folder) / "out"
        try:
            convert_checkpoint(source, target, options)
        except CheckpointError:
            # A result that is broken is part of the comparison.
            if not (target / "conversion.json").is_file():
                raise
        report = json.loads((target / "conversion.json").read_text(encoding="utf-8"))
    found = report["verification"]
    until, tokens = found["tokens_until_divergence"], found["answer_tokens"]
    accuracy = found["accuracy"]
    cells = (
        recipe.replace(":", " ", 1).replace(":", ", groups of "),
        f"{report['bits_per_weight']:.2f}",
        f"{found['kl_mean']:.4f}",
        f"{found['kl_max']:.3f}",
        f"{found['top1_agreement']:.1%}",
        f"{sum(until)} of {sum(tokens)}",
        f"{accuracy['result']['all']:.1%} ({accuracy['source']['all']:.1%})" if accuracy else "",
    )
    return f"| {' | '.join(cells)} |"


def _options(recipe: str) -> dict[str, Any]:
    name, *numbers = recipe.split(":")
    try:
        if len(numbers) not in (1, 2):
            raise ValueError
        number, size = numbers[0], int(numbers[1]) if len(numbers) > 1 else None
        if name == "auto":
            return {"recipe": name, "target_bits": float(number), "group_size": size}
        if name in ("uniform", "mixed"):
            return {"recipe": name, "bits": int(number), "group_size": size}
    except ValueError:
        pass
    raise OptionError(f"recipe is {recipe!r}; expected such as uniform:4, mixed:4:32 or auto:4.5.")


if __name__ == "__main__":
    main()
