"""`fastvlm convert` as a person meets it: one line per error, exit codes, and runs that die."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import fastvlm_mlx as fv
from fastvlm_mlx.checkpoint.loading import examine_checkpoint
from fastvlm_mlx.convert import conversion, upload
from fastvlm_mlx.convert.calibration import draw_picture, samples
from fastvlm_mlx.convert.conversion import Options, convert_checkpoint
from fastvlm_mlx.convert.layered import observe_by_layer
from fastvlm_mlx.convert.verification import (
    Observed,
    Thresholds,
    kl_divergence,
    memory_shortage,
    verify,
)

KILLS = int(os.environ.get("FASTVLM_KILLS", "3"))


def _run(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from fastvlm_mlx.cli import main; main()", "convert", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def test_converting_from_the_command_line(tiny: Path, tmp_path: Path) -> None:
    done = _run(str(tiny), str(tmp_path / "out"), "--bits", "4", "--no-verify")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr
    first, second = done.stderr.splitlines()
    assert "4.50 bits per weight, recipe uniform 4-bit" in first and "peak memory" in first
    assert first.endswith("licence: not stated by the source")
    assert second == "not verified: switched off"
    again = _run(str(tiny), str(tmp_path / "out"), "--bits", "4")
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1 and "already exists" in again.stderr
    wrong = _run(str(tiny), str(tmp_path / "x"), "--bits", "7")
    assert wrong.returncode == 2
    assert wrong.stderr == "fastvlm: bits is 7; expected one of 2, 3, 4, 5, 6, 8.\n"
    plan = _run(str(tiny), str(tmp_path / "x"), "--bits", "4", "--vision-bits", "8", "--dry-run")
    assert plan.returncode == 0 and plan.stderr == ""
    assert "vision.stages.*.downsample.pointwise" in plan.stdout and "total" in plan.stdout
    assert not (tmp_path / "x").exists()


def test_a_run_that_is_killed_leaves_all_or_nothing(tiny: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny, source)
    before = _hash(source)
    convert_checkpoint(str(source), target, Options(bits=8, verify=False))
    complete = {"old": _weights_hash(target)}
    started = time.monotonic()
    assert _run(str(source), str(target), "--bits", "4", "--no-verify", "--force").returncode == 0
    whole = time.monotonic() - started
    complete["new"] = _weights_hash(target)
    assert complete["old"] != complete["new"]
    rng = random.Random(0)
    command = [sys.executable, "-c", "from fastvlm_mlx.cli import main; main()", "convert"]
    command += [str(source), str(target), "--bits", "4", "--no-verify", "--force"]
    for _ in range(KILLS):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if rng.random() < 0.3:
            time.sleep(whole * rng.uniform(0, 1))
        else:  # start-up is long: more often, kill it while it writes or renames
            while process.poll() is None and not list(tmp_path.glob(".out.*")):
                time.sleep(0.001)
            time.sleep(whole * rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert _weights_hash(target) in complete.values()
        examine_checkpoint(target)
        assert _hash(source) == before
    assert _run(*command[4:]).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def _weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_ctrl_c_cleans_up(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "write_values", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(str(tiny), tmp_path / "out")
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ verification


def test_a_failed_verification(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = Thresholds(features=1e-9, kl=1e-9)
    monkeypatch.setattr(Thresholds, "for_bits", lambda *_: strict)
    options: dict[str, Any] = {"bits": 4, "samples": 1}
    # On a CPU the features differ too: there float32 stands beside the result's float16.
    with pytest.raises(fv.CheckpointError, match=r"mean KL .* more than 1e-09\. Nothing") as info:
        convert_checkpoint(str(tiny), tmp_path / "out", Options(**options))
    assert "--keep-failed" in str(info.value)
    assert not any(tmp_path.iterdir())
    with pytest.raises(fv.CheckpointError, match="was kept in"):
        convert_checkpoint(str(tiny), tmp_path / "out", Options(**options, keep_failed=True))
    report = json.loads((tmp_path / "out/conversion.json").read_text())
    assert not report["verification"]["passed"]
    examine_checkpoint(tmp_path / "out")


def test_what_is_measured() -> None:
    logits = mx.array([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    other = mx.array([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    p = [0.0900306, 0.2447285, 0.6652410]
    expected = p[1] * -1.0 + p[2] * 1.0  # the same normalisation: KL = sum p (x - y)
    assert kl_divergence(logits, other).tolist() == pytest.approx([expected, 0.0], abs=1e-6)

    def observed(scale: float, rows: mx.array) -> Observed:
        maps = {"head": mx.ones((1, 2)) * scale, "image tokens": mx.ones((1, 2))}
        return Observed([maps], [rows], [(1,)])

    limits = Thresholds(0.2, 1.0)
    result = verify(observed(1.0, logits), observed(1.1, other), limits)
    assert result.feature_error["head"] == pytest.approx(0.1)
    # Half of three tokens is one: [1, 2, 0] beside [0, 1, 2], and [0, 0, 3] beside [3, 0, 0].
    first, second = p[0] * -1 + p[1] * -1 + p[2] * 2, (0.9094430 - 0.0452785) * 3
    assert result.kl_unrelated == pytest.approx((first + second) / 2, rel=1e-5)
    assert (result.top1_agreement, result.tokens_until_divergence) == (0.5, [0])
    assert result.passed
    assert not verify(observed(1.0, logits), observed(1.0, other * float("nan")), limits).passed
    failed = verify(observed(1.0, logits), observed(1.5, logits), limits)
    assert failed.failures == ["relative error of the image features is 0.5, more than 0.2"]
    # A quantized model is broken where it is half as far off as unrelated answers are.
    moved = observed(1.0, logits[:, mx.array([1, 2, 0])])
    broken = verify(observed(1.0, logits), moved, Thresholds.for_bits(2, 16))
    assert broken.failures[0].startswith("mean KL divergence is")
    assert broken.thresholds["kl"] == pytest.approx(broken.kl_mean / 2)
    assert failed.tokens_until_divergence == [2]
    # A coarse tower makes for coarse answers, however exact the language model is.
    assert Thresholds.for_bits(16, 2) == Thresholds(0.5, 0.5, relative=True)
    assert Thresholds.for_bits(2, 16) == Thresholds(0.05, 0.5, relative=True)
    assert Thresholds.for_bits(16, 16) == Thresholds(0.05, 0.05)
    assert Thresholds.for_bits(32, 32) == Thresholds(1e-4, 1e-5)


def test_a_model_that_does_not_fit_runs_layer_by_layer(
    vlm: fv.FastVLM, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memory_shortage(vlm.config) is None
    from fastvlm_mlx.convert import verification

    monkeypatch.setattr(verification, "available_memory", lambda: 5e8)
    said: list[str] = []
    done = convert_checkpoint(str(tiny), tmp_path / "out", Options(bits=4), say=said.append)
    found = done.report["verification"]
    reason = "running the model takes about 1 GB of memory, 0 GB are free"
    assert found["by_layer"] == reason and reason in said[0]
    assert found["answer_tokens"] == []
    assert reason in (tmp_path / "out/README.md").read_text()
    assert 0 < found["kl_mean"] < 1 and found["passed"]
    with pytest.raises(fv.CheckpointError, match="has to run the model"):
        convert_checkpoint(str(tiny), tmp_path / "auto", Options(recipe="auto"))


def test_pictures_are_a_function_of_the_seed() -> None:
    assert draw_picture(3).tobytes() == draw_picture(3).tobytes() != draw_picture(4).tobytes()
    four = samples(4)
    assert four[0].picture is four[1].picture is not four[2].picture
    assert len({s.question for s in four}) == 4


# ------------------------------------------------------------------------------------------ upload


def test_uploading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            if repo_id == "me/forbidden":
                raise RuntimeError("403 Forbidden\ndetails")
            calls.append((repo_id, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append((options["repo_id"], options))
            names = [file.name for file in Path(options["folder_path"]).iterdir()]
            sent = filter_repo_objects(names, ignore_patterns=options["ignore_patterns"])
            assert sorted(sent) == ["README.md", "model.safetensors"]

    for name in ("README.md", "model.safetensors", "._model.safetensors", ".DS_Store"):
        (tmp_path / name).touch()
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert upload.upload(tmp_path, "me/model") == "https://huggingface.co/me/model"
    assert [c[0] for c in calls] == ["me/model", "me/model"]
    assert calls[1][1]["folder_path"] == tmp_path
    with pytest.raises(fv.HubError, match=r"\(403 Forbidden\)\. The checkpoint is complete in"):
        upload.upload(tmp_path, "me/forbidden")
    with pytest.raises(fv.OptionError, match="expected a Hub id"):
        upload.check_repository("model")


@pytest.mark.parametrize("bits", [None, 4])
def test_layer_by_layer_is_the_same_model(tiny: Path, tmp_path: Path, bits: int | None) -> None:
    chosen = samples(2)
    options = Options(bits=bits, vision_bits=bits, verify=False)
    convert_checkpoint(str(tiny), tmp_path / "out", options)
    for folder in (tiny, tmp_path / "out"):
        found = observe_by_layer(folder, 256, chosen)
        vlm = fv.load(folder, dtype="float32")
        for n, sample in enumerate(chosen):
            whole = vlm.logits(vlm.prompt_ids(sample.question), [sample.picture])[0]
            tail = found.logits[n].shape[0]
            ids = vlm.prompt_ids(sample.question)
            assert tail == len(ids) - ids.index(fv.IMAGE) - 1, "all that stands behind the picture"
            assert mx.allclose(found.logits[n], whole[-tail:], rtol=1e-3, atol=1e-3)
        tokens = vlm.encode(chosen[0].picture).tokens
        assert mx.allclose(found.maps[0]["image tokens"], tokens, rtol=1e-3, atol=1e-3)
