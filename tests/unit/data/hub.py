"""A hub on loopback that serves one dataset repository and records what was downloaded."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """The server's address, and the files that were read from it in order."""

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.downloaded: list[str] = []
        self.unknown: list[str] = []


@contextmanager
def dataset_hub(repo: str, files: dict[str, bytes]) -> Iterator[Hub]:
    """Serve ``files`` as the dataset ``repo`` at commit ``REVISION``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), None)
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = _handler(hub, repo, files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub, repo: str, files: dict[str, bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            try:
                paths = json.loads(asked).get("paths", [])
            except ValueError:
                paths = parse_qs(asked).get("paths", [])
            if not urlsplit(self.path).path.startswith(f"/api/datasets/{repo}/paths-info/"):
                return self.reply(404, b"{}")
            return self.json([entry(path) for path in paths if path in files or folder(path)])

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/datasets/{repo}/resolve/{REVISION}/"):
                name = path.removeprefix(f"/datasets/{repo}/resolve/{REVISION}/")
                if name not in files:
                    return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
                if body:
                    hub.downloaded.append(name)
                tag = hashlib.sha256(files[name]).hexdigest()
                headers = {"ETag": f'"{tag}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
                return self.reply(200, files[name], headers, body)
            if path in (f"/api/datasets/{repo}/revision/{REVISION}", f"/api/datasets/{repo}"):
                return self.json({"id": repo, "sha": REVISION, "siblings": [{"rfilename": name} for name in files]})
            if path.startswith(f"/api/datasets/{repo}/tree/{REVISION}"):
                return self.json(tree(path.removeprefix(f"/api/datasets/{repo}/tree/{REVISION}").strip("/")))
            hub.unknown.append(path)
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def json(self, value: object) -> None:
            self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    def folder(path: str) -> bool:
        return any(fnmatch(name, f"{path}/*") for name in files)

    def entry(path: str) -> dict[str, object]:
        if path not in files:
            return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
        return {"type": "file", "path": path, "size": len(files[path]), "oid": hashlib.sha1(files[path]).hexdigest()}

    def tree(top: str) -> list[dict[str, object]]:
        inside = [name for name in files if not top or name.startswith(f"{top}/")]
        depth = len(Path(top).parts)
        return [entry(str(Path(*Path(name).parts[: depth + 1]))) for name in dict.fromkeys(inside)]

    return Handler
