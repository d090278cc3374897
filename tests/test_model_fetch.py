"""What is fetched of a hub's base, asked of a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import cast

import pytest
import zoo
from tiny import Lab

from finetune.model.folder import SINGLE


class _Hub(ThreadingHTTPServer):
    """A hub of one repository, which is a folder; keeps the paths of the files that it was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        self.asked: set[str] = set()
        self.listed: list[str] = []  # what was asked of the repository itself: revisions and trees


class _Answer(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub: the commit of a revision, its tree, and files."""

    def do_HEAD(self) -> None:
        """As GET, whose body the client does not read."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer."""
        hub, commit, path = cast("_Hub", self.server), "1" * 40, self.path.partition("?")[0]
        headers = {"X-Repo-Commit": commit}
        if path.startswith("/api/models/org/name/revision/"):
            hub.listed.append("revision")
            body = json.dumps({"id": "org/name", "sha": commit, "siblings": []}).encode()
        elif path.startswith("/api/models/org/name/tree/"):
            hub.listed.append("tree")
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _tag(name)}
                for name, file in hub.files.items()
            ]
            body = json.dumps(tree).encode()
        else:
            name = path.removeprefix(f"/org/name/resolve/{commit}/")
            body = hub.files[name].read_bytes()
            headers["ETag"] = f'"{_tag(name)}"'
            hub.asked.add(name)
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is told."""


def _tag(name: str) -> str:
    """What a hub knows a file's content by."""
    return hashlib.sha256(name.encode()).hexdigest()[:40]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[_Hub]:
    """A hub of the base, with what repositories have beside."""
    folder = zoo.folder(tmp_path / "repository")
    for name in ("additional_chat_templates/rag.jinja", "original/config.json", "consolidated.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    with _Hub(folder) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield served
        served.shutdown()


_FETCH = """
import sys
from finetune.model.fetch import fetch
from finetune.model.folder import find
base = fetch(find("org/name"), None, quantization="none")
print(*sorted(str(path.relative_to(base.folder)) for path in base.folder.rglob("*") if path.is_file()))
"""


def fetched(hub: _Hub, home: Path) -> subprocess.CompletedProcess[str]:
    """The base fetched from that hub by a process of its own, since where the hub is is read as it is imported."""
    environ = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run([sys.executable, "-c", _FETCH], env=environ, capture_output=True, text=True, check=False)


def test_of_a_hub_what_transformers_reads_is_fetched_with_its_other_templates(hub: _Hub, tmp_path: Path) -> None:
    done = fetched(hub, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    names = set(done.stdout.split())
    assert names == hub.asked
    assert {"config.json", SINGLE, "additional_chat_templates/rag.jinja"} < names
    assert not {"original/config.json", "consolidated.safetensors"} & names


def test_a_hub_is_asked_once_what_a_repository_holds_and_later_starts_ask_for_its_commit_alone(
    hub: _Hub, tmp_path: Path
) -> None:
    first = fetched(hub, tmp_path / "home")
    assert first.returncode == 0, first.stderr
    assert hub.listed == ["revision", "tree"]
    hub.listed.clear()
    hub.asked.clear()
    assert fetched(hub, tmp_path / "home").stdout == first.stdout
    assert (hub.listed, hub.asked) == (["revision"], set())


def test_a_base_of_a_hub_is_trained_as_its_family_says(lab: Lab) -> None:
    place = Path(os.environ["HF_HOME"]) / "hub" / "models--org--a-llama"  # as it was downloaded earlier
    shutil.copytree(lab / "llama3", place / "snapshots" / ("1" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("1" * 40)
    changes = {"training.max_steps": 2, "adapter.lora_dropout": 0.0}
    hub = lab.train({**changes, "model.name_or_path": "org/a-llama"}).ok()
    folder = lab.train({**changes, "model.name_or_path": "llama3", "output_dir": "local"}).ok()
    assert "no family file" not in hub.stderr
    trains = [[line for line in told.stderr.splitlines() if line.startswith("trains")] for told in (hub, folder)]
    assert trains[0] == trains[1]
    assert lab.adapter() == lab.adapter("local")


def test_a_base_in_a_format_that_is_refused_is_refused_before_its_weights_are_fetched(
    hub: _Hub, tmp_path: Path
) -> None:
    config = json.loads(hub.files["config.json"].read_text())
    quantised = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    hub.files["config.json"].write_text(json.dumps(quantised))
    done = fetched(hub, tmp_path / "home")
    assert "the weights of org/name are stored in GPTQ" in done.stderr
    assert hub.asked == {"config.json"}
