"""What is written from the code and checked in: the schema of studies and the tables of the documents."""

import subprocess
import sys

from llmfusion import ROOT


def test_generated_files_are_in_sync_with_the_code() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_marker_of_the_documents_is_closed_and_filled() -> None:
    for name in ("config/README.md", "docs/extending.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for part in text.split("<!-- ")[1:]:
            head = part.split(" -->", 1)[0]
            if head != "end":
                assert part.count("|") > 4, f"{name}: {head}: no table follows"
        assert text.count("<!-- end -->") == text.count("<!-- ") // 2
