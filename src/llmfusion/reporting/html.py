"""A study's finished tables as one HTML page without scripts, styles from elsewhere or network."""

from html import escape
from pathlib import Path

from llmfusion.study.scales import SCALES

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid #bbb; padding: 0.25rem 0.7rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
.label { font-weight: bold; }
"""


def report_html(title: str, scale: str, tables: dict[str, Path], missing: list[str]) -> str:
    """The page: every table (``NAME: its CSV file``) with all columns, and the names of tables not made yet."""
    import pandas

    parts = [f"<h1>{escape(title)}</h1>"]
    if (label := SCALES[scale].label) is not None:
        parts.append(f'<p class="label">{escape(label)}</p>')
    for name, path in tables.items():
        frame = pandas.read_csv(path, dtype=str, keep_default_na=False)
        parts += [f"<h2>{escape(name)}</h2>", frame.to_html(index=False, border=0, justify="right")]
    if missing:
        parts.append(f"<p>Not made yet: {escape(', '.join(missing))}.</p>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}<style>{STYLE}</style></head>\n<body>\n' + "\n".join(
        [*parts, "</body>", "</html>", ""]
    )
