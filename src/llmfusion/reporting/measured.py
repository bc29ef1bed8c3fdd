"""Coefficients from finished jobs: Snakemake's benchmark files say what a job took, its work is known."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmfusion.study.addresses import output_of
from llmfusion.study.workload import Workload

ALIKE = {"pretrain": "train"}  # one loop, whatever it starts from


@dataclass(frozen=True)
class Measured:
    """What a finished job took: wall seconds of its program, peak resident memory in MB, and what its provenance tells."""

    seconds: float
    memory_mb: float
    provenance: dict[str, Any]


def measured(directory: Path, address: str) -> Measured | None:
    """What the job that made ``address`` took, as its benchmark file says; None where there is none.

    A training that was interrupted is measured by its last attempt only.
    """
    try:
        with open(directory / f"logs/benchmarks/{address}.tsv") as file:
            row = next(csv.DictReader(file, delimiter="\t"))
        seconds = float(row["s"])
    except (OSError, StopIteration, KeyError, ValueError):
        return None
    output = directory / output_of(address)
    note = (
        output.with_name("provenance.json")
        if output.name == "manifest.json"
        else output.with_suffix(".provenance.json")
    )
    try:
        memory = float(row.get("max_rss") or 0)
    except ValueError:  # "NA" or "-": the job was too short to be looked at
        memory = 0.0
    try:
        provenance = json.loads(note.read_bytes())
    except (OSError, ValueError):
        provenance = {}
    return Measured(seconds, memory, provenance)


def refined(
    coefficients: dict[str, tuple[float, ...]], workload: Workload
) -> tuple[dict[str, tuple[float, ...]], dict[str, int]]:
    """Coefficients that finished jobs of ``workload`` show, the given ones for steps without any; and the jobs behind each.

    Relative errors are squared and summed; coefficients are never negative, and the sum of the jobs is met. Programs that load
    a model note when their work begins; of others the start is told from the work where jobs differ, else it is the given one.
    """
    out, counts = dict(coefficients), {}
    found: dict[str, list[tuple[tuple[float, ...], float, float | None]]] = {}
    for address, job in workload.jobs.items():
        if workload.made(address) and (took := measured(workload.directory, address)) is not None:
            found.setdefault(ALIKE.get(job.rates, job.rates), []).append(
                (job.work, took.seconds, took.provenance.get("start_seconds"))
            )
    for step, jobs in found.items():
        works, seconds = np.array([work for work, _, _ in jobs]), np.array([took for _, took, _ in jobs])
        noted = [start for _, _, start in jobs if start is not None]
        out[step] = _fit(works, seconds, coefficients[step], sum(noted) / len(noted) if noted else None)
        counts[step] = len(seconds)
    return out | {step: out[other] for step, other in ALIKE.items()}, counts


def _fit(works: np.ndarray, seconds: np.ndarray, given: Sequence[float], noted: float | None) -> tuple[float, ...]:
    """Coefficients of one step: ``works (jobs, coefficients)``, ``seconds (jobs,)``, and the mean start where programs noted it."""
    totals = works[:, 1:] @ np.array(given[1:])  # (jobs,) work in the given coefficients' seconds
    alike = totals.max() < 1.3 * totals.min() or len(seconds) < 3
    if noted is None and not alike:
        found = _not_negative(works, seconds, np.array(given))
        return tuple(found * (seconds.sum() / (works @ found).sum()))
    start = min(given[0] if noted is None else noted, 0.9 * float(seconds.min()))
    rates = np.array(given[1:]) if alike else _not_negative(works[:, 1:], seconds - start, np.array(given[1:]))
    spent = float((works[:, 1:] @ rates).sum())
    return (start, *(rates * (float((seconds - start).sum()) / spent if spent else 1.0)))


def _not_negative(works: np.ndarray, seconds: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Least squares of relative errors; the most negative coefficient is set to 0 until there is none. Unused ones stay as given."""
    used: np.ndarray = np.array(works.any(axis=0))
    scaled = works / seconds[:, None]
    while True:
        columns = np.flatnonzero(used)
        size = np.abs(scaled[:, columns]).max(axis=0)
        solution = np.linalg.lstsq(scaled[:, columns] / size, np.ones(len(seconds)), rcond=None)[0] / size
        if (solution >= 0).all():
            break
        used[columns[int(np.argmin(solution * size))]] = False
    out = np.where(works.any(axis=0), 0.0, given)
    out[columns] = solution
    return out


def seconds_of(work: Sequence[float], coefficients: Sequence[float]) -> float:
    """A job's seconds."""
    return float(sum(amount * rate for amount, rate in zip(work, coefficients, strict=True)))
