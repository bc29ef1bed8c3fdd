"""Write what each row of some tables of one study took (GPU-hours, wall time, memory) to a CSV file.

A row's jobs are all those behind it, from its cells to the base models; rows share jobs, so they do not add up.
"""

import argparse
import sys
from pathlib import Path

from llmfusion.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tables and the file to write."""
    parser.add_argument("tables", nargs="+", type=Path, metavar="TABLE", help="results/NAME.csv of one study")
    parser.add_argument("--out", required=True, type=Path, help="where to write the costs (.csv)")


def run(arguments: argparse.Namespace) -> int:
    """Write the costs of the given tables' rows. Returns the exit status: 0, or 1 where a manifest is missing."""
    from llmfusion.io.files import write_file
    from llmfusion.reporting.costs import Costs, costs_csv
    from llmfusion.study.addresses import results_index

    try:
        rows = []
        for table in arguments.tables:
            directory = Path(*table.parts[: results_index(table)])
            rows += Costs(directory).rows(table.stem)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_file(arguments.out, costs_csv(rows).encode())
    return 0
