"""Names of folders and files that end up on command lines of Snakemake, SLURM and shells."""

import re

ALLOWED = "letters and digits of any script, spaces, and . _ - + = , @ ~ /"
REFUSED = re.compile(r"[^\w .+=,@~/-]")


def problem_of(path: str) -> str | None:
    """What in a path a shell or SLURM would take for something else, as the end of a sentence; None if nothing is.

    Quoting is not enough: a path passes through several shells, Snakemake's own quoting is Python's, SLURM replaces
    ``%`` in paths of logs, and Snakemake takes ``{x}`` for a wildcard.
    """
    found = sorted({match[0] for match in REFUSED.finditer(path)})
    if path.startswith("-"):
        return "begins with -, which commands take for an option"
    if path != path.strip():
        return "begins or ends with a space"
    if not found:
        return None
    characters = " ".join(map(repr, found))
    return f"has {characters}, which a shell, SLURM or Snakemake takes for something else; allowed: {ALLOWED}"
