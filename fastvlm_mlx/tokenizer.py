"""Text to token ids and back, with the `tokenizers` library alone.

FastVLM-0.5B and 1.5B ship vocab.json + merges.txt and no tokenizer.json, 7B ships Qwen2.5's
larger set of added tokens: both forms are read here, without transformers.
"""

import json
from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from .errors import CheckpointError

__all__ = ["StreamDecoder", "Tokenizer"]

# How Qwen2 cuts text before byte-pair merging: contractions, words, single digits, punctuation.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_REQUIRED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class Tokenizer:
    """Qwen2's byte-level BPE."""

    def __init__(self, backend: HFTokenizer) -> None:
        self._backend = backend
        self._added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        ids = {t: i for t in _REQUIRED if (i := backend.token_to_id(t)) is not None}
        missing = [t for t in _REQUIRED if t not in ids]
        if missing:
            raise CheckpointError(
                f"The tokenizer has no {', '.join(missing)}; FastVLM's is Qwen2's. "
                "It seems to belong to another model."
            )
        self.end_of_turn = ids["<|im_end|>"]
        self.eos_token_ids = frozenset({self.end_of_turn, ids["<|endoftext|>"]})

    @classmethod
    def from_directory(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, or vocab.json + merges.txt. Raises CheckpointError."""
        try:
            if (folder / "tokenizer.json").is_file():
                return cls(HFTokenizer.from_file(str(folder / "tokenizer.json")))
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                return cls(_byte_level_bpe(folder))
        except CheckpointError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception for malformed files
            raise CheckpointError(
                f"The tokenizer files in {folder} cannot be read ({error}). "
                "Copy them again from the original checkpoint."
            ) from error
        raise CheckpointError(
            f"No tokenizer in {folder}: expected tokenizer.json, or vocab.json and merges.txt. "
            "Copy them from the original checkpoint."
        )

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def to_json(self) -> str:
        """What `save` writes."""
        return str(self._backend.to_str())

    def save(self, path: Path) -> None:
        """Write it as a single tokenizer.json."""
        self._backend.save(str(path), pretty=False)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised, none is added."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that `token` stands for; none for special and unused ids."""
        added = self._added.get(token)
        if added is not None:
            return b"" if added.special else added.content.encode()
        return bytes(_BYTE_OF[c] for c in self._backend.id_to_token(token) or "")

    def stream(self) -> "StreamDecoder":
        """A decoder that takes one token at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns tokens into text as they come, never emitting half a UTF-8 character."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._utf8 = getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that became certain with `token`; may be empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The rest: an incomplete character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    # Byte-level BPE writes printable Latin-1 bytes as themselves and the others from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level_bpe(folder: Path) -> HFTokenizer:
    backend = HFTokenizer(
        models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    )
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    added = _added_tokens(folder)
    size = backend.get_vocab_size()
    for expected, (token_id, (content, special)) in enumerate(sorted(added.items()), start=size):
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(content, normalized=False, special=special)])
        if backend.token_to_id(content) != token_id:
            raise CheckpointError(
                f"Added token {content!r} in {folder} should have id {token_id}, but vocab.json "
                f"leaves {expected}: the files belong to different tokenizers."
            )
    return backend


def _added_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """Id -> content, and whether the token is special (left out of decoded text)."""
    plain: dict[str, int] = _json(folder / "added_tokens.json")
    found = {i: (content, True) for content, i in plain.items()}
    config = _json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    for i, token in config.items():
        found[int(i)] = (token["content"], bool(token.get("special", True)))
    # The vocabulary itself may already hold them (tokenizers re-saved by other libraries).
    vocabulary: Iterable[str] = _json(folder / "vocab.json")
    return {i: token for i, token in found.items() if token[0] not in vocabulary}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
