"""A stand-in for the Hugging Face Hub on 127.0.0.1: the endpoints that `snapshot_download` asks, and no more.

The API is that of https://huggingface.co/docs/hub/api and huggingface_hub's `hf_api.py`; large files are redirected to
another host, which must not be given the token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good"


@dataclass
class Repository:
    """Folders by commit, and commits by branch. Of a gated one, files are given to `TOKEN` alone."""

    commits: dict[str, Path]
    branches: dict[str, str]
    is_gated: bool = False


@dataclass
class Hub:
    """What the server serves and what it was asked: (method, path, the authorization given)."""

    repositories: dict[str, Repository]
    status: int | None = None
    """What every request is answered, where it is not `None`."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    endpoint: str = ""

    def fetched(self) -> set[str]:
        """Return the names of the files that were downloaded."""
        return {path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/api/" not in path}


def commit_of(name: str) -> str:
    """Return a commit hash."""
    return hashlib.sha1(name.encode()).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve until the end of the block."""

    class Handler(_Handler):
        its_hub = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    its_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.its_hub.requests.append((self.command, path, self.headers.get("authorization")))
        match path.strip("/").split("/"):
            case _ if self.its_hub.status is not None:
                self.refuse(self.its_hub.status, "ServerError")
            case ["cdn", digest, name]:
                self.send_file(self.file_of(digest, name), {})
            case ["api", "models", owner, name, "revision", *revision]:
                self.send_info(f"{owner}/{name}", "/".join(revision))
            case ["api", "models", owner, name, "tree", *revision]:
                self.send_tree(f"{owner}/{name}", "/".join(revision))
            case [owner, name, "resolve", revision, *file]:
                self.resolve(f"{owner}/{name}", revision, "/".join(file))
            case _:
                self.refuse(404, "RepoNotFound")

    def commit(self, repo_id: str, revision: str) -> str | None:
        """Return the commit asked for; `None` when there is none, which is answered."""
        repository = self.its_hub.repositories.get(repo_id)
        if repository is None:
            self.refuse(401 if self.headers.get("authorization") is None else 404, "RepoNotFound")
            return None
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self.refuse(404, "RevisionNotFound")
            return None
        return commit

    def send_info(self, repo_id: str, revision: str) -> None:
        commit = self.commit(repo_id, revision)
        if commit is not None:
            self.send_json({"id": repo_id, "modelId": repo_id, "sha": commit, "private": False, "tags": []})

    def send_tree(self, repo_id: str, revision: str) -> None:
        commit = self.commit(repo_id, revision)
        if commit is None:
            return
        folder = self.its_hub.repositories[repo_id].commits[commit]
        rows: list[dict[str, object]] = []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            data = file.read_bytes()
            row = {"type": "file", "path": str(file.relative_to(folder)), "size": len(data), "oid": _digest(data)[:40]}
            lfs = {"oid": _digest(data), "size": len(data), "pointerSize": 130}
            rows.append({**row, "lfs": lfs} if _is_large(file) else row)
        self.send_json(rows)

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        commit = self.commit(repo_id, revision)
        if commit is None:
            return
        repository = self.its_hub.repositories[repo_id]
        authorization = self.headers.get("authorization")
        if repository.is_gated and authorization != f"Bearer {TOKEN}":
            self.refuse(401 if authorization is None else 403, "GatedRepo")
            return
        file = repository.commits[commit] / name
        if not file.is_file():
            self.refuse(404, "EntryNotFound")
            return
        digest = _digest(file.read_bytes())
        if not _is_large(file):
            self.send_file(file, {"ETag": f'"{digest[:40]}"', "X-Repo-Commit": commit})
            return
        port = urlsplit(self.its_hub.endpoint).port
        headers = {
            "Location": f"http://localhost:{port}/cdn/{digest}/{file.name}",
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(file.stat().st_size),
        }
        self.send(302, b"", headers)

    def file_of(self, digest: str, name: str) -> Path:
        folders = [
            folder for repository in self.its_hub.repositories.values() for folder in repository.commits.values()
        ]
        return next(f / name for f in folders if (f / name).is_file() and _digest((f / name).read_bytes()) == digest)

    def send_file(self, file: Path, headers: dict[str, str]) -> None:
        self.send(200, file.read_bytes(), headers)

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_large(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin")
