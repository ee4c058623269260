"""Many pictures: every one a record, in order, whatever goes wrong with some."""

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import PIL.Image
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.many import Known


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven different pictures, the fourth of which is broken."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(5)
    for n in range(7):
        size = (40 + 9 * n, 90 - 7 * n, 3)
        PIL.Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{n}.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    return folder


def _threads() -> int:
    return sum(t.name.startswith("fastvlm-picture") for t in threading.enumerate())


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_captions_are_those_of_one_by_one_and_errors_are_records(
    vlm: fv.FastVLM, folder: Path, batch: int
) -> None:
    paths = sorted(folder.iterdir())
    records = list(vlm.caption_many(paths, "What is this?", batch=batch, max_tokens=6))
    assert [record.source for record in records] == paths
    for n, record in enumerate(records):
        if n == 3:
            assert record.answer is None and record.text is None
            assert record.error is not None and "3.png cannot be decoded" in record.error
        else:
            alone = vlm.ask(record.source, "What is this?", max_tokens=6)
            assert record.error is None and record.answer is not None
            assert record.answer.tokens == alone.tokens
            assert record.text == alone.text
            assert record.answer.timings.load_image > 0
    assert _threads() == 0


def test_pictures_are_read_no_further_than_needed(
    vlm: fv.FastVLM, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source without end: whoever made a list of it, or ran ahead freely, would never return."""
    last = 0

    def sources() -> Iterator[Any]:
        nonlocal last
        for n in itertools.count():
            last = n
            yield picture

    records = vlm.caption_many(sources(), batch=2, workers=3, max_tokens=1)
    assert last == 0, "nothing happens before the first record is asked for"
    for n in range(1, 10):
        next(records)
        assert last < n + 3 * 2 + 3
    assert _threads() > 0
    records.close()
    assert _threads() == 0


def test_a_forgotten_iterator_leaves_no_threads(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    next(iter(vlm.caption_many([picture] * 50, max_tokens=1)))
    gc.collect()
    assert _threads() == 0


def test_the_next_pictures_are_decoded_while_the_model_works(
    vlm: fv.FastVLM, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_runs, opened_meanwhile = threading.Event(), threading.Event()
    batch, open_picture = fv.FastVLM.ask_batch, fv.FastVLM.before_encoder

    def watched_batch(self: fv.FastVLM, *args: Any, **options: Any) -> Any:
        model_runs.set()
        assert opened_meanwhile.wait(20), "no picture was opened while the model ran"
        return batch(self, *args, **options)

    def watched_open(self: fv.FastVLM, image: Any) -> Any:
        if threading.current_thread() is not threading.main_thread() and image is late:
            assert model_runs.wait(20)
            opened_meanwhile.set()
        return open_picture(self, image)

    monkeypatch.setattr(fv.FastVLM, "ask_batch", watched_batch)
    monkeypatch.setattr(fv.FastVLM, "before_encoder", watched_open)
    late = picture[::-1]
    assert len(list(vlm.caption_many([picture, late], batch=1, workers=1, max_tokens=1))) == 2


def test_threads_leave_mlx_alone(
    vlm: fv.FastVLM, picture: np.ndarray, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preprocessing must not touch MLX: its CPU backend cannot take two threads."""
    opened: dict[str, threading.Thread] = {}
    original = fv.FastVLM.before_encoder

    def watched(self: fv.FastVLM, image: Any) -> Any:
        opened[type(image).__name__] = threading.current_thread()
        return original(self, image)

    monkeypatch.setattr(fv.FastVLM, "before_encoder", watched)
    sources = [folder / "0.png", mx.array(picture), picture, vlm.encode(picture)]
    records = list(vlm.caption_many(sources, max_tokens=2))
    assert [record.error for record in records] == [None] * 4
    assert len({record.text for record in records[1:]}) == 1
    assert opened["array"] is threading.main_thread()
    assert opened["ndarray"] is not threading.main_thread()
    assert isinstance(vlm.preprocess(picture).crops[0], np.ndarray)


def test_files_with_the_same_bytes_are_asked_about_once(
    vlm: fv.FastVLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for n, source in enumerate("0120013"):
        path = tmp_path / f"{n}.png"
        path.write_bytes((folder / f"{source}.png").read_bytes())
        paths.append(path)
    asked = []
    batch = fv.FastVLM.ask_batch

    def counted(self: fv.FastVLM, requests: Any, **options: Any) -> Any:
        asked.append(len(requests))
        return batch(self, requests, **options)

    monkeypatch.setattr(fv.FastVLM, "ask_batch", counted)
    for size in (1, 2, 7):
        asked.clear()
        records = list(vlm.caption_many(paths, batch=size, dedupe=True, max_tokens=3))
        assert sum(asked) == 3
        expected = [None, None, None, paths[0], paths[0], paths[1], None]
        assert [record.duplicate_of for record in records] == expected
        assert records[3].text == records[0].text and records[5].text == records[1].text
        copies = [record.answer for record in records if record.duplicate_of]
        assert all(copy and (copy.tokens, copy.ttft) == ((), 0) for copy in copies)
        # Only what was asked shared the batch: all seven at once are three.
        assert records[0].batch == min(size, 3)
        assert records[6].error is not None
    asked.clear()
    known = {records[0].sha256: Known("before", records[0].answer)}
    again = list(vlm.caption_many(paths[:2], dedupe=True, known=known, max_tokens=3))
    assert (again[0].duplicate_of, again[0].text) == ("before", records[0].text)
    assert sum(asked) == 1


def test_closing_leaves_pictures_alone_that_nobody_has_begun(
    vlm: fv.FastVLM, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, opened, go_on = fv.FastVLM.before_encoder, [], threading.Event()

    def slow(self: fv.FastVLM, image: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            opened.append(image)
            assert len(opened) == 1 or go_on.wait(20)
        return original(self, image)

    monkeypatch.setattr(fv.FastVLM, "before_encoder", slow)
    records = vlm.caption_many([picture] * 9, batch=1, workers=1, max_tokens=1)
    next(records)
    threading.Timer(0.3, go_on.set).start()
    records.close()
    assert len(opened) <= 2, "the third was waiting its turn"


def test_one_prompt_too_long_fails_its_picture_only(vlm: fv.FastVLM, picture: np.ndarray) -> None:
    import dataclasses

    tall = fv.EncodedImage(mx.zeros((400, vlm.config.text.hidden_size)))
    narrow = fv.FastVLM.__new__(fv.FastVLM)
    narrow.__dict__.update(vlm.__dict__)
    narrow.config = dataclasses.replace(vlm.config, context_length=300)
    records = list(narrow.caption_many([picture, tall, picture], batch=3, max_tokens=2))
    assert [record.error is None for record in records] == [True, False, True]
    assert "context window is 300" in str(records[1].error)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"batch": 2.5}, "batch is 2.5"),
        ({"workers": "4"}, "workers is '4'"),
        ({"temperature": -1}, "temperature"),
        ({"tokens": 3}, "tokens"),
    ],
)
def test_mistakes_are_told_at_the_call(
    vlm: fv.FastVLM, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(fv.OptionError, match=named):
        vlm.caption_many([], **arguments)
    with pytest.raises(fv.PromptError, match="2 <image>"):
        vlm.caption_many([], "<image> <image>")


@pytest.mark.parametrize("images", ["photo.jpg", b"bytes of one", None])
def test_one_picture_is_not_taken_apart(vlm: fv.FastVLM, images: Any) -> None:
    with pytest.raises(fv.OptionError, match="several pictures"):
        vlm.caption_many(images)


def test_a_slow_picture_keeps_its_place(
    vlm: fv.FastVLM, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fv.FastVLM.before_encoder

    def slow_first(self: fv.FastVLM, image: Any) -> Any:
        if image is picture:
            time.sleep(0.3)
        return original(self, image)

    monkeypatch.setattr(fv.FastVLM, "before_encoder", slow_first)
    sources = [picture, picture[::-1], picture[:, ::-1]]
    records = vlm.caption_many(sources, batch=1, workers=3, max_tokens=1)
    assert [record.source is source for record, source in zip(records, sources, strict=True)] == [
        True
    ] * 3
