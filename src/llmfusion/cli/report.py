"""Write a study's finished tables, and what they took where that was made (`results/TABLE.cost.csv`), to one HTML page.

Exit status 1 if no table is made yet.
"""

import argparse
import sys
from pathlib import Path

from llmfusion import ROOT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study and the page."""
    parser.add_argument("study", type=Path, metavar="STUDY", help="study file, e.g. config/mini.yaml")
    parser.add_argument("--out", type=Path, help="the page to write (default: results/report.html of the study)")


def run(arguments: argparse.Namespace) -> int:
    """Write the page. Returns the exit status: 0, 1 without a table, 2 for mistakes in the study."""
    from llmfusion.io.files import write_file
    from llmfusion.reporting.html import report_html
    from llmfusion.study.errors import StudyError
    from llmfusion.study.load import read_study

    try:
        study = read_study(arguments.study)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    results = ROOT / study.directory / "results"
    files = {name: results / f"{name}.csv" for name in study.tables}
    tables = {name: path for name, path in files.items() if path.exists()}
    missing = [name for name in files if name not in tables]
    if not tables:
        target = f"snakemake results/{missing[0]}.csv --configfile={arguments.study}"
        print(f"error: {results}: no table is made yet; make one with: {target}", file=sys.stderr)
        return 1
    costs = {name: results / f"{name}.csv" for name in (*(f"{table}.cost" for table in tables), "cost")}
    tables |= {name: path for name, path in costs.items() if path.exists()}
    out = arguments.out or results / "report.html"
    write_file(out, report_html(study.title, study.scale, tables, missing).encode())
    print(f"{out}: {', '.join(tables)}" + (f"; not made yet: {', '.join(missing)}" if missing else ""))
    return 0
