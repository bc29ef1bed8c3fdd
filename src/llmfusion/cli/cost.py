"""Write what each row of some tables of one study took (GPU-hours, wall time, memory) to a CSV file.

A row's jobs are all those behind it, from its cells to the base models; rows share jobs, so they do not add up.
"""

import argparse
import csv
import io
import sys
from pathlib import Path

from llmfusion.errors import UserError
from llmfusion.io.files import write_file
from llmfusion.study.addresses import results_index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tables and the file to write."""
    parser.add_argument("tables", nargs="+", type=Path, metavar="TABLE", help="results/NAME.csv of one study")
    parser.add_argument("--out", required=True, type=Path, help="where to write the costs (.csv)")


def run(arguments: argparse.Namespace) -> int:
    """Write the costs of the given tables' rows. Returns the exit status."""
    from llmfusion.reporting.costs import COLUMNS, Costs

    try:
        rows = []
        for table in arguments.tables:
            directory = Path(*table.parts[: results_index(table)])
            rows += Costs(directory).rows(table.stem)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(arguments.out, text.getvalue().encode())
    return 0
