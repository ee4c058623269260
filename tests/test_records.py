"""Files of records: whole at every moment, continued exactly, never lost."""

import errno
import json
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastvlm_mlx as fv
from fastvlm_mlx.listing import find_pictures
from fastvlm_mlx.many import Record
from fastvlm_mlx.records import RecordFile, picture_key, record_fields
from fastvlm_mlx.sidecars import Sidecars, xmp_packet

MADE = {"model": "nano", "prompt": 'Say "it",\nplease'}


def _answer(text: str) -> fv.Answer:
    return fv.Answer(text, (1, 2), 20, "stop", fv.Timings(encode=0.5))


def _fields(name: str, text: str = "A cat.", **more: Any) -> dict[str, Any]:
    return record_fields(name, Record(name, _answer(text), **more))


def _write(path: Path, names: list[str], **how: bool) -> None:
    with RecordFile(path, MADE, **how) as file:
        for name in names:
            if picture_key(name) not in file.done:
                file.write(_fields(name))


def _names(path: Path) -> list[str]:
    import csv

    if path.suffix == ".jsonl":
        return [json.loads(line)["image"] for line in path.read_text().splitlines()]
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [row["image"] for row in csv.DictReader(file, strict=True)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_file_cut_at_any_byte_is_continued_to_the_whole(tmp_path: Path, suffix: str) -> None:
    """What a kill or a power failure leaves is a prefix of what would have been written."""
    names = ["a.jpg", 'b "zwei",\n.jpg', "名前.png"]
    whole = tmp_path / f"whole{suffix}"
    _write(whole, names)
    data = whole.read_bytes()
    assert _names(whole) == names
    cut = tmp_path / f"cut{suffix}"
    for length in range(len(data) + 1):
        cut.write_bytes(data[:length])
        _write(cut, names, resume=True)
        assert cut.read_bytes() == data, f"cut at {length}"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@settings(deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    name=st.text(st.characters(exclude_characters="\0"), min_size=1),
)
def test_any_text_and_name_come_back(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, text: str, name: str
) -> None:
    path = tmp_path_factory.mktemp("r") / f"r{suffix}"
    name = name.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    with RecordFile(path, MADE) as file:
        file.write(_fields(name, text, sha256="ab"))
    with RecordFile(path, MADE, resume=True) as file:
        assert file.done == {picture_key(name): True}
        assert not text or file.known["ab"].answer.text == text


def test_failures_count_as_done_and_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path, MADE) as file:
        file.write(record_fields("bad.jpg", Record("bad.jpg", error="no picture")))
        file.write(_fields("good.jpg"))
    with RecordFile(path, MADE, resume=True) as file:
        assert sorted(file.done.values()) == [False, True]
    bad, good = (json.loads(line) for line in path.read_text().splitlines())
    assert bad == {"image": "bad.jpg", "error": "no picture", **MADE}
    assert good["tokens"] == 2 and good["ttft"] == 0.5


