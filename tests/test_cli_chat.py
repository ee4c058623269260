"""`fastvlm chat`: through a pipe, and in a terminal of its own."""

import contextlib
import errno
import fcntl
import json
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import fastvlm_mlx as fv
from tests.test_cli import one_line, run

COMMAND = [sys.executable, "-c", "from fastvlm_mlx.cli import main; main()", "chat"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory, picture: np.ndarray) -> Path:
    # As macOS names a screenshot: a narrow no-break space before AM and PM.
    file = tmp_path_factory.mktemp("photos") / "写真 1\u202fPM.png"
    PIL.Image.fromarray(picture).save(file)
    return file


def _chat(*args: str | Path, lines: str | bytes) -> subprocess.CompletedProcess[bytes]:
    given = lines.encode() if isinstance(lines, str) else lines
    return run("chat", *args, "--max-tokens", "4", stdin=given)


def test_piped_questions_are_answered_line_by_line(
    tiny: Path, photo: Path, picture: np.ndarray
) -> None:
    result = _chat(photo, "-m", tiny, lines="What is this?\n\n¿Y qué más? 図は？\r\nWhy?")
    assert (result.returncode, result.stderr) == (0, b"")
    chat = fv.load(tiny).chat(picture)
    questions = ("What is this?", "¿Y qué más? 図は？", "Why?")
    answers = [chat.ask(q, max_tokens=4) for q in questions]
    said = result.stdout.decode()
    assert [line.strip() for line in said.split("\n")[:-1]] == [a.text for a in answers]
    assert "\x1b" not in said and "> " not in said


def test_mistakes_are_one_line_each_and_the_conversation_goes_on(
    tiny: Path, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "not a picture.txt").write_text("no")
    lines = [
        "What?",
        "/image /no/such/file.png",
        f"/image {tmp_path}/not a picture.txt",
        "/image",
        "/colour",
        "Where is <image>?",
        f"/save {photo}",
        "And now?",
    ]
    result = _chat(photo, "-m", tiny, lines="\n".join(lines))
    assert result.returncode == 1
    errors = result.stderr.decode().splitlines()
    told = ("/no/such", "not a picture.txt", "/image PATH", "/help", "<image>", "not replaced")
    assert len(errors) == len(told)
    for error, part in zip(errors, told, strict=True):
        assert error.startswith("fastvlm: ") and part in error
    clean = _chat(photo, "-m", tiny, lines="What?\nAnd now?")
    assert result.stdout == clean.stdout
    assert fv.load(tiny).ask(str(photo), "What?", max_tokens=1).tokens, "the picture is whole"


def test_json_that_is_cut_is_not_printed(tiny: Path, photo: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"const": "a text that takes more than four tokens"}')
    result = _chat(photo, "-m", tiny, "--schema", schema, lines="What?\nAnd?")
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.count(b"not enough for the whole JSON") == 2


def test_bytes_that_are_no_text_are_one_mistake(tiny: Path, photo: Path) -> None:
    result = _chat(photo, "-m", tiny, lines=b"caf\xe9?\nWhat?\n")
    assert result.returncode == 1 and "no character" in one_line(result)
    assert result.stdout == _chat(photo, "-m", tiny, lines="What?").stdout


def test_a_terminal_without_the_letters_gets_question_marks(tiny: Path, photo: Path) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    args = ("chat", photo, "-m", tiny, "--max-tokens", "30")
    plain, limited = (run(*args, stdin=b"What?\n", env=env) for env in (None, ascii_only))
    answer = plain.stdout.decode()
    assert not answer.isascii()
    assert (limited.returncode, limited.stderr) == (0, b"")
    assert limited.stdout == answer.encode("ascii", "replace")


def test_pictures_come_in_between_by_paths_as_terminals_paste_them(
    tiny: Path, photo: Path, picture: np.ndarray
) -> None:
    escaped = str(photo).replace(" ", "\\ ")
    lines = f"What?\n/image {escaped}\nAnd?\n/image '{photo}'\n/image {photo}\nCompare.\n/stats"
    result = _chat("-m", tiny, lines=lines)
    assert result.returncode == 0
    chat = fv.load(tiny).chat()
    answers = [chat.ask("What?", max_tokens=4)]
    chat.add(picture)
    answers.append(chat.ask("And?", max_tokens=4))
    chat.add(picture, picture)
    answers.append(chat.ask("Compare.", max_tokens=4))
    assert result.stdout.decode().split("\n")[:-1] == [a.text for a in answers]
    assert f"turns: 3, pictures: 3, positions: {chat.positions} of" in result.stderr.decode()


def test_saved_conversations_go_on(tiny: Path, photo: Path, tmp_path: Path) -> None:
    whole = _chat(photo, "-m", tiny, lines="One?\nTwo?\nThree?")
    file = tmp_path / "saved chat"
    first = _chat(photo, "-m", tiny, lines=f"One?\nTwo?\n/save {file}")
    second = _chat("--load", file, "-m", tiny, lines="Three?")
    assert first.stdout + second.stdout == whole.stdout
    kept, again = tmp_path / "sliding", tmp_path / "again"
    _chat(photo, "-m", tiny, "--sliding", lines=f"One?\n/save {kept}")
    _chat("--load", kept, "-m", tiny, lines=f"Two?\n/save {again}")
    assert fv.load_chat(again, fv.load(tiny)).sliding, "a saved conversation goes on sliding"
    other = _chat("--load", file, "-m", tiny, "--quantize", "4", lines="Three?")
    assert other.returncode == 1 and "another model" in one_line(other)
    missing = _chat("--load", tmp_path / "missing", "-m", tiny, lines="Three?")
    assert missing.returncode == 1 and "There is no file" in one_line(missing)


