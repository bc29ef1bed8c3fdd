"""A password in HF_ENDPOINT, in real runs against a server that fails: nothing that is printed or kept holds it."""

import base64
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from llmfusion import ROOT
from llmfusion.io.offline import VARIABLES
from tests.project import environment

PASSWORD = "s3cr3t/päss@1"
REVISION = "0" * 40
MODEL = {"kind": "hub", "repo": "a/b", "revision": REVISION, "vocabulary": "x", "license": "mit"}
DATASET = {"kind": "hub", "repo": "a/b", "revision": REVISION, "layout": "text", "license": "mit", "domain": "x"}


class Handler(http.server.BaseHTTPRequestHandler):
    """Fails, and tells everybody what it was sent."""

    def do_GET(self) -> None:
        """A redirect to the same place, or an error whose body and headers repeat the request."""
        status = self.server.status  # type: ignore[attr-defined]
        body = f"{self.path}\n{self.headers}".encode()
        self.send_response(status)
        self.send_header("Location", f"/again?{self.headers.get('Authorization')}")
        self.send_header("X-Error-Message", f"refused {self.headers.get('Authorization')}")
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def spellings() -> set[str]:
    """The password as it stands, encoded, escaped, and in a header of this user."""
    out = {PASSWORD, quote(PASSWORD), quote(PASSWORD, safe=""), quote(quote(PASSWORD, safe=""), safe="")}
    out |= {json.dumps(PASSWORD)[1:-1], ascii(PASSWORD)[1:-1], "päss@1"}
    for user in (f"me:{PASSWORD}", f"me:{quote(PASSWORD, safe='')}"):
        out |= {base64.b64encode(user.encode(encoding)).decode().rstrip("=")[:-1] for encoding in ("utf-8", "latin-1")}
    return out


def require_no_secret(printed: str, folder: Path) -> None:
    texts = {"what was printed": printed}
    texts |= {str(p): p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file()}
    for name, text in texts.items():
        for spelling in spellings():
            assert spelling not in text, f"{name} holds {spelling}"


ENDPOINTS = {
    "encoded": f"http://me:{quote(PASSWORD, safe='')}@",
    "not encoded": f"http://me:{PASSWORD}@",  # "/" ends the host: what is before it is no port
}
SAYS = {"encoded": "<user>@127.0.0.1", "not encoded": "HF_ENDPOINT is no address: expected http(s)://host[:port]"}


@pytest.mark.parametrize(
    ("status", "endpoint"), [(401, "encoded"), (404, "encoded"), (302, "encoded"), (401, "not encoded")]
)
@pytest.mark.parametrize("step", ["stage_base", "stage_dataset"])
def test_a_step_that_fails_at_the_hub_keeps_and_prints_no_password(tmp_path, server, step, status, endpoint) -> None:
    server.status = status
    spec = {"recipe": 1, "step": "base", "base": MODEL}
    if step == "stage_dataset":
        spec = {"recipe": 1, "step": "dataset", "dataset": DATASET}
    out = f"results/{'models/base' if step == 'stage_base' else 'data/dataset'}/x/manifest.json"
    words = [sys.executable, "-X", "dev", "-m", "llmfusion", "step", step, "--spec", json.dumps(spec), "--out", out]
    secret = {
        "HF_ENDPOINT": f"{ENDPOINTS[endpoint]}127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path.with_name("hub")),
        **dict.fromkeys(VARIABLES, "0"),  # not offline, as other tests are
        "HF_DEBUG": "1",  # the client then prints each request as a command for curl, headers included
    }
    done = subprocess.run(words, cwd=tmp_path, env={**environment(), **secret}, capture_output=True, text=True)
    assert done.returncode == 1
    assert SAYS[endpoint] in done.stdout + done.stderr
    require_no_secret(done.stdout + done.stderr, tmp_path)


def test_a_workflow_whose_jobs_fail_at_the_hub_keeps_and_prints_no_password(tmp_path, server) -> None:
    server.status = 401
    study = (ROOT / "config/examples/my-models.yaml").read_text()
    study = study.replace("directory: runs/my-models", f"directory: {tmp_path / 'run'}")
    hub = json.dumps({**MODEL, "vocabulary": "mine"})
    path = "{kind: path, path: my-models/pivot, vocabulary: mine, license: apache-2.0}"
    assert path in study
    (tmp_path / "study.yaml").write_text(study.replace(path, hub))
    words = ["snakemake", "results/models/base/pivot/manifest.json", "--cores", "1", "--show-failed-logs", "--verbose"]
    secret = {
        "HF_ENDPOINT": f"{ENDPOINTS['encoded']}127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path.with_name("hub")),
        **dict.fromkeys(VARIABLES, "0"),  # not offline, as other tests are
    }
    done = subprocess.run(
        [*words, "--configfile", str(tmp_path / "study.yaml")],
        cwd=ROOT,
        env={**environment(), **secret},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "could not be downloaded" in (tmp_path / "run/logs/models/base/pivot.log").read_text()
    require_no_secret(done.stdout + done.stderr, tmp_path)
