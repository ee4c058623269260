"""Records of captions in a file, JSONL or CSV, that survives whatever ends the run.

A record is one append of one whole line, so that a kill loses at most the pictures in work. What a
crash or a full disk tore off is recognised by its missing end, and cut away before going on.
"""

import contextlib
import csv
import errno
import fcntl
import io
import json
import os
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from .errors import OptionError, OutputError
from .generation import Answer, Timings
from .many import Known, Record

__all__ = ["RecordFile", "answer_fields", "json_line", "picture_key", "record_fields"]

_COLUMNS = (
    "image", "text", "error", "finish_reason", "tokens", "prompt_tokens", "duplicate_of", "sha256",
    "model", "prompt",
)  # fmt: skip


def answer_fields(answer: Answer) -> dict[str, Any]:
    """An answer as JSON has it: counts instead of token ids, seconds to the microsecond."""
    return {
        "text": answer.text,
        "tokens": len(answer.tokens),
        "prompt_tokens": answer.prompt_tokens,
        "finish_reason": answer.finish_reason,
        "ttft": round(answer.ttft, 6),
        "timings": {name: round(s, 6) for name, s in asdict(answer.timings).items()},
    }


def record_fields(image: str, record: Record) -> dict[str, Any]:
    """A record as JSON has it; `image` is the picture's name. What does not apply is left out."""
    fields: dict[str, Any] = {"image": image}
    if record.answer:
        fields |= answer_fields(record.answer) | {"batch": record.batch}
    if record.duplicate_of is not None:
        for name in ("tokens", "ttft", "timings", "batch"):
            del fields[name]
        fields["duplicate_of"] = str(record.duplicate_of)
    if record.error is not None:
        fields["error"] = record.error
    if record.sha256 is not None:
        fields["sha256"] = record.sha256
    return fields