def test_clear_forgets_what_was_said_but_not_the_pictures(tiny: Path, photo: Path) -> None:
    result = _chat(photo, "-m", tiny, lines="One?\n/clear\nTwo?\n/stats\n/quit\nNever asked?")
    direct = fv.load(tiny).ask(str(photo), "Two?", max_tokens=4)
    assert result.stdout.decode().split("\n")[1:-1] == [direct.text]
    assert "turns: 1, pictures: 1" in result.stderr.decode()


def test_a_full_window_is_told_and_sliding_makes_room(
    tiny: Path, photo: Path, tmp_path: Path
) -> None:
    narrow = shutil.copytree(tiny, tmp_path / "narrow")
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**config, "tokenizer_model_max_length": 300}))
    question = "What is this? " * 7
    lines = f"{question}\n{question}\n{question}\nShort?\n"
    full = _chat(photo, "-m", narrow, lines=lines)
    assert full.returncode == 1
    assert "context window" in full.stderr.decode() and "--sliding" in full.stderr.decode()
    assert "Traceback" not in full.stderr.decode()
    slid = _chat(photo, "-m", narrow, "--sliding", lines=lines)
    assert slid.returncode == 0
    assert "(forgotten, to make room: What is this?" in slid.stderr.decode()
    assert slid.stdout.count(b"\n") == 4


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["/no/such.jpg"], 1, "/no/such.jpg"),
        (["-"], 2, "stdin is where the questions come from"),
        (["--temperature", "-1"], 2, "temperature"),
    ],
)
def test_wrong_arguments(tiny: Path, args: list[str], code: int, message: str) -> None:
    result = run("chat", "-m", tiny, *args, stdin=b"What?\n")
    assert result.returncode == code and message in one_line(result)
    assert result.stdout == b""


# --------------------------------------------------------------------------------------- terminal


class Terminal:
    """A `fastvlm chat` that believes to be talking to a person."""

    def __init__(self, *args: str | Path, stdout: Path | None = None) -> None:
        self.screen = ""
        self._fd, child = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8"}

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            # Background shells start their children with SIGINT ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)

        with stdout.open("wb") if stdout else contextlib.nullcontext(child) as out:
            self.process = subprocess.Popen(
                [*COMMAND, *map(str, args)],
                stdin=child,
                stdout=out,
                stderr=child,
                env=environment,
                preexec_fn=own_terminal,
            )
        os.close(child)

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, done: Callable[[str], bool], seconds: float = 120) -> str:
        """What appears from here on, until it is as expected."""
        begin, limit = len(self.screen), time.monotonic() + seconds
        while not done(self.screen[begin:]):
            ready, _, _ = select.select([self._fd], [], [], max(0, limit - time.monotonic()))
            assert ready, f"nothing more came after {self.screen!r}"
            try:
                data = os.read(self._fd, 4096)
            except OSError as error:  # Linux reports the end of a terminal so
                assert error.errno == errno.EIO
                data = b""
            assert data or done(self.screen[begin:]), f"it ended after {self.screen!r}"
            self.screen += data.decode(errors="replace")
        return self.screen[begin:]

    def prompt(self) -> str:
        return self.until(lambda text: text.replace("\x1b[?2004h", "").endswith("> "))

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def close(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            os.close(self._fd)


@pytest.fixture
def terminal(tiny: Path, photo: Path) -> Iterator[Terminal]:
    talk = Terminal(photo, "-m", tiny, "--max-tokens", "100000")
    yield talk
    talk.process.kill()
    talk.process.wait()


def test_ctrl_c_breaks_off_an_answer_and_ctrl_d_leaves(terminal: Terminal) -> None:
    assert "/help" in terminal.prompt()
    terminal.send("What is this?\n")
    terminal.until(lambda text: len(text.partition("this?")[2].strip()) > 3)
    terminal.send("\x03")
    assert "(interrupted)" in terminal.prompt()
    terminal.send("/stats\n")
    assert "turns: 1, pictures: 1" in terminal.prompt()
    terminal.resize(24, 40)
    terminal.send("\x1b[A\n")  # the line before, from the history
    # The resize may have drawn the prompt once more.
    terminal.until(lambda text: "turns: 1, pictures: 1" in text and text.endswith("> "))
    terminal.send("/save /no/such/folder/x\n")
    assert "No such file or directory" in terminal.prompt()
    terminal.send("\x04")
    assert terminal.close() == 0
    assert "Traceback" not in terminal.screen


def test_ctrl_c_at_the_prompt_leaves(terminal: Terminal) -> None:
    terminal.prompt()
    terminal.send("half a ques")
    terminal.until(lambda text: text.endswith("half a ques"))
    # Python's input() misses a signal that arrives while readline still takes in a key.
    time.sleep(0.3)
    terminal.send("\x03")
    assert terminal.close() == 0
    assert "Traceback" not in terminal.screen


def test_answers_into_a_file_leave_the_prompt_in_the_terminal(
    tiny: Path, photo: Path, tmp_path: Path
) -> None:
    talk = Terminal(photo, "-m", tiny, "--max-tokens", "4", stdout=tmp_path / "answers")
    talk.prompt()
    talk.send("What?\n")
    talk.prompt()
    talk.send("/quit\n")
    assert talk.close() == 0
    direct = fv.load(tiny).ask(str(photo), "What?", max_tokens=4)
    assert (tmp_path / "answers").read_text() == direct.text + "\n"
