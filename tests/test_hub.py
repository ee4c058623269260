"""Models fetched from a Hub: a small stand-in for it answers the real client over HTTP."""

import hashlib
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import mlx.core as mx
import numpy as np
import PIL.Image
import pytest

from fastvlm_mlx.checkpoint.hub import _wanted
from tests.test_cli import one_line, run
from tests.test_torch_file import Storage, save, tensor

REPOSITORY, COMMIT = "someone/a-fastvlm", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One repository, over the few requests that the client makes; `asked` lists them."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files, self.asked = files, list[str]()
        self.broken: set[str] = set()
        self.sent: dict[str, int] = dict.fromkeys(files, 0)

    def environment(self, home: Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "no_proxy": "127.0.0.1",
        }


def entry(name: str, body: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        name = path.rpartition("/")[2]
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            tree = [entry(n, b) for n, b in self.server.files.items()]
            self._send(json.dumps(tree).encode())
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": n, "size": len(b)} for n, b in self.server.files.items()]
            card = {"license": "other", "license_name": "a-licence"}
            self._send(
                json.dumps(
                    {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "cardData": card}
                ).encode()
            )
        elif path.startswith(f"/{REPOSITORY}/resolve/") and name in self.server.files:
            if name in self.server.broken:
                self.send_error(403)
            else:
                self._send(self.server.files[name])
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        """What is known of the paths that are named."""
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.server.asked.append(f"POST {self.path}")
        named = {n: b for n, b in self.server.files.items() if n in form.get("paths", [])}
        self._send(json.dumps([entry(n, b) for n, b in named.items()]).encode())

    def _send(self, body: bytes) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span:
            body = body[int(span[1]) : int(span[2]) + 1]
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            name = self.path.partition("?")[0].rpartition("/")[2]
            self.server.sent[name] = self.server.sent.get(name, 0) + len(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    server = Hub({**files, "photo.jpg": b"x" * 1000, "training_args.bin": b"not weights"})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    PIL.Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def caption(hub: Hub, photo: Path, *args: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    environment = hub.environment(photo.parent / "home") | env
    return run("caption", photo, "-m", REPOSITORY, "--max-tokens", "3", *args, env=environment)


def test_a_model_is_fetched_once_and_then_needs_no_network(hub: Hub, photo: Path) -> None:
    first = caption(hub, photo)
    assert first.returncode == 0, first.stderr.decode()
    line = one_line(first)
    assert line.startswith(f"Downloading {REPOSITORY} (") and "licence: a-licence" in line
    fetched = {line.rpartition("/")[2] for line in hub.asked if line.startswith("GET /someone")}
    assert {"config.json", "model.safetensors"} <= fetched
    assert not fetched & {"photo.jpg", "training_args.bin"}

    hub.asked.clear()
    again = caption(hub, photo)
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, b"")
    assert not hub.asked, "the cache is complete"
    offline = caption(hub, photo, HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout


def test_an_interrupted_download_is_completed(hub: Hub, photo: Path) -> None:
    hub.broken = {"tokenizer.json", "vocab.json"} & set(hub.files)
    assert hub.broken
    failed = caption(hub, photo)
    assert failed.returncode == 1 and b"Traceback" not in failed.stderr
    assert f"fastvlm: Cannot get {REPOSITORY} from the Hugging Face Hub" in failed.stderr.decode()
    hub.broken = set()
    assert caption(hub, photo).returncode == 0


def test_pickles_are_fetched_where_there_is_nothing_else(
    hub: Hub, photo: Path, tiny: Path, tmp_path: Path
) -> None:
    weights = mx.load(str(tiny / "model.safetensors"))
    assert isinstance(weights, dict)
    state = {
        name: tensor(Storage("FloatStorage", np.array(a.astype(mx.float32)).ravel()), a.shape)
        for name, a in weights.items()
    }
    hub.files["pytorch_model.bin"] = save(tmp_path / "weights.bin", state).read_bytes()
    del hub.files["model.safetensors"]
    answer = caption(hub, photo, "--dtype", "float32")
    assert answer.returncode == 0, answer.stderr.decode()
    direct = run("caption", photo, "-m", tiny, "--max-tokens", "3", "--dtype", "float32")
    assert answer.stdout == direct.stdout
    assert not any(line.endswith("training_args.bin") for line in hub.asked)
    fresh = hub.environment(tmp_path / "other home")
    told = run("info", REPOSITORY, env=fresh)
    assert told.returncode == 0 and b"Downloading" in told.stderr, "whole, and said so"


def test_info_downloads_no_weights(hub: Hub, photo: Path, tiny: Path) -> None:
    environment = hub.environment(photo.parent / "home")
    local = run("info", tiny)
    remote = run("info", REPOSITORY, env=environment)
    assert remote.returncode == 0, remote.stderr.decode()
    assert remote.stdout == local.stdout and remote.stderr == b""
    size = len(hub.files["model.safetensors"])
    assert 0 < hub.sent["model.safetensors"] < size / 2
    assert caption(hub, photo).returncode == 0, "what is cached so far is not taken for a model"
    hub.asked.clear()
    assert run("info", REPOSITORY, env=environment).stdout == local.stdout
    assert not hub.asked


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin", "optimizer.pt"],
         ["pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin"]),
        (["onnx/model.safetensors", "consolidated.pth"], ["consolidated.pth"]),
    ],
)  # fmt: skip
def test_which_weights_are_wanted(names: list[str], weights: list[str]) -> None:
    others = ["config.json", "merges.txt", "README.md", "modeling_llava.py", "a.png"]
    assert _wanted([*names, *others]) == [*weights, "config.json", "merges.txt", "README.md"]


@pytest.mark.parametrize(
    ("env", "said"),
    [({}, "reachable; cache in"), ({"HF_HUB_OFFLINE": "1"}, "offline (HF_HUB_OFFLINE is set)")],
)
def test_doctor_knows_the_hub(hub: Hub, tmp_path: Path, env: dict[str, str], said: str) -> None:
    result = run("doctor", "--json", env=hub.environment(tmp_path) | env)
    assert said in json.loads(result.stdout)["Hub"]
    gone = run(
        "doctor", "--json", env=hub.environment(tmp_path) | {"HF_ENDPOINT": "http://[::1]:1"}
    )
    assert "cannot be reached (ConnectError)" in json.loads(gone.stdout)["Hub"]
