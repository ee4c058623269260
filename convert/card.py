"""The model card: README.md of a converted checkpoint, and the licence it inherits."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Licence", "copy_licence", "licence_of", "model_card"]


@dataclass(frozen=True)
class Licence:
    """What the source says about its licence, in the Hub's own keys."""

    keys: Mapping[str, str]
    """license, license_name and license_link, as far as stated."""
    files: tuple[Path, ...]

    def __str__(self) -> str:
        stated = self.keys.get("license_name") or self.keys.get("license")
        if stated:
            return stated
        if self.files:
            return f"see {self.files[0].name}"
        return "not stated by the source"


def licence_of(folder: Path) -> Licence:
    """Read it off the source's model card and licence files."""
    files = tuple(sorted(p for p in folder.glob("LICENSE*") if p.is_file()))
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    keys = dict(
        re.findall(r"^(license(?:_name|_link)?):[ \t]*([^\n]+?)[ \t]*$", front[1], re.MULTILINE)
        if front
        else []
    )
    return Licence({key: value.strip("'\"") for key, value in keys.items()}, files)


def copy_licence(licence: Licence, target: Path) -> None:
    """Carry the licence files over."""
    for file in licence.files:
        shutil.copyfile(file, target / file.name)


def model_card(report: Mapping[str, Any], licence: Licence) -> str:
    """README.md from the contents of conversion.json."""
    front = {
        "library_name": "mlx" if report["layout"] != "apple" else "transformers",
        "pipeline_tag": "image-text-to-text",
        **licence.keys,
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", report["source"]) and report["source_on_hub"]:
        front["base_model"] = report["source"]
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in front.items()),
        "tags:",
        "- mlx",
        "- fastvlm",
        "---",
        "",
        f"# {report['name']}",
        "",
        f"[FastVLM](https://github.com/apple/ml-fastvlm) converted from `{report['source']}` by "
        f"fastvlm-mlx {report['versions']['fastvlm-mlx']}.",
        "",
        "| | |",
        "|---|---|",
        f"| recipe | {report['recipe']['name']} |",
        f"| layout | {report['layout']} |",
        f"| size | {report['bytes'] / 1e6:.1f} MB (source {report['source_bytes'] / 1e6:.1f} MB) |",
        f"| bits per weight | {report['bits_per_weight']:.2f} (language model and projector, "
        "scales included) |",
        f"| floating-point tensors | {report['dtype']}, tower {report['vision_dtype']} |",
        f"| licence | {licence} |",
        "",
        "## Use",
        "",
        *_usage(report),
        "",
        "## Verification",
        "",
        *_verification(report["verification"]),
        "",
        "Details, module by module, are in `conversion.json`.",
        "",
    ]
    return "\n".join(lines)


def _usage(report: Mapping[str, Any]) -> list[str]:
    if report["layout"] == "mlx-vlm":
        command = f"mlx_vlm.generate --model {report['name']} --image photo.jpg"
    else:
        command = f"fastvlm caption photo.jpg --model {report['name']}"
    python = [
        "```python",
        "import fastvlm_mlx as fv",
        "",
        f'print(fv.load("{report["name"]}").caption("photo.jpg"))',
        "```",
    ]
    return ["```sh", command, "```", "", *python]


def _verification(found: Mapping[str, Any]) -> list[str]:
    if not found["run"]:
        return [f"Not run: {found['reason']}."]
    until, tokens = found["tokens_until_divergence"], found["answer_tokens"]
    rows = [
        (
            "largest error of a weight, over what its format allows",
            f"{found['stored']['worst']:.3f}",
        ),
        ("relative error of the image features", f"{found['feature_error']['head']:.3%}"),
        ("relative error of the image tokens", f"{found['feature_error']['image tokens']:.3%}"),
        ("KL divergence of the next token, mean", f"{found['kl_mean']:.5f} nats"),
        ("KL divergence of the next token, largest", f"{found['kl_max']:.5f} nats"),
        ("top-1 agreement", f"{found['top1_agreement']:.1%} of {found['positions']} positions"),
    ]
    if tokens:
        rows.append(("greedy tokens before the first difference", f"{sum(until)} of {sum(tokens)}"))
    accuracy = found["accuracy"]
    if accuracy:
        rows.append(
            (
                f"right answers to {accuracy['questions']} held-out questions",
                f"{accuracy['result']['all']:.1%} (source {accuracy['source']['all']:.1%})",
            )
        )
    if found["by_layer"]:
        rows.append(("answers", f"not given: {found['by_layer']}"))
    return [
        f"Source and result on the same {found['samples']} generated pictures and questions:",
        "",
        "| measure | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
    ]
