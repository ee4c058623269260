"""Encoded pictures: whose they are, in files, and what a cache remembers and forgets."""

import dataclasses
import errno
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastvlm_mlx as fv
from fastvlm_mlx.features import model_fingerprint, pixel_digest
from fastvlm_mlx.saved import VERSION, read_saved, write_saved

Load = Callable[..., fv.FastVLM]


@pytest.fixture
def load(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """The tiny checkpoint with a count of the pictures that its encoder has seen, as `.runs`."""

    def loaded(**options: Any) -> fv.FastVLM:
        vlm = fv.load(tiny, **options)
        encode = vlm._encode_pixels
        vlm.runs = []  # type: ignore[attr-defined]

        def counted(pixels: mx.array) -> mx.array:
            vlm.runs.append(pixels.shape[1])  # type: ignore[attr-defined]
            return encode(pixels)

        vlm._encode_pixels = counted
        return vlm

    return loaded


def _pictures(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, 256, (40, 60, 3), dtype=np.uint8) for _ in range(count)]


# --------------------------------------------------------------------------------------- identity


def test_the_same_checkpoint_is_the_same_model(tiny: Path, vlm: fv.FastVLM) -> None:
    again = fv.load(tiny, dtype="float32", image_size=128, fit="crop")
    assert again.fingerprint == vlm.fingerprint


@pytest.mark.parametrize(
    "change",
    ["weight", "vision", "dtype", "quantize", "config", "tokenizer"],
)
def test_another_model_has_another_fingerprint(tiny: Path, change: str) -> None:
    vlm = fv.load(tiny, dtype="float32")
    config, prompt = vlm.config, [1, 2]
    before = model_fingerprint(vlm.network, config, prompt)
    if change == "weight":  # as a merged adapter does: one matrix, every value, by a little
        layer = vlm.network.language_model.model.layers[1].self_attn.q_proj
        layer.weight = layer.weight * 1.001
    elif change == "vision":
        vlm.vision.stem.conv.weight = vlm.vision.stem.conv.weight + 1e-3
    elif change == "dtype":
        vlm.network.set_dtype(mx.bfloat16)
    elif change == "quantize":
        vlm = fv.load(tiny, dtype="float32", quantize=8)
    elif change == "config":
        config = dataclasses.replace(config, context_length=64)
    else:
        prompt = [1, 3]
    assert model_fingerprint(vlm.network, config, prompt) != before


def test_encoded_pictures_of_another_model_are_refused(
    tiny: Path, vlm: fv.FastVLM, picture: np.ndarray
) -> None:
    image = fv.load(tiny, quantize=4).encode(picture)
    for use in (vlm.ask, vlm.stream):
        with pytest.raises(fv.PromptError, match="of another model"):
            use([picture, image], "What?")
    with pytest.raises(fv.PromptError, match="of another model"):
        vlm.chat(image).ask("What?")
    untagged = fv.EncodedImage(image.tokens)
    assert vlm.ask(untagged, "What?", max_tokens=1).tokens


# ------------------------------------------------------------------------------------------ files