def test_an_existing_file_is_neither_overwritten_nor_mixed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _write(path, ["a.jpg"])
    before = path.read_bytes()
    with pytest.raises(fv.OptionError, match="--resume, or replace it with --force"):
        RecordFile(path, MADE)
    with pytest.raises(fv.OptionError, match="was made with prompt"):
        RecordFile(path, {**MADE, "prompt": "Other?"}, resume=True)
    with RecordFile(path, MADE, force=True):
        assert path.read_bytes() == before, "replaced only when there is something to replace it"
    assert path.read_bytes() == before
    _write(path, ["b.jpg"], force=True)
    assert _names(path) == ["b.jpg"]


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\n", b'{"a": 1}\n', b"image,text\n", b"\0"]
)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_foreign_file_is_never_repaired(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"r{suffix}"
    path.write_bytes(content)
    with pytest.raises(fv.OutputError, match="record 1 is not one of captions"):
        RecordFile(path, MADE, resume=True)
    assert path.read_bytes() == content


def test_damage_in_the_middle_is_told(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _write(path, ["a.jpg", "b.jpg"])
    damaged = path.read_bytes().replace(b'{"image": "b', b'{"image": b')
    path.write_bytes(damaged + b'{"image": "c')
    with pytest.raises(fv.OutputError, match="record 2"):
        RecordFile(path, MADE, resume=True)
    assert path.read_bytes().startswith(damaged)


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    with (
        RecordFile(tmp_path / "r.jsonl", MADE),
        pytest.raises(fv.OutputError, match="being written by another run"),
    ):
        RecordFile(tmp_path / "r.jsonl", MADE)
    assert not (tmp_path / "r.jsonl").exists(), "nothing was written, so nothing is left"


def test_a_full_disk_leaves_whole_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    with RecordFile(path, MADE) as file:
        file.write(_fields("a.jpg"))
        raw = file._file

        class Full:
            """A disk with room for ten more bytes."""

            def write(self, data: bytes) -> int:
                return raw.write(data[:10])

            def __getattr__(self, name: str) -> Any:
                return getattr(raw, name)

        file._file = Full()  # type: ignore[assignment]
        with pytest.raises(fv.OutputError, match=r"No space left.*--resume"):
            file.write(_fields("b.jpg"))
        file._file = raw
    assert _names(path) == ["a.jpg"]
    _write(path, ["a.jpg", "b.jpg"], resume=True)
    assert _names(path) == ["a.jpg", "b.jpg"]


def test_the_form_follows_the_name(tmp_path: Path) -> None:
    with pytest.raises(fv.OptionError, match=r"\.jsonl or \.csv"):
        RecordFile(tmp_path / "r.json", MADE)
    with pytest.raises(fv.OutputError, match="No such file"):
        RecordFile(tmp_path / "missing" / "r.jsonl", MADE)


# --- sidecars ---


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_xmp_carries_any_text(text: str) -> None:
    packet = xmp_packet(text)
    root = ElementTree.fromstring(packet.encode())
    rdf, dc = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}", "{http://purl.org/dc/elements/1.1/}"
    item = root.find(f"{rdf}RDF/{rdf}Description/{dc}description/{rdf}Alt/{rdf}li")
    assert item is not None
    assert item.get("{http://www.w3.org/XML/1998/namespace}lang") == "x-default"
    legal = "".join(
        c if c in "\t\n\r" or " " <= c not in "\ufffe\uffff" else "\ufffd" for c in text
    )
    # XML readers give every line end as \n.
    assert (item.text or "") == legal.replace("\r\n", "\n").replace("\r", "\n")


def test_sidecars_stand_beside_their_pictures(tmp_path: Path) -> None:
    photo = str(tmp_path / "Ein Bild.v2.jpg")
    Sidecars("txt").write(photo, "Ein Käfer.")
    Sidecars("xmp").write(photo, "<A & B>")
    assert (tmp_path / "Ein Bild.v2.txt").read_text() == "Ein Käfer.\n"
    assert "&lt;A &amp; B&gt;" in (tmp_path / "Ein Bild.v2.jpg.xmp").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Ein Bild.v2.jpg.xmp", "Ein Bild.v2.txt"]
    with pytest.raises(fv.OptionError, match="txt or xmp"):
        Sidecars("json")


def test_other_people_s_sidecars_are_kept(tmp_path: Path) -> None:
    photo = str(tmp_path / "a.jpg")
    for form, name in (("txt", "a.txt"), ("xmp", "a.jpg.xmp")):
        theirs = tmp_path / name
        theirs.write_text("rating 5")
        with pytest.raises(fv.OutputError, match="exists; --force"):
            Sidecars(form).write(photo, "A cat.")
        assert theirs.read_text() == "rating 5"
        Sidecars(form, force=True).write(photo, "A cat.")
        assert "A cat." in theirs.read_text()
        Sidecars(form).write(photo, "A cat.")
    Sidecars("xmp").write(photo, "A dog.")
    assert "A dog." in (tmp_path / "a.jpg.xmp").read_text(), "our own XMP is ours to renew"
    with pytest.raises(fv.OutputError, match="exists"):
        Sidecars("txt").write(photo, "A dog.")


def test_pictures_that_differ_in_their_ending_do_not_share_a_text(tmp_path: Path) -> None:
    sidecars = Sidecars("txt", force=True)
    sidecars.write(str(tmp_path / "a.jpg"), "A cat.")
    with pytest.raises(fv.OutputError, match=r"belongs to .*a\.jpg"):
        sidecars.write(str(tmp_path / "a.png"), "A dog.")
    assert (tmp_path / "a.txt").read_text() == "A cat.\n"


def test_sidecars_are_one_where_the_file_system_says_so(tmp_path: Path) -> None:
    """As A.txt and a.txt are on most Macs; here a second name of the folder stands for that."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "same").symlink_to(tmp_path / "photos")
    sidecars = Sidecars("txt", force=True)
    sidecars.write(str(tmp_path / "photos" / "a.jpg"), "A cat.")
    sidecars.write(str(tmp_path / "photos" / "a.jpg"), "A cat, again.")
    with pytest.raises(fv.OutputError, match=r"belongs to .*photos/a\.jpg"):
        sidecars.write(str(tmp_path / "same" / "a.png"), "A dog.")
    assert (tmp_path / "photos" / "a.txt").read_text() == "A cat, again.\n"


def test_the_same_picture_has_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "tmp").symlink_to(tmp_path / "private")
    there = picture_key(str(tmp_path / "private" / "a.jpg"))
    assert picture_key(str(tmp_path / "tmp" / "a.jpg")) == there
    assert picture_key(str(tmp_path / "tmp" / ".." / "private" / "a.jpg")) == there
    assert picture_key(str(tmp_path / "private" / "A.jpg")) != there
    assert picture_key(str(tmp_path / "gone" / "a.jpg")) == str(tmp_path / "gone" / "a.jpg")
    for name in ("-", "https://host/a/../b.jpg", "data:image/png,a/../b"):
        assert picture_key(name) == name
    one, two = "Caf\u00e9.jpg", "Cafe\u0301.jpg"
    monkeypatch.setattr("sys.platform", "linux")
    assert picture_key(one) != picture_key(two), "two files may stand side by side"
    monkeypatch.setattr("sys.platform", "darwin")
    assert picture_key(one) == picture_key(two)


def test_a_sidecar_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(fv.OutputError, match="No space left"):
        Sidecars("txt").write(str(tmp_path / "a.jpg"), "A cat.")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(fv.OutputError, match="No such file"):
        Sidecars("txt").write(str(tmp_path / "gone" / "a.jpg"), "A cat.")


def test_a_read_only_disk_is_seen_as_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There even removing what was never written fails."""

    def read_only(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(fv.OutputError, match="Read-only file system"):
        Sidecars("xmp").write(str(tmp_path / "a.jpg"), "A cat.")


# --- finding pictures ---


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.JPG", "a.png", "ü ß.webp", "notes.txt", ".hidden.jpg", "._a.png",
                 "sub/c.heic", "sub/deep/d.tif", ".cache/e.jpg", "x[1].jpg"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("places", "recursive", "expected"),
    [
        (["."], False, ["a.png", "b.JPG", "x[1].jpg", "ü ß.webp"]),
        (["."], True, ["a.png", "b.JPG", "x[1].jpg", "ü ß.webp", "sub/c.heic", "sub/deep/d.tif"]),
        (["sub"], False, ["sub/c.heic"]),
        (["*.png", "."], False, ["a.png", "b.JPG", "x[1].jpg", "ü ß.webp"]),
        (["**/*.[ht]*"], False, ["sub/c.heic", "sub/deep/d.tif"]),
        (["*"], False, ["a.png", "b.JPG", "x[1].jpg", "ü ß.webp"]),
        (["x[1].jpg"], False, ["x[1].jpg"]),
        (["notes.txt", "no.jpg", "-", "https://a.b/*.jpg"], False,
         ["notes.txt", "no.jpg", "-", "https://a.b/*.jpg"]),
        (["a.png", "a.png"], False, ["a.png", "a.png"]),
        (["data:image/png;base64," + 9000 * "A"], False, ["data:image/png;base64," + 9000 * "A"]),
    ],
)  # fmt: skip
def test_places_become_pictures(
    tree: Path, places: list[str], recursive: bool, expected: list[str]
) -> None:
    assert find_pictures(places, recursive=recursive) == expected


@pytest.mark.parametrize(
    ("place", "recursive", "named"),
    [
        ("empty", False, "empty: no pictures found.*--recursive"),
        ("empty", True, "empty: no pictures found; expected files that end in .jpg"),
        ("*.gif", False, "check the pattern"),
    ],
)
def test_a_place_without_pictures_is_told(
    tree: Path, place: str, recursive: bool, named: str
) -> None:
    with pytest.raises(fv.ImageError, match=named):
        find_pictures([place], recursive=recursive)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of pictures with a photo library of macOS in it."""
    for name in ("a.jpg", "trip/b.heic", "My.photoslibrary/originals/0/0AF1.heic",
                 "My.photoslibrary/originals/F/F00D.jpeg",
                 "My.photoslibrary/resources/derivatives/0/0AF1_1_105_c.jpeg",
                 "old/Old.aplibrary/Masters/2009/c.jpg",
                 "old/Old.aplibrary/Thumbnails/c.jpg"):  # fmt: skip
        path = tmp_path / "Pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "Pictures"


def _found(folder: Path, place: str, **how: bool) -> tuple[list[str], list[str]]:
    told: list[str] = []
    names = find_pictures([f"{folder}/{place}"], notice=told.append, **how)
    return [str(Path(name).relative_to(folder)) for name in names], told


def test_a_photo_library_is_left_out_aloud(library: Path) -> None:
    names, told = _found(library, "", recursive=True)
    assert names == ["a.jpg", "trip/b.heic"]
    assert [line.partition(": ")[0] for line in told] == [
        f"{library}/My.photoslibrary", f"{library}/old/Old.aplibrary",
    ]  # fmt: skip
    assert all("left out" in line for line in told)
    assert _found(library, "**/*.jp*g") == (["a.jpg"], told)
    assert _found(library, "") == (["a.jpg"], []), "nobody asked for what is in folders"


def test_a_photo_library_by_name_gives_its_originals(library: Path) -> None:
    originals = [f"My.photoslibrary/originals/{n}" for n in ("0/0AF1.heic", "F/F00D.jpeg")]
    assert _found(library, "My.photoslibrary/") == (originals, [])
    assert _found(library, "old/Old.aplibrary") == (["old/Old.aplibrary/Masters/2009/c.jpg"], [])
    assert _found(library, "My.photoslibrary/**/*.jpeg", recursive=True) == (
        [originals[1], "My.photoslibrary/resources/derivatives/0/0AF1_1_105_c.jpeg"], [],
    )  # fmt: skip
    (library / "New.photoslibrary").mkdir()
    with pytest.raises(fv.ImageError, match="no folder of originals; export"):
        _found(library, "New.photoslibrary")


@pytest.mark.parametrize("recursive", [False, True])
def test_a_folder_that_macos_keeps_from_programs(
    library: Path, monkeypatch: pytest.MonkeyPatch, recursive: bool
) -> None:
    def refuse(path: str) -> Any:
        raise PermissionError(1, "Operation not permitted", path)

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("os.scandir", refuse)
    monkeypatch.setattr("os.listdir", refuse)
    for place in (library, library / "My.photoslibrary"):
        with pytest.raises(fv.ImageError, match=r"Operation not permitted.*Privacy & Security"):
            find_pictures([str(place)], recursive=recursive)


def test_a_folder_inside_that_macos_keeps_from_programs_is_left_out_aloud(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does with Photo Booth's, which would else stop every run over ~/Pictures."""
    (library / "Photo Booth Library").mkdir()
    scandir, code = os.scandir, errno.EPERM

    def guarded(path: str) -> Any:
        if path.endswith("Photo Booth Library"):
            raise PermissionError(code, os.strerror(code), path)
        return scandir(path)

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("os.scandir", guarded)
    names, told = _found(library, "", recursive=True)
    assert names == ["a.jpg", "trip/b.heic"]
    (line,) = (line for line in told if "Booth" in line)
    assert line.startswith("left out: ") and "Privacy & Security" in line
    code = errno.EACCES  # a folder of somebody else: not macOS's doing
    with pytest.raises(fv.ImageError, match="Booth Library cannot be listed"):
        _found(library, "", recursive=True)


def test_a_home_that_the_shell_left_to_us(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree))
    assert find_pictures(["~/sub"]) == [str(tree / "sub" / "c.heic")]
    assert find_pictures(["~/*.png"]) == [str(tree / "a.png")]
    assert find_pictures(["~/a.png", "~nobody/b.png"]) == ["~/a.png", "~nobody/b.png"]


def test_patterns_find_accents_in_either_form(tmp_path: Path) -> None:
    (tmp_path / "Cafe\u0301 1.jpg").touch()  # as an application on macOS may have written it
    (tmp_path / "Z\u00fcrich 1.jpg").touch()
    for typed in ("Caf\u00e9*", "Cafe\u0301*", "Z\u00fcrich*", "Zu\u0308rich*"):
        assert len(find_pictures([str(tmp_path / typed)])) == 1
    (tmp_path / "Caf\u00e9 2.jpg").touch()  # a folder may hold both, and neither is left out
    for typed in ("Caf\u00e9*", "Cafe\u0301*"):
        assert len(find_pictures([str(tmp_path / typed)])) == 2


def test_a_file_found_under_both_spellings_is_one(tmp_path: Path) -> None:
    """As where the file system takes both for the same folder."""
    (tmp_path / "Caf\u00e9").mkdir()
    (tmp_path / "Cafe\u0301").symlink_to(tmp_path / "Caf\u00e9")
    (tmp_path / "Caf\u00e9" / "a.jpg").touch()
    (tmp_path / "Caf\u00e9" / "b.jpg").touch()
    assert len(find_pictures([str(tmp_path / "Caf\u00e9" / "*.jpg")])) == 2
