"""Answers that are JSON of a given schema by construction: which tokens may come next.

llguidance (extra `json`) turns a JSON schema into a grammar over the tokenizer's bytes. Its mask is
computed on the host and handed to the device, so it works on every backend.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import OptionError
from .tokenizer import Tokenizer

__all__ = ["Constraint", "SchemaCompiler", "check_schema"]

# As Python's json.dumps writes it, which is also how models have mostly seen it. Free white space
# would let an answer run on without ever saying anything.
_STYLE: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


class Constraint:
    """What one answer may be, token by token. Get one from `SchemaCompiler`."""

    def __init__(self, matcher: Any, tokenizer_size: int, vocabulary: int) -> None:
        import llguidance.numpy

        self._matcher, self._vocabulary = matcher, vocabulary
        self._bits = llguidance.numpy.allocate_token_bitmask(1, tokenizer_size)
        self._fill = llguidance.numpy.fill_next_token_bitmask
        self._size = tokenizer_size

    def mask(self) -> mx.array:
        """(1, vocab): True where a token may come next. Rows beyond the tokenizer's may not.

        Raises OptionError if the schema proves too complex.
        """
        self._fill(self._matcher, self._bits)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8), axis=1, bitorder="little")
        allowed = allowed[:, : min(self._size, self._vocabulary)].astype(bool)
        return mx.array(np.pad(allowed, ((0, 0), (0, self._vocabulary - allowed.shape[1]))))

    def push(self, token: int) -> bool:
        """Take the token that was chosen; True if the answer is complete with it."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _unusable(self._matcher.get_error())


class SchemaCompiler:
    """Makes constraints for one model. Takes about a second with 150 thousand tokens."""

    def __init__(self, tokenizer: Tokenizer, eos: Iterable[int], vocabulary: int) -> None:
        llguidance = _llguidance()
        # A Hub tokenizer may have more added tokens than the model has rows: those cannot end it.
        ends = [token for token in sorted(eos) if token < min(vocabulary, len(tokenizer))]
        self._tokenizer = llguidance.LLTokenizer(tokenizer.to_json(), eos_token=ends)
        self._vocabulary = vocabulary

    def constraint(self, schema: Mapping[str, Any]) -> Constraint:
        """A new constraint for one answer. Raises OptionError."""
        matcher = _llguidance().LLMatcher(self._tokenizer, _grammar(schema), log_level=0)
        if matcher.is_error():
            raise _unusable(matcher.get_error())
        return Constraint(matcher, self._tokenizer.vocab_size, self._vocabulary)


def check_schema(schema: Any) -> None:
    """Raise OptionError unless `schema` is one that answers can be held to."""
    if not isinstance(schema, Mapping):
        raise OptionError(
            f"json_schema is {schema!r:.200}; expected a JSON schema as a dict, such as "
            "{'type': 'object', 'properties': {...}}."
        )
    problem = _llguidance().LLMatcher.validate_grammar(_grammar(schema))
    if problem:
        raise _unusable(problem)


def _grammar(schema: Mapping[str, Any]) -> str:
    try:
        written = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise _unusable(str(error)) from error
    try:
        return str(_llguidance().LLMatcher.grammar_from_json_schema(written, overrides=_STYLE))
    except ValueError as error:
        raise _unusable(str(error)) from error


def _unusable(problem: str) -> OptionError:
    said = " ".join(problem.split())[:400].rstrip(".")
    return OptionError(f"json_schema cannot be used: {said}. Correct or simplify the schema.")


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise OptionError(
            'json_schema needs an extra package: pip install "fastvlm-mlx[json]"'
        ) from error
    return llguidance
