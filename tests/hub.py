"""A small hub of models and data sets on loopback, as Hugging Face and ModelScope answer."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 1000  # bytes from which a file has a SHA-256, as those in Git LFS have


class Hub(ThreadingHTTPServer):
    """`files` by kind, name and path; after `cut` bytes of one more answer it fails for good."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.cut: int | None = None
        self.is_broken = False
        self.asked: list[tuple[str, str | None]] = []  # path and range of each download

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET(with_body=False)

    def do_GET(self, with_body: bool = True) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        parts = unquote(url.path).strip("/").split("/")
        match parts:
            case ["api", "v1", "models", owner, name, "repo", "files"]:
                self._list("model", f"{owner}/{name}")
            case ["api", "v1", "datasets", owner, name]:
                self._say({"Data": {"Id": f"{owner}+{name}"}}, ("dataset", f"{owner}/{name}"))
            case ["api", "v1", "datasets", number, "repo", "tree"]:
                page, size = int(query["PageNumber"]), int(query["PageSize"])
                self._list("dataset", number.replace("+", "/"), (page - 1) * size, page * size)
            case ["api", "v1", kinds, owner, name, "repo"]:
                self._send(kinds, f"{owner}/{name}", query["FilePath"], with_body)
            case ["api", kinds, owner, name] | ["api", kinds, owner, name, "revision", _]:
                self._describe(kinds[:-1], f"{owner}/{name}", parts[-1])
            case ["datasets", owner, name, "resolve", _, *path]:
                self._send("datasets", f"{owner}/{name}", "/".join(path), with_body)
            case [owner, name, "resolve", _, *path]:
                self._send("models", f"{owner}/{name}", "/".join(path), with_body)
            case _:
                self.send_error(404)

    def _describe(self, kind: str, name: str, revision: str) -> None:
        files = self.server.files.get((kind, name), {})
        if revision not in (COMMIT, "main", name.partition("/")[2]):
            self._say({"error": "Invalid rev id"}, None, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings: list[dict[str, Any]] = []
        for path, content in files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sibling = {"rfilename": path, "size": len(content), "blobId": blob}
            if len(content) >= LARGE:
                pointer = {"sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
                sibling |= {"lfs": pointer | {"size": len(content)}}
            siblings.append(sibling)
        body = {"id": name, "sha": COMMIT, "siblings": siblings}
        self._say(body, (kind, name), {"X-Error-Code": "RepoNotFound"})

    def _list(self, kind: str, name: str, start: int = 0, end: int | None = None) -> None:
        files = [*self.server.files.get((kind, name), {}).items()][start:end]
        listed = [
            {
                "Path": path,
                "Size": len(content),
                "Sha256": hashlib.sha256(content).hexdigest(),
                "Type": "blob",
            }
            for path, content in files
        ]
        self._say({"Data": {"Files": listed}}, (kind, name))

    def _say(
        self, body: Any, asked_for: tuple[str, str] | None, or_else: dict[str, str] | None = None
    ) -> None:
        is_there = asked_for in self.server.files
        content = json.dumps(body).encode()
        self.send_response(200 if is_there else 404)
        for key, value in {} if is_there else (or_else or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send(self, kinds: str, name: str, path: str, with_body: bool) -> None:
        content = self.server.files.get((kinds[:-1], name), {}).get(path)
        if content is None or self.server.is_broken:
            self.send_error(503 if self.server.is_broken else 404)
            return
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        if with_body:
            self.server.asked.append((path, asked))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body and self.server.cut is not None and len(content) > self.server.cut:
            self.wfile.write(content[start : start + self.server.cut])
            self.server.cut, self.server.is_broken = None, True
            self.close_connection = True
        elif with_body:
            self.wfile.write(content[start:])

    def log_message(self, *arguments: Any) -> None:
        pass
