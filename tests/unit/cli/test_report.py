"""The HTML page of a study's tables: every cell as in the CSV, nothing from elsewhere, names escaped."""

import csv
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from llmfusion.cli.main import main
from tests.unit.mini_study import small


class Cells(HTMLParser):
    """Texts of all cells of tables, and addresses of everything that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loaded: list[str] = []
        self.in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def study(tmp_path: Path) -> Path:
    data = {**small(), "directory": str(tmp_path / "run"), "title": "Fused <b>&</b> merged"}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def test_every_cell_of_the_tables_is_on_the_page(study: Path, tmp_path: Path) -> None:
    results = tmp_path / "run/results"
    results.mkdir(parents=True)
    rows = [["label", "mmlu", "average"], ["SFT <x>", "32.50", "39.47"], ["UDF", "", "1e3"]]
    for name in ("table2", "table2.cost"):
        with open(results / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    assert main(["report", str(study)]) == 0
    page = (results / "report.html").read_text()
    cells = Cells()
    cells.feed(page)
    assert cells.rows == rows + rows
    assert cells.loaded == []
    assert "not comparable" in page
    assert "<b>&" not in page


def test_a_study_without_a_table_says_how_to_make_one(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(study)]) == 1
    assert "no table is made yet; make one with: snakemake results/table2.csv --configfile" in capsys.readouterr().err


def test_mistakes_of_the_study_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.yaml").write_text("titel: x\n")
    assert main(["report", str(tmp_path / "study.yaml")]) == 2
    assert "did you mean 'title'?" in capsys.readouterr().err
