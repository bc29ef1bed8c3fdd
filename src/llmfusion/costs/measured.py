"""Coefficients from finished jobs: Snakemake's benchmark files say what a job took, its work is known."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmfusion.config.plan import output_of
from llmfusion.costs.work import LOADS_A_MODEL, Workload

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
    note = output.with_name("provenance.json") if output.name == "manifest.json" else output.with_suffix(".provenance.json")
    try:
        memory = float(row.get("max_rss") or 0)
    except ValueError:  # "NA" or "-": the job was too short to be looked at
        memory = 0.0
    try:
        provenance = json.loads(note.read_bytes())
    except (OSError, ValueError):
        provenance = {}
    return Measured(seconds, memory, provenance)


def refined(coefficients: dict[str, tuple[float, ...]], workload: Workload) -> tuple[dict[str, tuple[float, ...]], dict[str, int]]:
    """Coefficients that finished jobs of ``workload`` show, the given ones for steps without any; and the jobs behind each.

    Relative errors are squared and summed; coefficients are never negative. Where all jobs of a step are alike its start
    cannot be told from its work: then it is the start of trainings for programs that load a model, the given one else.
    """
    out, counts = dict(coefficients), {}
    found: dict[str, list[tuple[tuple[float, ...], float]]] = {}
    for address, job in workload.jobs.items():
        if workload.made(address) and (took := measured(workload.directory, address)) is not None:
            found.setdefault(ALIKE.get(job.step, job.step), []).append((job.work, took.seconds))
    for step in sorted(found, key=lambda step: step != "train"):  # trainings first: their start serves others
        works, seconds = zip(*found[step], strict=True)
        start = out["train"][0] if step in LOADS_A_MODEL else coefficients[step][0]
        out[step] = _fit(np.array(works), np.array(seconds), coefficients[step], start)
        counts[step] = len(seconds)
    return out | {step: out[other] for step, other in ALIKE.items()}, counts


def _fit(works: np.ndarray, seconds: np.ndarray, given: Sequence[float], start: float) -> tuple[float, ...]:
    totals = works[:, 1:] @ np.array(given[1:])  # (jobs,) work in the given coefficients' seconds
    if totals.max() < 1.3 * totals.min() or len(seconds) < 3:
        start = min(start, 0.9 * float(seconds.min()))
        factor = float((seconds - start).sum() / totals.sum()) if totals.sum() else 1.0
        return (start, *(max(factor, 0.0) * value for value in given[1:]))
    found = _not_negative(works, seconds, np.array(given))
    return tuple(found * (seconds.sum() / (works @ found).sum()))  # relative errors favour the short jobs; the sum is what is paid


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
