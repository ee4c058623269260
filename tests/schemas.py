"""Random JSON schemas whose instances are all of bounded length."""

import random
from collections.abc import Callable
from typing import Any

_NAMES = ("name", "colour", "count", "größe", "is it", "place", 'a "b"', "x")


def random_schema(seed: int) -> dict[str, Any]:
    """Objects, arrays, enums, bounded integers and strings, booleans and null, nested."""
    return _object(random.Random(seed), 3)


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(_NAMES, draw.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(draw, depth - 1) for name in names},
        "required": [name for name in names if draw.random() < 0.7],
        "additionalProperties": False,
    }


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(0, 2)
    return {
        "type": "array",
        "items": _any(draw, depth - 1),
        "minItems": least,
        "maxItems": least + draw.randint(0, 2),
    }


def _enum(draw: random.Random, depth: int) -> dict[str, Any]:
    values = ["red", "green", "", 'say "hi"', "naïve", 7, -1.5, True, None]
    return {"enum": draw.sample(values, draw.randint(1, 5))}


def _integer(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(-150, 150)
    return {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 1000)}


def _string(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 8)}


def _simple(draw: random.Random, depth: int) -> dict[str, Any]:
    return draw.choice(
        [
            {"type": "boolean"},
            {"type": ["boolean", "null"]},
            {"const": "fixed"},
            {"anyOf": [_integer(draw, depth), _enum(draw, depth)]},
        ]
    )


def _any(draw: random.Random, depth: int) -> dict[str, Any]:
    kinds: list[Callable[[random.Random, int], dict[str, Any]]] = [
        _enum, _integer, _string, _simple,
    ]  # fmt: skip
    return draw.choice(kinds + [_object, _array] * (depth > 0))(draw, depth)
