"""Pushing to a hub that is a small HTTP server here: what is asked of it, and what a person reads when it refuses."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from command import Result, diffalign, installed
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import tiny_unet

from diffalign.families import save_lora
from diffalign.families.targets import lora_targets

TOKEN = "hf_" + "x" * 34


class Hub(ThreadingHTTPServer):
    """The endpoints that create_repo and upload_folder ask; ``refuse`` is the status of every answer, if not 0."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuse = 0
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.tokens: set[str | None] = set()
        self.files: dict[str, bytes] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        return

    def answer(self, data: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.asked.append((self.path, {}))
        self.answer({"error": "nothing here"}, 404)

    def do_POST(self) -> None:
        hub = self.server
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        hub.tokens.add(self.headers["Authorization"])
        url = f"http://127.0.0.1:{hub.server_port}/me/cats"
        if hub.refuse:
            hub.asked.append((self.path, {}))
            return self.answer({"error": "no"}, hub.refuse)
        if self.path.endswith("/commit/main"):
            lines = [json.loads(line) for line in body.decode().splitlines()]
            for line in lines[1:]:
                assert line["key"] == "file"
                hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            hub.asked.append((self.path, lines[0]["value"]))
            return self.answer({"commitUrl": f"{url}/commit/abc", "commitOid": "a" * 40, "pullRequestUrl": None})
        asked = json.loads(body or b"{}")
        hub.asked.append((self.path, asked))
        if self.path.endswith("/preupload/main"):
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked["files"]]
            return self.answer({"files": modes})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        assert self.path == "/api/repos/create", self.path
        return self.answer({"url": url, "name": "me/cats", "id": "1"})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    unet = tiny_unet()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=lora_targets(unet, "attention"))
    unet.add_adapter(config)
    folder = tmp_path_factory.mktemp("lora")
    save_lora(get_peft_model_state_dict(unet), config, folder)
    return folder


def words(lora: Path, base: Path, out: Path, repo: str = "me/cats") -> list[object]:
    return ["export", lora, "--base", base, "--format", "kohya", "--out", out, "--push-to-hub", repo, "--private"]


def push(lora: Path, base: Path, out: Path, endpoint: str, token: str | None = TOKEN, repo: str = "me/cats") -> Result:
    """In a process that has the hub's client loaded: it reads its settings once, at its import."""
    code = f"from huggingface_hub import constants as c; c.HF_HUB_OFFLINE, c.ENDPOINT = False, {endpoint!r}"
    code += "; c.HF_TOKEN_PATH = '/nowhere'"
    env = {"HF_TOKEN": token or "", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return diffalign(*words(lora, base, out, repo), code=code, **env)


def test_the_folder_arrives_as_one_private_commit(
    hub: Hub, lora: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cats"
    env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": TOKEN}
    env |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = installed(*words(lora, tiny_model_folder, out), **env)
    assert done.status == 0, done.err
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in done.out + done.err
    assert done.out.splitlines()[-1].endswith("/me/cats")
    made = dict(hub.asked)["/api/repos/create"]
    assert made["name"] == "cats" and made["organization"] == "me"
    assert made.get("private") is True or made.get("visibility") == "private"
    assert dict(hub.asked)["/api/models/me/cats/commit/main"]["summary"] == "Upload by diffalign export"
    assert hub.files == {p.name: p.read_bytes() for p in out.iterdir()}
    card = hub.files["README.md"].decode()
    assert 'load_lora_weights("me/cats"' in card and "PATH/OF/THIS/FOLDER" not in card
    assert str(tiny_model_folder.parent) not in card and "base_model:" not in card


def test_a_hub_that_refuses_or_is_not_there(hub: Hub, lora: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    """Exit 1: the export stays, and the line says how to go on. What is known before any work is exit 2."""
    address = f"http://127.0.0.1:{hub.server_port}"
    for status, said in ((401, "token is not valid"), (403, "write access to 'me'")):
        hub.refuse = status
        done = push(lora, tiny_model_folder, tmp_path / str(status), address)
        assert done.status == 1 and said in done.line and f"hf upload me/cats {tmp_path / str(status)}" in done.line
        assert (tmp_path / str(status) / "README.md").is_file() and TOKEN not in done.err
    done = push(lora, tiny_model_folder, tmp_path / "away", "http://127.0.0.1:9")
    assert done.status == 1 and "not pushed" in done.line and (tmp_path / "away").is_dir()
    done = push(lora, tiny_model_folder, tmp_path / "none", address, token=None)
    assert done.status == 2 and "hf auth login" in done.line and not (tmp_path / "none").exists()
    done = push(lora, tiny_model_folder, tmp_path / "none", address, repo="cats")
    assert done.status == 2 and "USER/cats" in done.line and not (tmp_path / "none").exists()
