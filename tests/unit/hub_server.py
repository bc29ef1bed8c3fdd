"""A hub on loopback: repositories of models and datasets as the hub's HTTP API describes and serves them."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by ``models/OWNER/NAME`` or ``datasets/OWNER/NAME``, and what was asked for."""

    files: dict[str, dict[str, bytes | int]] = field(default_factory=dict)  # content, or only a size
    info: dict[str, dict[str, Any]] = field(default_factory=dict)  # more of what the hub says of a repository
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def downloads(self) -> list[str]:
        """Paths of the files whose content was asked for, in order."""
        return [
            request.split("/resolve/")[1].partition("/")[2]
            for request in self.requests
            if request.startswith("GET") and "/resolve/" in request
        ]

    def entry(self, repository: str, path: str) -> dict[str, Any] | None:
        """What the API answers about a file or a folder of a repository; None where there is neither."""
        files = self.files[repository]
        if path in files:
            content = files[path]
            size = content if isinstance(content, int) else len(content)
            return {"type": "file", "path": path, "size": size, "oid": sha1(path.encode()).hexdigest()}
        if any(name.startswith(f"{path}/") for name in files):
            return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
        return None

    def listing(self, repository: str, folder: str) -> list[dict[str, Any] | None]:
        """What the API answers about everything that lies directly in a folder; in "" at the top."""
        inside = [name for name in self.files[repository] if not folder or name.startswith(f"{folder}/")]
        depth = len(PurePosixPath(folder).parts) + 1
        paths = dict.fromkeys("/".join(PurePosixPath(name).parts[:depth]) for name in inside)
        return [self.entry(repository, path) for path in paths]

    def describe(self, repository: str) -> dict[str, Any]:
        """What the API answers about a repository."""
        siblings = [
            {"rfilename": name, "size": content if isinstance(content, int) else len(content), "blobId": "0"}
            for name, content in self.files[repository].items()
        ]
        name = repository.split("/", 1)[1]
        body = {"id": name, "sha": REVISION, "gated": False, "siblings": siblings, "tags": [], "downloads": 0}
        return body | {"private": False, "likes": 0, **self.info.get(repository, {})}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` on a free port of loopback, whose address is then in ``hub.url``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/\w+/(.+)", path):
                files = hub.files.get(f"{'datasets' if match[1] else 'models'}/{match[2]}", {})
                content = files.get(match[3])
                if isinstance(content, bytes):
                    return self.reply(200, content)
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound" if files else "RepoNotFound"})
            match = re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree)/\w+/?(.*))?", path)
            if match is None or match[1] not in hub.files:
                return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if match[2] == "tree":
                return self.json(hub.listing(match[1], match[3]))
            return self.json(hub.describe(match[1]))

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            match = re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/paths-info/\w+", path)
            if match is None or match[1] not in hub.files:
                return self.reply(404, b"{}")
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
            return self.json([entry for path in paths if (entry := hub.entry(match[1], path)) is not None])

        def json(self, value: object) -> None:
            self.reply(200, json.dumps(value).encode())

        def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            etag = sha1(body).hexdigest()
            sent = {"Content-Length": str(len(body)), "ETag": f'"{etag}"', "X-Repo-Commit": REVISION, **(headers or {})}
            for name, value in sent.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