def test_an_encoded_picture_survives_its_file(
    vlm: fv.FastVLM, picture: np.ndarray, tmp_path: Path
) -> None:
    image = vlm.encode(picture)
    file = tmp_path / "Bild – één 1"
    image.save(file)
    again = fv.EncodedImage.load(str(file))
    assert mx.array_equal(again.tokens, image.tokens)
    assert (again.model, again.pixels) == (image.model, image.pixels)
    asked = [vlm.ask(i, "What?", max_tokens=6).tokens for i in (image, again)]
    assert asked[0] == asked[1]
    image.save(file)  # replacing one's own is fine
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_bfloat16_survives(tmp_path: Path) -> None:
    tokens = mx.random.normal((5, 8)).astype(mx.bfloat16)
    fv.EncodedImage(tokens).save(tmp_path / "a")
    again = fv.EncodedImage.load(tmp_path / "a").tokens
    assert again.dtype == mx.bfloat16 and mx.array_equal(again, tokens)


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("saved") / "a"
    fv.EncodedImage(mx.arange(32, dtype=mx.float32).reshape(4, 8), "model", "pixels").save(file)
    return file.read_bytes()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_an_error_and_never_a_wrong_picture(
    good_file: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("damaged") / "a"
    if data.draw(st.booleans()):
        file.write_bytes(good_file[: data.draw(st.integers(0, len(good_file) - 1))])
    else:
        at = data.draw(st.integers(0, len(good_file) - 1))
        damaged = bytearray(good_file)
        damaged[at] ^= data.draw(st.integers(1, 255))
        file.write_bytes(damaged)
    try:
        image = fv.EncodedImage.load(file)
    except fv.SavedFileError:
        return
    # Spaces that pad the header, for example, mean nothing.
    assert mx.array_equal(image.tokens, mx.arange(32, dtype=mx.float32).reshape(4, 8))
    assert (image.model, image.pixels) == ("model", "pixels")


def test_files_that_are_no_encoded_pictures(tmp_path: Path) -> None:
    with pytest.raises(fv.SavedFileError, match="There is no file"):
        fv.EncodedImage.load(tmp_path / "missing")
    with pytest.raises(fv.SavedFileError, match="not a complete safetensors file"):
        fv.EncodedImage.load(tmp_path)
    weights, other = tmp_path / "model.safetensors", tmp_path / "other"
    mx.save_safetensors(str(weights), {"tokens": mx.zeros((2, 2))})
    with pytest.raises(fv.SavedFileError, match="no encoded picture"):
        fv.EncodedImage.load(weights)
    with pytest.raises(fv.SavedFileError, match=r"no encoded picture .*not replaced"):
        fv.EncodedImage(mx.zeros((2, 2))).save(weights)
    write_saved(other, "encoded picture", {"a": mx.zeros(2), "b": mx.zeros(2)}, {})
    with pytest.raises(fv.SavedFileError, match="tokens of one picture"):
        fv.EncodedImage.load(other)


def test_another_version_of_the_format_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastvlm_mlx.saved.VERSION", "7")
    fv.EncodedImage(mx.zeros((2, 2))).save(tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(fv.SavedFileError, match=f"version 7 .*reads version {VERSION}"):
        fv.EncodedImage.load(tmp_path / "a")


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    write_saved(file, "thing", {"x": mx.ones(3)}, {"n": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(fv.SavedFileError, match=r"the disk is full.*nothing was changed"):
        write_saved(file, "thing", {"x": mx.zeros(3)}, {"n": 2})
    assert read_saved(file, "thing")[1] == {"n": 1}
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(fv.SavedFileError, match="No such file or directory"):
        write_saved(tmp_path / "no" / "folder", "thing", {"x": mx.zeros(3)}, {})


@pytest.mark.parametrize("supported", [True, False])
def test_macos_flushes_the_drive_s_cache_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    asked: list[object] = []

    def fcntl(handle: int, command: int) -> None:
        asked.append(command)
        if not supported:  # SMB says so, WebDAV EINVAL, ZFS ENOTTY
            raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("os.fsync", lambda handle: asked.append("fsync"))
    monkeypatch.setattr("fcntl.F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr("fcntl.fcntl", fcntl)
    write_saved(tmp_path / "a", "thing", {"x": mx.zeros(3)}, {"n": 1})
    assert asked == ["fsync", 51]
    assert read_saved(tmp_path / "a", "thing")[1] == {"n": 1}


def test_a_disk_that_takes_no_more_leaves_nothing_half(tmp_path: Path) -> None:
    code = (
        "import resource, mlx.core as mx, fastvlm_mlx as fv\n"
        # Once before, so that what a GPU's driver writes for itself is written.
        "fv.EncodedImage(mx.zeros((64, 64))).save('b')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: fv.EncodedImage(mx.zeros((64, 64))).save('a')\n"
        "except fv.SavedFileError as error: print(error)\n"
        "fv.EncodedImage(mx.zeros((2, 2))).save('b')"
    )
    told = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=tmp_path)
    assert told.startswith("Cannot write a (File too large); nothing was changed.")
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


# ------------------------------------------------------------------------------------------ cache


def test_a_known_photo_costs_no_second_encoder_run(load: Load, picture: np.ndarray) -> None:
    vlm = load()
    first = vlm.ask(picture, "What is this?", max_tokens=4)
    second = vlm.ask(picture, "What is this?", max_tokens=4)
    vlm.encode(picture)
    assert vlm.runs == [256]  # type: ignore[attr-defined]
    assert first.tokens == second.tokens
    assert first.timings.encode > 0 and second.timings.encode < first.timings.encode
    vlm.ask([picture, picture[::-1], picture], "And?", max_tokens=1)
    assert vlm.runs == [256, 256]  # type: ignore[attr-defined]


def test_the_cache_can_be_off(load: Load, picture: np.ndarray) -> None:
    vlm = load(feature_cache=None)
    for _ in range(2):
        vlm.ask(picture, "What?", max_tokens=1)
    assert len(vlm.runs) == 2  # type: ignore[attr-defined]
    assert vlm.encode(picture).pixels is None


def test_another_size_or_fit_is_another_picture(load: Load, picture: np.ndarray) -> None:
    cache = fv.FeatureCache()
    models = [
        load(feature_cache=cache, **options)
        for options in ({}, {"image_size": 128}, {"fit": "crop"}, {"quantize": 4})
    ]
    tokens = [vlm.encode(picture).tokens for vlm in models]
    assert [len(vlm.runs) for vlm in models] == [1, 1, 1, 1]  # type: ignore[attr-defined]
    again = [vlm.encode(picture).tokens for vlm in models]
    assert [len(vlm.runs) for vlm in models] == [1, 1, 1, 1]  # type: ignore[attr-defined]
    for a, b in zip(tokens, again, strict=True):
        assert mx.array_equal(a, b)
    assert not mx.array_equal(tokens[0], tokens[2])


def test_pixels_that_differ_have_digests_that_differ() -> None:
    a = np.zeros((4, 6, 3), np.uint8)
    b = a.copy()
    b[3, 5, 2] = 1
    digests = {
        pixel_digest(crops)
        for crops in ([a], [b], [a, a], [a, b], [b, a], [a.reshape(6, 4, 3)], [a[:2], a[2:]])
    }
    assert len(digests) == 7
    assert pixel_digest([a[:, ::2]]) == pixel_digest([np.ascontiguousarray(a[:, ::2])])


def test_the_least_recently_used_goes_first(load: Load) -> None:
    vlm = load(feature_cache=3 * 16 * 64 * 4)  # three pictures of 16 float32 tokens
    a, b, c, d = _pictures(4)
    for image in (a, b, c, a, d):
        vlm.encode(image)
    assert len(vlm.runs) == 4  # type: ignore[attr-defined]
    assert vlm.feature_cache is not None
    assert vlm.feature_cache.used_bytes == vlm.feature_cache.memory_bytes
    for image in (a, c, d):
        vlm.encode(image)
    assert len(vlm.runs) == 4  # type: ignore[attr-defined]
    vlm.encode(b)
    assert len(vlm.runs) == 5  # type: ignore[attr-defined]
    vlm.feature_cache.clear()
    assert vlm.feature_cache.used_bytes == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), max_size=40), st.integers(0, 12))
def test_memory_is_bounded_and_counted(puts: list[tuple[int, int]], limit: int) -> None:
    cache = fv.FeatureCache(memory_bytes=limit * 4)
    for number, rows in puts:
        cache.put(fv.EncodedImage(mx.zeros((rows, 1)), "m", str(number)))
        kept = [cache.get("m", str(n)) for n in range(10)]
        assert cache.used_bytes == sum(i.tokens.nbytes for i in kept if i) <= limit * 4


def test_a_folder_outlives_the_process(load: Load, picture: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    first, second = load(feature_cache=folder), load(feature_cache=str(folder))
    tokens = first.encode(picture).tokens
    assert mx.array_equal(second.encode(picture).tokens, tokens)
    assert second.runs == []  # type: ignore[attr-defined]
    assert folder.stat().st_mode & 0o077 == 0, "what is in a picture is its owner's affair"
    other = load(feature_cache=folder, quantize=4)
    other.encode(picture)
    assert len(other.runs) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "another picture"])
