"""`fastvlm caption` on folders: files that survive anything, and exit codes that tell the truth."""

import csv
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from tests.test_cli import one_line, run

MAIN = "from fastvlm_mlx.cli import main; main()"
# Slow enough that there is something to interrupt.
SLOW = f"""
import time, fastvlm_mlx.vlm as v
fast = v.FastVLM.ask_batch
v.FastVLM.ask_batch = lambda *a, **k: (time.sleep(0.15), fast(*a, **k))[1]
{MAIN}
"""
NAMES = ["Ein Bild – 1.png", "名前.png", "a b.png", "émoji 🐞.png", "z'\"&.png"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    folder.mkdir()
    rng = np.random.default_rng(11)
    for name in NAMES:
        pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / name)
    return folder


def caption(*args: Any, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    return run("caption", *args, "--max-tokens", "3", **kwargs)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_folder_is_captioned_to_stdout(tiny: Path, photos: Path) -> None:
    result = caption(photos, "-m", tiny)
    lines = result.stdout.decode().splitlines()
    assert result.returncode == 0
    assert [line.split(": ")[0] for line in lines] == [str(photos / n) for n in sorted(NAMES)]
    assert re.fullmatch(r"5 captioned, 0 failed, .* pictures/s\n", one_line(result))
    assert b"\x1b" not in result.stdout + result.stderr and b"\r" not in result.stderr
    alone = caption(photos / NAMES[0], "-m", tiny)
    assert f"{photos / NAMES[0]}: {alone.stdout.decode().strip()}" in lines


def test_records_have_text_and_errors_and_the_exit_code_tells(tiny: Path, photos: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"not a picture")
    out = photos.parent / "captions.jsonl"
    result = caption(photos, "-m", tiny, "--out", out, "--batch", "2", "--workers", "2")
    assert result.returncode == 1
    assert result.stdout == b""
    complaint, summary = result.stderr.decode().splitlines()
    assert "broken.jpg is not an image" in complaint
    assert summary.startswith("5 captioned, 1 failed, ")
    found = {Path(record["image"]).name: record for record in records(out)}
    assert sorted(found) == sorted([*NAMES, "broken.jpg"])
    assert "not an image" in found["broken.jpg"]["error"] and "text" not in found["broken.jpg"]
    assert found["名前.png"]["tokens"] == 3 and found["名前.png"]["batch"] == 2
    # Nothing is left to do, so no model is loaded; that one had failed is still told.
    again = caption(photos, "-m", tiny, "--out", out, "--resume")
    assert again.returncode == 1
    assert one_line(again) == "0 captioned, 0 failed, 6 done before, 1 of them failed\n"


WITHOUT_HEIF = f"import sys; sys.modules['pillow_heif'] = None; {MAIN}"


@pytest.mark.parametrize("command", ["caption FOLDER --out OUT", "caption ONE", "ask ONE What?",
                                     "chat ONE", "caption FOLDER --out OUT --resume"])  # fmt: skip
def test_heic_without_its_package_is_one_line_before_anything_else(
    photos: Path, command: str
) -> None:
    """Neither a record per picture, nor the wait for a model: this one does not even exist."""
    out = photos.parent / "captions.jsonl"
    if "--resume" in command:
        done = {"image": str(photos / "IMG_1.HEIC"), "text": "A cat.", "prompt_tokens": 5}
        made = {"model": "/no/such", "prompt": "Describe the image."}
        out.write_text(json.dumps({**done, **made, "finish_reason": "stop"}) + "\n")
    before = out.read_bytes() if out.exists() else None
    for name in ("IMG_1.HEIC", "IMG_2.HEIC", "IMG_3.heif"):
        (photos / name).touch()
    places = {"FOLDER": photos, "ONE": photos / "IMG_1.HEIC", "OUT": out}
    words = [str(places.get(word, word)) for word in command.split()]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_HEIF, *words, "-m", "/no/such"],
        capture_output=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    line = one_line(result)
    first = "IMG_2.HEIC and 1 more of 7" if "--resume" in command else "IMG_1.HEIC"
    assert (result.returncode, result.stdout) == (1, b"")
    assert first in line and 'pip install "fastvlm-mlx[heif]"' in line
    assert ("2 more of 8" in line) == (command == "caption FOLDER --out OUT")
    assert (out.read_bytes() if out.exists() else None) == before


def test_captions_do_not_depend_on_the_batch(tiny: Path, photos: Path) -> None:
    texts = set()
    for batch in ("1", "4"):
        out = photos.parent / f"{batch}.csv"
        assert caption(photos, "-m", tiny, "-o", out, "--batch", batch).returncode == 0
        with out.open(newline="", encoding="utf-8") as file:
            texts.add(tuple(row["text"] for row in csv.DictReader(file, strict=True)))
    assert len(texts) == 1


