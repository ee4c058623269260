"""`fastvlm bench` as it is typed: output, records, exit codes, mistakes."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fastvlm_mlx.benchmarks.record import Record, Skipped, read_record, write_record
from fastvlm_mlx.benchmarks.session import Keeper
from tests.test_bench_compare import run as noisy_run

MAIN = "from fastvlm_mlx.cli import main; main()"


def bench(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", MAIN, "bench", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("bench") / "all.json"
    done = bench("all", "--random", "nano", "--quick", "--sizes", "64,128", "--repeat", "1",
                 "--json", path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"The record is in {path}.\n"
    return done.stdout, path


def test_all_measures_everything(everything: tuple[str, Path]) -> None:
    table, path = everything
    record = read_record(path)
    assert record.finished and not record.skipped
    assert [(m.kind, m.image_size) for m in record.measurements] == [
        ("encoder", 64), ("ttft", 64), ("encoder", 128), ("ttft", 128), ("decode", None),
        ("memory", 64), ("memory", 128), ("cold_start", 256),
    ]  # fmt: skip
    assert record.subject.model == "nano" and record.subject.operations
    encoder = record.measurements[0]
    assert encoder.launches and encoder.moved and encoder.peak_memory
    cold = record.measurements[-1].seconds
    assert cold["first_text"][0] <= cold["exit"][0]
    assert record.command[:4] == ("bench", "all", "--random", "nano")
    assert "/" not in record.command[-1]
    for text in ("TTFT, felt", "TTFT, paper's", "tokens/s", "cold start", "load image", "GiB"):
        assert text in table
    assert "\x1b" not in table and max(map(len, table.splitlines())) <= 110


def test_compare_with_itself_and_with_a_planted_slow_down(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write_record(noisy_run(0), a)
    write_record(noisy_run(1, 1.1), b)
    same = bench("compare", a, a)
    assert same.returncode == 0 and same.stdout.endswith("No difference.\n")
    slower = bench("compare", a, b).stdout
    assert "slower, p" in slower and "No difference." not in slower


@pytest.mark.parametrize(
    ("args", "code", "named"),
    [
        (["ttft", "--sizes", "100"], 2, "multiple of 64"),
        (["ttft", "--sizes", "256;512"], 2, "expected numbers"),
        (["ttft", "--random", "9b"], 2, "0.5b, 1.5b, 7b, nano"),
        (["encoder", "--bits", "7"], 2, "--bits"),
        (["all", "--model", "x", "--random", "nano"], 2, "choose one"),
        (["ttft", "--model", "/no/such"], 1, "No checkpoint"),
        (["encoder", "--random", "nano", "--json", "/proc/no/a.json"], 1, "Cannot write"),
        (["encoder", "--random", "nano", "--json", "BAD"], 1, "is not replaced"),
        (["roofline", "--random", "nano", "--size", "100"], 2, "size is 100"),
        (["count", "--size", "100"], 2, "size is 100"),
        (["compare", "missing.json", "missing.json"], 1, "Cannot read missing.json"),
        (["compare", "a.json", "b.json", "c.json"], 2, "expected pairs"),
        (["compare", "BAD", "BAD"], 1, "is not JSON"),
        (["compare", "OLD", "OLD"], 1, "version 0"),
    ],
)
def test_mistakes_are_one_line(args: list[str], code: int, named: str, tmp_path: Path) -> None:
    bad, old = tmp_path / "bad.json", tmp_path / "old.json"
    bad.write_text("{")
    old.write_text(json.dumps({"schema": "fastvlm-mlx benchmark", "version": 0}))
    done = bench(*({"BAD": str(bad), "OLD": str(old)}.get(a, a) for a in args))
    assert named in done.stderr
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert bad.read_text() == "{"


def test_an_earlier_record_stays_until_there_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    earlier, empty = noisy_run(0), replace(noisy_run(1), measurements=(), skipped=())
    write_record(earlier, path)
    with Keeper(empty, path):
        pass
    assert read_record(path) == earlier
    with Keeper(empty, path) as keeper:
        keeper.add(Skipped("decode", None, "no time"))
    assert read_record(path).skipped[0].reason == "no time" and read_record(path).finished
    with Keeper(empty, path) as keeper:
        keeper.add(Skipped("decode", None, "failed: out of memory"))
    assert not read_record(path).finished


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    slow = (
        "import time, fastvlm_mlx.benchmarks.running as r\n"
        "r.measure_decode = lambda *a: time.sleep(60)\n" + MAIN
    )
    command = [sys.executable, "-u", "-c", slow, "bench", "all", "--random", "nano", "--quick",
               "--sizes", "64", "--repeat", "1", "--json", str(path)]  # fmt: skip
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        # A job in the background of a script is started with Ctrl-C switched off.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if "prefill of image tokens" in line:  # the last line of ttft
                    break
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors and "incomplete" in errors
    record: Record = read_record(path)
    assert not record.finished
    assert [m.kind for m in record.measurements] == ["encoder", "ttft"]