def test_a_damaged_entry_is_replaced(
    load: Load, picture: np.ndarray, tmp_path: Path, damage: str
) -> None:
    tokens = load(feature_cache=tmp_path).encode(picture).tokens
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    if damage == "another picture":
        fv.EncodedImage(tokens + 1, "someone", "else")._write(file, durable=False)
    elif damage == "flipped":
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    else:
        file.write_bytes(good[: len(good) // 2 if damage == "truncated" else 0])
    vlm = load(feature_cache=tmp_path)
    assert mx.array_equal(vlm.encode(picture).tokens, tokens)
    assert len(vlm.runs) == 1  # type: ignore[attr-defined]
    assert file.read_bytes() == good


def test_other_shapes_and_types_of_the_same_bytes_are_damage(tmp_path: Path) -> None:
    file = tmp_path / "a"
    write_saved(file, "thing", {"x": mx.zeros((4, 6))}, {})
    loaded: Any = mx.load(str(file), format="safetensors", return_metadata=True)
    tensors, metadata = loaded
    mx.eval(tensors)
    for other in (tensors["x"].reshape(6, 4), tensors["x"].view(mx.int32)):
        with file.open("wb") as stream:
            mx.save_safetensors(stream, {"x": other}, metadata)
        with pytest.raises(fv.SavedFileError, match="do not match its checksum"):
            read_saved(file, "thing")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    write_saved(link, "thing", {"x": mx.zeros(3)}, {"n": 1})
    assert link.is_symlink() and read_saved(file, "thing")[1] == {"n": 1}


def test_tiles_are_not_taken_for_the_overview_they_share(load: Load, picture: np.ndarray) -> None:
    vlm = load(image_size=64)
    sizes = [
        vlm.encode(picture, tiles=tiles).tokens.shape[0]
        for tiles in ((1, 1), (2, 2), (1, 2), (1, 1), (2, 2))
    ]
    assert sizes == [1, 5, 3, 1, 5]
    assert len(vlm.runs) == 3  # type: ignore[attr-defined]


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    tokens = mx.zeros((64, 64))
    cache = fv.FeatureCache(folder=tmp_path, memory_bytes=0, disk_bytes=200_000)
    for n in range(40):
        cache.put(fv.EncodedImage(tokens, "m", str(n)))
        assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 200_000
    assert cache.get("m", "39") and not cache.get("m", "0")
    smaller = fv.FeatureCache(folder=tmp_path, memory_bytes=0, disk_bytes=50_000)
    smaller.put(fv.EncodedImage(tokens, "m", "new"))
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 50_000
    assert smaller.get("m", "new")


def test_what_was_asked_about_again_is_kept_on_disk(tmp_path: Path) -> None:
    cache = fv.FeatureCache(folder=tmp_path, memory_bytes=0, disk_bytes=100_000)
    for n in range(3):
        cache.put(fv.EncodedImage(mx.zeros((64, 64)), "m", str(n)))
    for age, file in enumerate(sorted(tmp_path.iterdir(), key=lambda f: f.stat().st_mtime_ns)):
        os.utime(file, (10**9 + age, 10**9 + age))
    assert cache.get("m", "0")
    smaller = fv.FeatureCache(folder=tmp_path, memory_bytes=0, disk_bytes=40_000)
    smaller.put(fv.EncodedImage(mx.zeros((64, 64)), "m", "new"))
    assert smaller.get("m", "0") and not smaller.get("m", "1")


def test_many_writers_share_a_folder(tmp_path: Path) -> None:
    caches = [fv.FeatureCache(folder=tmp_path, memory_bytes=0, disk_bytes=60_000) for _ in "abcd"]
    wrong: list[object] = []

    def work(cache: fv.FeatureCache, seed: int) -> None:
        numbers = np.random.default_rng(seed)
        with mx.stream(mx.new_stream(mx.cpu)):
            for n in numbers.integers(0, 9, 30):
                found = cache.get("m", str(n))
                if found is not None and found.tokens[0, 0].item() != n:
                    wrong.append(n)
                cache.put(fv.EncodedImage(mx.full((40, 64), int(n)), "m", str(n)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=work, args=(c, s)) for s, c in enumerate(caches)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert not [f for f in tmp_path.iterdir() if f.suffix != ".safetensors"]


def test_a_file_removed_at_once_by_another_process_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = fv.EncodedImage._write

    def write_and_lose(self: fv.EncodedImage, path: Path, *, durable: bool) -> None:
        write(self, path, durable=durable)
        path.unlink()

    monkeypatch.setattr(fv.EncodedImage, "_write", write_and_lose)
    cache = fv.FeatureCache(folder=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.put(fv.EncodedImage(mx.ones((4, 8)), "m", "p"))
    assert cache.get("m", "p") is not None, "still in memory"


def test_a_folder_that_cannot_be_written_costs_one_warning(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = load(feature_cache=tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx.core.save_safetensors", full)
    a, b = _pictures(2)
    with pytest.warns(UserWarning, match="keeps nothing new.*disk is full"):
        vlm.encode(a)
    vlm.encode(b)
    vlm.encode(b)
    assert len(vlm.runs) == 2  # type: ignore[attr-defined]


def test_wrong_caches(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for wrong, what in [
        (-1, "memory_bytes is -1"),
        (1.5, "memory_bytes is 1.5"),
        (True, "memory_bytes is True"),
        (tmp_path / "file", "cannot be used as a directory"),
    ]:
        with pytest.raises(fv.OptionError, match=what):
            fv.load("does/not/exist", feature_cache=wrong)