def test_an_existing_file_needs_resume_or_force(tiny: Path, photos: Path) -> None:
    out = photos.parent / "captions.jsonl"
    assert caption(photos, "-m", tiny, "--out", out).returncode == 0
    before = out.read_bytes()
    refused = caption(photos, "-m", tiny, "--out", out)
    assert refused.returncode == 2 and "--resume" in one_line(refused)
    mixed = caption(photos, "-m", tiny, "--out", out, "--resume", "--style", "ocr")
    assert mixed.returncode == 2 and "was made with prompt" in one_line(mixed)
    failed = caption(photos, "-m", "/no/such/model", "--out", out, "--force")
    assert failed.returncode == 1
    assert out.read_bytes() == before
    forced = caption(photos, "-m", tiny, "--out", out, "--force", "--style", "ocr")
    assert forced.returncode == 0
    assert {record["prompt"] for record in records(out)} == {"What text is in the image?"}


def test_the_same_picture_is_recorded_once(tiny: Path, photos: Path) -> None:
    out = photos.parent / "captions.jsonl"
    first = photos / NAMES[0]
    result = caption(first, photos, first, photos / "*.png", "-m", tiny, "--out", out)
    assert result.returncode == 0
    assert len(records(out)) == 5
    (photos.parent / "link").symlink_to(photos)  # as /tmp is one, to /private/tmp
    for again in (os.path.relpath(photos), photos.parent / "link"):
        result = run("caption", again, "-m", tiny, "--out", out, "--resume")
        assert "0 captioned, 0 failed, 5 done before" in one_line(result)


def test_duplicates_are_captioned_once_also_after_a_resume(tiny: Path, photos: Path) -> None:
    out = photos.parent / "captions.jsonl"
    copy = photos / "zz copy.png"
    copy.write_bytes((photos / NAMES[0]).read_bytes())
    assert caption(photos, "-m", tiny, "--out", out, "--dedupe").returncode == 0
    by_name = {Path(record["image"]).name: record for record in records(out)}
    assert by_name[copy.name]["duplicate_of"] == str(photos / NAMES[0])
    # What it cost is told once, with the picture that was asked about.
    assert by_name[NAMES[0]].keys() - by_name[copy.name].keys() == {
        "tokens", "ttft", "timings", "batch",
    }  # fmt: skip
    assert by_name[copy.name]["text"] == by_name[NAMES[0]]["text"]
    (photos / "zzz.png").write_bytes(copy.read_bytes())
    more = caption(photos, "-m", tiny, "--out", out, "--dedupe", "--resume")
    assert "1 captioned (1 as duplicates), 0 failed, 6 done before" in one_line(more)


def test_sidecars_beside_the_pictures(tiny: Path, photos: Path) -> None:
    (photos / "a b.txt").write_text("mine")
    result = caption(photos, "-m", tiny, "--sidecar", "txt")
    assert result.returncode == 1
    assert "a b.txt exists; --force" in result.stderr.decode()
    assert (photos / "a b.txt").read_text() == "mine"
    assert len(list(photos.glob("*.txt"))) == 5
    assert "done before" in one_line(caption(photos, "-m", tiny, "--sidecar", "txt", "--resume"))
    assert caption(photos, "-m", tiny, "--sidecar", "xmp").returncode == 0
    assert (photos / "名前.png.xmp").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder_is_an_error_of_each_picture(tiny: Path, photos: Path) -> None:
    photos.chmod(0o555)
    try:
        out = photos.parent / "captions.jsonl"
        result = caption(photos, "-m", tiny, "--sidecar", "txt", "--out", out)
    finally:
        photos.chmod(0o755)
    assert result.returncode == 1
    assert all("Permission denied" in r["error"] and r["text"] for r in records(out))


def test_a_sidecar_in_the_way_keeps_its_caption_in_the_record(tiny: Path, photos: Path) -> None:
    (photos / "a b.txt").mkdir()
    out = photos.parent / "captions.jsonl"
    result = caption(photos, "-m", tiny, "--sidecar", "txt", "--force", "--out", out)
    assert result.returncode == 1
    (bad,) = [record for record in records(out) if "error" in record]
    assert "a b.txt cannot be written" in bad["error"] and bad["text"]
    assert not list(photos.glob(".*"))