def json_line(fields: dict[str, Any]) -> str:
    """JSON on one line, readable where it can be: a file name that is not UTF-8 is escaped."""
    line = json.dumps(fields, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(fields)
    return line


def picture_key(image: str) -> str:
    """What makes two names the same picture: folder and file name, or the URL as it is written.

    Folders are told apart by the file system while they exist: /tmp and /private/tmp are one, and
    so are Photos and photos where capitals make no difference. Keys hold for this process only.
    """
    if image == "-" or "://" in image or image.startswith("data:"):
        return image
    # pathlib's expanduser raises for a file whose name begins with ~.
    path = os.path.abspath(os.path.expanduser(image))  # noqa: PTH100, PTH111
    folder, name = os.path.split(path)
    if sys.platform == "darwin":  # names that differ in normalization only are one there
        name = unicodedata.normalize("NFC", name)
    try:
        status = os.stat(folder)  # noqa: PTH116
    except (OSError, ValueError):
        return f"{folder}/{name}"
    return f"{status.st_dev}:{status.st_ino}/{name}"


class RecordFile:
    """An append-only .jsonl or .csv file of records.

    Args:
        path: where; the ending says in which form.
        made_with: fields that all records share (model, prompt). A file made with others is not
            continued.
        resume: continue what an earlier run left.
        force: replace an existing file, once the first record is there to replace it.

    Raises OptionError if the file exists and neither is given, or was made with something else;
    OutputError if it cannot be written or is no file of records.
    """

    def __init__(
        self, path: Path, made_with: dict[str, str], *, resume: bool = False, force: bool = False
    ) -> None:
        forms: dict[str, type[_Form]] = {".jsonl": _Jsonl, ".csv": _Csv}
        if path.suffix.lower() not in forms:
            raise OptionError(f"{path}: expected a name that ends in .jsonl or .csv.")
        self.path, self._made_with = path, made_with
        self._form = forms[path.suffix.lower()]()
        self.done: dict[str, bool] = {}
        """Keys of the pictures that are in the file, and whether all went well."""
        self.known: dict[str, Known] = {}
        """Answers by the sha256 of the picture."""
        self._created = not path.exists()
        try:
            self._file: BinaryIO = path.open("a+b", buffering=0)
        except OSError as error:
            advice = "; make its folder first" if isinstance(error, FileNotFoundError) else ""
            raise OutputError(f"{_cannot('written', path, error)}{advice}") from error
        try:
            self._end = self._begin(resume, force)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._created and not self._end:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def write(self, fields: dict[str, Any]) -> None:
        """Append one record. Raises OutputError; the file then ends with the record before."""
        line = self._form.encode({**fields, **self._made_with}, first=not self._end)
        try:
            if not self._end and os.fstat(self._file.fileno()).st_size:
                self._file.truncate(0)
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise OutputError(
                f"{_cannot('written', self.path, error)}; what is in it is whole: make room and "
                "continue with --resume"
            ) from error
        self._end += len(line)

    def _begin(self, resume: bool, force: bool) -> int:
        """Where to go on writing."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise OutputError(f"{self.path} is being written by another run.") from error
        size = os.fstat(self._file.fileno()).st_size
        if size and not resume and not force:
            raise OptionError(
                f"{self.path} exists; continue it with --resume, or replace it with --force."
            )
        if not size or force:
            return 0
        end = 0
        self._file.seek(0)
        with io.BufferedReader(io.FileIO(os.dup(self._file.fileno()))) as stream:
            for number, line in enumerate(self._form.lines(stream), 1):
                if line.endswith(b"\n"):
                    self._take(line, number)
                    end += len(line)
                elif number > 1 or self._form.begins(line):
                    break  # torn off in the middle of a write
                else:
                    raise OutputError(self._foreign(line, number))
        try:
            self._file.truncate(end)
        except OSError as error:
            raise OutputError(_cannot("repaired", self.path, error)) from error
        return end

    def _take(self, line: bytes, number: int) -> None:
        """Learn from a record of an earlier run."""
        try:
            fields = self._form.decode(line)
            if fields is None:
                return
            image = fields["image"]
            key = picture_key(image)
            made_with = {name: fields[name] for name in self._made_with}
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise OutputError(self._foreign(line, number)) from error
        for name, value in self._made_with.items():
            if made_with[name] != value:
                raise OptionError(
                    f"{self.path} was made with {name} {made_with[name]!r}, now it is {value!r}; "
                    f"use the same {name}, or another --out."
                )
        self.done[key] = not fields.get("error")
        if fields.get("sha256") and fields.get("text") and not fields.get("duplicate_of"):
            answer = Answer(
                text=fields["text"],
                tokens=(),
                prompt_tokens=int(fields["prompt_tokens"]),
                finish_reason=fields["finish_reason"],
                timings=Timings(),
            )
            self.known[fields["sha256"]] = Known(image, answer)

    def _foreign(self, line: bytes, number: int) -> str:
        return (
            f"{self.path}, record {number} is not one of captions ({line[:40]!r}); continue a file "
            "that `fastvlm caption --out` wrote, or choose another name."
        )


def _cannot(verb: str, path: Path, error: OSError) -> str:
    return f"{path} cannot be {verb} ({error.strerror or error})"


class _Form:
    """How a record is laid out in the file; one that is complete ends with a newline."""

    _BEGINNING: bytes

    def encode(self, fields: dict[str, Any], *, first: bool) -> bytes:
        raise NotImplementedError

    def decode(self, line: bytes) -> dict[str, Any] | None:
        raise NotImplementedError

    def lines(self, stream: BinaryIO) -> Iterator[bytes]:
        """Whole records with their newline, then perhaps a torn one without."""
        raise NotImplementedError

    def begins(self, torn: bytes) -> bool:
        """Whether a file with nothing but this may be the beginning of one of ours."""
        return self._BEGINNING.startswith(torn) or torn.startswith(self._BEGINNING)


class _Jsonl(_Form):
    _BEGINNING = b'{"image": "'

    def encode(self, fields: dict[str, Any], *, first: bool) -> bytes:
        return json_line(fields).encode() + b"\n"

    def decode(self, line: bytes) -> dict[str, Any] | None:
        fields: dict[str, Any] = json.loads(line)
        return fields

    def lines(self, stream: BinaryIO) -> Iterator[bytes]:
        yield from stream


class _Csv(_Form):
    _BEGINNING = ",".join(_COLUMNS).encode() + b"\r\n"

    def encode(self, fields: dict[str, Any], *, first: bool) -> bytes:
        rows = [_COLUMNS] if first else []
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerows([*rows, [fields.get(name, "") for name in _COLUMNS]])
        return text.getvalue().encode("utf-8", "surrogateescape")

    def decode(self, line: bytes) -> dict[str, Any] | None:
        text = io.StringIO(line.decode("utf-8", "surrogateescape"), newline="")
        (row,) = csv.reader(text, strict=True)
        if len(row) != len(_COLUMNS):
            raise ValueError(f"{len(row)} columns")
        return None if row == list(_COLUMNS) else dict(zip(_COLUMNS, row, strict=True))

    def lines(self, stream: BinaryIO) -> Iterator[bytes]:
        """Whole records: a quoted text may contain newlines."""
        record = b""
        for line in stream:
            record += line
            if record.count(b'"') % 2 == 0:
                yield record
                record = b""
        if record:
            yield record.removesuffix(b"\n")  # torn within a quoted text
