"""The command line: streams, exit codes, and one clear line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from fastvlm_mlx.cli import output
from fastvlm_mlx.cli.output import print_stats, waiting
from fastvlm_mlx.generation import Answer, Timings


def run(
    *args: str | Path, stdin: bytes | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run the real command in a process of its own."""
    command = [sys.executable, "-c", "from fastvlm_mlx.cli import main; main()", *map(str, args)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, check=False)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory, picture: np.ndarray) -> Path:
    file = tmp_path_factory.mktemp("photos") / "Ein Bild – 1.png"
    PIL.Image.fromarray(picture).save(file)
    return file


def one_line(result: subprocess.CompletedProcess[bytes]) -> str:
    text = result.stderr.decode()
    assert "Traceback" not in text
    assert text.count("\n") == 1, text
    return text


def test_help_lists_own_commands_and_plugged_in_ones() -> None:
    result = run("--help")
    assert result.returncode == 0
    for name in ("caption", "ask", "info", "doctor", "convert", "bench"):
        assert name in result.stdout.decode()
    assert run("--version").stdout.startswith(b"fastvlm-mlx ")
    assert run("convert", "--help").returncode == 0


def test_help_needs_neither_mlx_nor_the_plugins() -> None:
    code = (
        "import sys; sys.argv = ['fastvlm', '--help']\n"
        "from fastvlm_mlx.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "heavy = ('mlx', 'numpy', 'PIL', 'rich', 'fastvlm_mlx.convert', 'fastvlm_mlx.benchmarks')\n"
        "print([m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stderr.strip() == b"[]"


def test_answer_on_stdout_everything_else_on_stderr(tiny: Path, photo: Path) -> None:
    result = run("caption", photo, "-m", tiny, "--max-tokens", "5", "--stats")
    assert result.returncode == 0
    assert result.stdout.endswith(b"\n") and result.stdout.count(b"\n") == 1
    assert b"first token after" in result.stderr
    assert b"\x1b" not in result.stdout + result.stderr, "no control codes when piped"


def test_json_is_one_document_per_picture(tiny: Path, photo: Path) -> None:
    result = run("caption", photo, photo, "-m", tiny, "--max-tokens", "3", "--json")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first["image"] == str(photo)
    assert (first["tokens"], first["finish_reason"]) == (3, "length")
    assert first["text"] == second["text"]
    assert set(first["timings"]) == {
        "load_image", "preprocess", "encode", "prefill", "first_token", "decode",
    }  # fmt: skip
    assert first["ttft"] == pytest.approx(
        sum(s for name, s in first["timings"].items() if name != "decode"), abs=1e-4
    )


def test_the_model_can_come_from_the_environment_and_the_picture_from_stdin(
    tiny: Path, photo: Path
) -> None:
    by_file = run("caption", photo, "-m", tiny, "--max-tokens", "4")
    by_pipe = run(
        "caption", "-", "--max-tokens", "4", stdin=photo.read_bytes(),
        env={"FASTVLM_MODEL": str(tiny)},
    )  # fmt: skip
    assert by_pipe.stdout == by_file.stdout


def test_a_feature_cache_outlives_the_command(tiny: Path, photo: Path, tmp_path: Path) -> None:
    def answer(*options: str | Path, env: dict[str, str] | None = None) -> tuple[str, float]:
        result = run("caption", photo, "-m", tiny, "--max-tokens", "4", "--json", *options, env=env)
        record = json.loads(result.stdout)
        return record["text"], record["timings"]["encode"]

    folder = tmp_path / "features"
    first = answer("--feature-cache", folder)
    again = answer(env={"FASTVLM_FEATURE_CACHE": str(folder)})
    assert len(list(folder.iterdir())) == 1
    assert again[0] == first[0] and again[1] < first[1] / 4
    wrong = run("caption", photo, "-m", tiny, "--feature-cache", photo)
    assert wrong.returncode == 2 and "cannot be used as a directory" in one_line(wrong)
    assert answer("--feature-cache", "")[0] == first[0], "an empty name is none"


def test_the_rate_is_of_the_tokens_after_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    timings = Timings(encode=0.5, decode=2.0)
    print_stats(Answer("abc", (1, 2, 3), 40, "stop", timings))
    told = capsys.readouterr().err
    assert "decoding at 1.0 tokens/s" in told and "first token after 500 ms" in told
    print_stats(Answer("a", (1,), 40, "stop", Timings(encode=0.5)))
    assert "decoding at -" in capsys.readouterr().err


def test_ask_about_two_pictures(tiny: Path, photo: Path) -> None:
    result = run("ask", photo, photo, "Same?", "-m", tiny, "--max-tokens", "2", "--json")
    record = json.loads(result.stdout)
    assert record["image"] == [str(photo), str(photo)]
    assert record["prompt_tokens"] > 32


def test_sizes_and_tiles(tiny: Path, photo: Path) -> None:
    def prompt_tokens(*options: str) -> int:
        result = run("caption", photo, "-m", tiny, "--max-tokens", "1", "--json", *options)
        return int(json.loads(result.stdout)["prompt_tokens"])

    text = prompt_tokens("--image-size", "64") - 1
    assert prompt_tokens("--image-size", "auto") == text + 16
    assert prompt_tokens("--image-size", "128", "--tiles", "1x2") == text + 3 * 4


def test_answers_in_json(tiny: Path, photo: Path, tmp_path: Path) -> None:
    schema = tmp_path / "s.json"
    schema.write_text(
        '{"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], '
        '"additionalProperties": false}'
    )
    ask = ("ask", photo, "How many?", "-m", tiny, "--schema", schema)
    whole = run(*ask)
    assert whole.returncode == 0
    assert json.loads(whole.stdout)["n"] in (1, 22)
    cut = run(*ask, "--max-tokens", "3")
    assert (cut.returncode, cut.stdout) == (1, b"")
    assert "3 tokens were not enough for the whole JSON" in one_line(cut)
    told = run(*ask, "--max-tokens", "3", "--json")
    assert told.returncode == 1
    assert json.loads(told.stdout)["finish_reason"] == "length"
    schema.write_text('{"type": "objec"}')
    wrong = run(*ask)
    assert wrong.returncode == 2 and "Invalid type: objec" in one_line(wrong)
    schema.write_text("{")
    wrong = run(*ask)
    assert wrong.returncode == 2 and "is not JSON" in one_line(wrong)


def test_choices(tiny: Path, photo: Path) -> None:
    ask = ("ask", photo, "Red or blue?", "-m", tiny, "--choices", "red, blue,green")
    record = json.loads(run(*ask, "--json").stdout)
    assert set(record) == {"image", "choice", "probabilities"}
    probabilities = record["probabilities"]
    assert list(probabilities) == ["red", "blue", "green"]
    assert sum(probabilities.values()) == pytest.approx(1)
    assert run(*ask).stdout.decode() == max(probabilities, key=probabilities.get) + "\n"


def test_a_broken_picture_does_not_stop_the_others(tiny: Path, photo: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a picture")
    result = run("caption", broken, photo, "-m", tiny, "--max-tokens", "2", "--json")
    assert result.returncode == 1
    assert "broken.jpg" in one_line(result)
    failed, captioned = map(json.loads, result.stdout.splitlines())
    assert failed["image"] == str(broken) and "text" not in failed
    assert "not an image" in failed["error"] and "error" not in captioned
    assert captioned["image"] == str(photo)
    plain = run("caption", broken, photo, "-m", tiny, "--max-tokens", "2")
    assert plain.stdout.count(b"\n") == 1, "a failure is no answer"


@pytest.mark.parametrize(
    ("args", "code", "named"),
    [
        (["caption", "PHOTO", "-m", "TINY", "--temperature", "-1"], 2, "temperature is -1.0"),
        (["caption", "PHOTO", "-m", "TINY", "--top-p", "0"], 2, "top_p"),
        (["caption", "PHOTO", "-m", "TINY", "--image-size", "100"], 2, "multiple of 64"),
        (["caption", "PHOTO", "-m", "TINY", "--image-size", "large"], 2, "image_size is 'large'"),
        (["caption", "PHOTO", "-m", "TINY", "--tiles", "2"], 2, "tiles is '2'"),
        (["caption", "PHOTO", "-m", "TINY", "--tiles", "2x-1"], 2, "tiles is '2x-1'"),
        (["caption", "PHOTO", "-m", "TINY", "--fit", "squash"], 2, "fit is 'squash'"),
        (["caption", "PHOTO", "-m", "/no/such/model"], 1, "No checkpoint at"),
        (["caption", "PHOTO", "-m", "no/such-model"], 1, "--model nano"),
        (["caption", "missing.jpg", "-m", "TINY"], 1, "missing.jpg"),
        (["caption", "http://127.0.0.1:9/a.jpg", "-m", "TINY"], 1, "127.0.0.1"),
        (["ask", "PHOTO", "<image> or <image>?", "-m", "TINY"], 1, "2 <image> but 1 picture"),
        (["ask", "What?", "-m", "TINY"], 2, "at least one picture"),
        (["ask", "PHOTO", "?", "-m", "TINY", "--choices", "yes"], 2, "at least two"),
        (["ask", "PHOTO", "?", "-m", "TINY", "--choices", "yes,"], 2, "Choice 2 is empty"),
        (
            ["ask", "PHOTO", "?", "-m", "TINY", "--choices", "a,b", "--top-k", "3"],
            2,
            "--top-k does",
        ),
        (["ask", "PHOTO", "?", "-m", "TINY", "--choices", "a,b", "--stats"], 2, "--stats does"),
        (["ask", "PHOTO", "PHOTO", "-m", "TINY"], 2, "behind the pictures"),
        (["ask", "PHOTO", "https://host/b.jpg", "-m", "TINY"], 2, "behind the pictures"),
        (["ask", "PHOTO", "", "-m", "/never/looked/for"], 1, "The question is ''"),
        (["ask", "PHOTO", "<image> <image>?", "-m", "/never/looked/for"], 1, "has 2 <image>"),
        (["info", ""], 1, "No checkpoint at ''"),
        (["ask", "PHOTO", "?", "-m", "TINY", "--schema", "/no/s.json"], 2, "cannot be read"),
        (["info", "/no/such/model"], 1, "No checkpoint at"),
    ],
)
def test_mistakes(args: list[str], code: int, named: str, tiny: Path, photo: Path) -> None:
    places = {"PHOTO": str(photo), "TINY": str(tiny)}
    result = run(*(places.get(a, a) for a in args))
    assert named in one_line(result)
    assert result.returncode == code
    assert result.stdout == b""


def test_unknown_commands_and_options_are_bad_usage() -> None:
    assert run("capton").returncode == 2
    assert run("caption").returncode == 2
    assert run("caption", "a.jpg", "--tokens", "3").returncode == 2


def test_info_reads_headers_only(tiny: Path) -> None:
    facts = json.loads(run("info", tiny, "--json").stdout)
    assert facts["dialect"] == "Apple LLaVA"
    assert facts["image size"].endswith("= 16 tokens")
    assert b"Apple LLaVA" in run("info", tiny).stdout


def test_doctor_says_what_is_slow() -> None:
    result = run("doctor", "--json")
    facts = json.loads(result.stdout)
    assert result.returncode == 0
    assert "GFLOP/s" in facts["matrix product"]
    assert "Hub" in facts


@pytest.mark.parametrize("words", ["caption PHOTO -m nano", "doctor", "bench count --size 64",
                                   "convert nano OUT"])  # fmt: skip
@pytest.mark.parametrize(
    "broken",
    [
        # What MLX says in a virtual machine without a GPU.
        "import mlx.core as mx\ndef no(): raise RuntimeError('[metal::Device] No device.\\nMore')\n"
        "mx.device_info = no",
        "import sys; sys.modules['mlx.core'] = None",
    ],
)
def test_mlx_that_does_not_start_is_one_line(
    photo: Path, tmp_path: Path, broken: str, words: str
) -> None:
    places = {"PHOTO": str(photo), "OUT": str(tmp_path / "out")}
    arguments = [places.get(word, word) for word in words.split()]
    command = [sys.executable, "-c", f"{broken}\nfrom fastvlm_mlx.cli import main; main()"]
    result = subprocess.run([*command, *arguments], capture_output=True, check=False)
    assert (result.returncode, result.stdout) == (1, b"")
    assert "MLX does not start here (" in one_line(result) and "Metal" in one_line(result)


def test_ctrl_c_ends_with_what_was_said(tiny: Path, photo: Path) -> None:
    command = [
        sys.executable, "-u", "-c",
        # A slow decoder, so that there is something to interrupt.
        "import time, fastvlm_mlx.model as m\n"
        "fast = m.Network.decode\n"
        "m.Network.decode = lambda *a: (time.sleep(0.3), fast(*a))[1]\n"
        "from fastvlm_mlx.cli import main; main()",
        "caption", str(photo), "-m", str(tiny), "--max-tokens", "500",
    ]  # fmt: skip
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A job in the background of a script is started with Ctrl-C switched off.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert (first + out).endswith(b"\n")


def test_a_closed_pipe_is_no_crash(tiny: Path, photo: Path) -> None:
    command = (
        f"{sys.executable} -c 'from fastvlm_mlx.cli import main; main()' "
        f"caption '{photo}' '{photo}' -m '{tiny}' --json --max-tokens 2 | head -c 1"
    )
    result = subprocess.run(command, shell=True, capture_output=True, check=True)
    assert b"Traceback" not in result.stderr and b"BrokenPipe" not in result.stderr


def test_a_person_is_told_what_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_PATIENCE", 0.1)
    with waiting("Looking"):
        time.sleep(0.2)
    assert capsys.readouterr() == ("", ""), "nobody is looking"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(output, "_PATIENCE", 60)
    with waiting("Looking"):
        pass
    assert "Looking" not in capsys.readouterr().err
    monkeypatch.setattr(output, "_PATIENCE", 0.1)
    with pytest.raises(KeyboardInterrupt), waiting("Looking"):
        time.sleep(0.5)
        raise KeyboardInterrupt
    told = capsys.readouterr()
    assert "Looking" in told.err and told.out == ""