@pytest.mark.parametrize(
    ("args", "code", "named"),
    [
        (["EMPTY"], 1, "no pictures found"),
        (["PHOTOS/*.gif"], 1, "no pictures found"),
        (["PHOTOS", "--style", "haiku"], 2, "short, detailed, alt, tags, ocr"),
        (["PHOTOS", "--style", "alt", "-p", "What?"], 2, "--style or --prompt"),
        (["PHOTOS", "--resume"], 2, "nothing to continue"),
        (["PHOTOS", "--force"], 2, "nothing to replace"),
        (["PHOTOS", "-p", " "], 1, "The question is ' '"),
        (["PHOTOS", "--resume", "--force", "--out", "x.jsonl"], 2, "one of them"),
        (["PHOTOS", "--out", "x.txt"], 2, ".jsonl or .csv"),
        (["PHOTOS", "--out", "EMPTY/no/x.csv"], 1, "make its folder first"),
        (["PHOTOS", "--json", "--out", "x.jsonl"], 2, "--json is for stdout"),
        (["PHOTOS", "--sidecar", "exif"], 2, "expected txt or xmp"),
        (["-", "--sidecar", "txt"], 2, "stdin"),
        (["-", "-"], 2, "stdin can be read once"),
        (["PHOTOS", "--batch", "0"], 2, "batch is 0"),
        (["PHOTOS", "--workers", "0"], 2, "workers is 0"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    args: list[str], code: int, named: str, tiny: Path, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(tmp_path)
    places = [a.replace("PHOTOS", str(photos)).replace("EMPTY", str(empty)) for a in args]
    result = caption(*places, "-m", tiny)
    assert named in one_line(result)
    assert result.returncode == code
    assert result.stdout == b""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "my photos"]


def test_stdin_among_others(tiny: Path, photos: Path) -> None:
    result = caption(
        "-", photos / "a b.png", "-m", tiny, "--json", stdin=(photos / "名前.png").read_bytes()
    )
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["image"], second["image"]) == ("-", str(photos / "a b.png"))


def test_a_name_that_is_no_unicode(tiny: Path, photos: Path) -> None:
    odd = os.fsencode(photos) + b"/caf\xe9.png"
    try:
        Path(os.fsdecode(odd)).write_bytes((photos / "a b.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    strict = {"PYTHONIOENCODING": "utf-8:strict"}
    printed = caption(photos, "-m", tiny, env=strict)
    assert printed.returncode == 0 and odd in printed.stdout
    documents = caption(photos, "-m", tiny, "--json", env=strict).stdout.decode().splitlines()
    assert os.fsdecode(odd) in [json.loads(line)["image"] for line in documents]
    for out in (photos.parent / "captions.jsonl", photos.parent / "captions.csv"):
        assert caption(photos, "-m", tiny, "--out", out).returncode == 0
        again = caption(photos, "-m", tiny, "--out", out, "--resume")
        assert "6 done before" in one_line(again)


def _start(*args: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, "caption", *map(str, args), "--max-tokens", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A job in the background of a script is started with Ctrl-C switched off.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _wait_for_records(path: Path, count: int) -> None:
    for _ in range(600):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {count} records within 30 s")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_is_continued(tiny: Path, photos: Path, ending: signal.Signals) -> None:
    for n in range(12):
        (photos / f"more {n}.png").write_bytes((photos / NAMES[n % 5]).read_bytes())
    out = photos.parent / "captions.jsonl"
    with _start(photos, "-m", tiny, "--out", out, "--batch", "1") as process:
        _wait_for_records(out, 2)
        process.send_signal(ending)
        _, err = process.communicate(timeout=30)
    done = records(out)
    assert 2 <= len(done) < 17
    if ending == signal.SIGINT:
        assert process.returncode == 130
        assert b"Traceback" not in err and b"captioned, 0 failed" in err
    resumed = caption(photos, "-m", tiny, "--out", out, "--resume")
    assert resumed.returncode == 0
    assert f"{len(done)} done before" in resumed.stderr.decode()
    images = [record["image"] for record in records(out)]
    assert len(images) == len(set(images)) == 17
    assert records(out)[: len(done)] == done, "nothing was redone"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_line(tiny: Path, photos: Path) -> None:
    out = photos.parent / "captions.jsonl"
    out.symlink_to("/dev/full")  # every write fails
    result = caption(photos, "-m", tiny, "--out", out)
    assert result.returncode == 1
    assert "No space left on device" in result.stderr.decode()
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("to_file", [True, False])
def test_a_person_sees_a_bar_and_a_pipe_the_answers(
    tiny: Path, photos: Path, to_file: bool
) -> None:
    out = photos.parent / "captions.jsonl"
    person, terminal = pty.openpty()
    command = [sys.executable, "-c", SLOW, "caption", str(photos), "-m", str(tiny),
               "--max-tokens", "2", "--batch", "1"]  # fmt: skip
    command += ["--out", str(out)] if to_file else []
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        seen = b""
        while True:
            try:
                chunk = os.read(person, 1 << 16)
            except OSError:  # the terminal was hung up: the command has ended
                break
            if not chunk:
                break
            seen += chunk
        assert process.stdout is not None
        answers = process.stdout.read().decode().splitlines()
        process.wait(30)
    os.close(person)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert process.returncode == 0
    assert "Captioning" in text and "5/5" in text and "pictures/s" in text
    assert text.strip().splitlines()[-1].startswith("5 captioned, 0 failed")
    assert len(answers) == (0 if to_file else 5)
    assert not any("\x1b" in line for line in answers)
