"""Coefficients from finished jobs: each recorded what it took, and its work is known."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from llmfusion.io.files import json_object_or_empty
from llmfusion.study.addresses import is_shard, output_of, provenance_of, whole_of
from llmfusion.study.workload import Workload

SHARED_RATES = {"pretrain": "train"}  # one training loop, whatever it starts from: both are fitted together
Array = np.ndarray[Any, np.dtype[Any]]
Coefficients = dict[str, tuple[float, ...]]  # seconds a unit of work, by name of the rates


@dataclass(frozen=True)
class Measurement:
    """What a finished job took: wall seconds of its program, peak resident memory in MB, and its provenance."""

    seconds: float
    memory_mb: float
    provenance: dict[str, Any]


def read_measurement(directory: Path, address: str) -> Measurement | None:
    """What the job that made ``address`` took, as it recorded beside its manifest; None where nothing is recorded.

    What a shard took stands also beside the cache that it became a part of. A training that was interrupted is
    measured by its last attempt only.
    """
    record = _provenance(directory, address)
    if not record and is_shard(address):
        shards = _provenance(directory, whole_of(address)).get("shards")
        record = shards.get(address, {}) if isinstance(shards, dict) else {}
    seconds = record.get("seconds")
    memory = record.get("memory_mb")
    if not _is_positive(seconds):
        return None
    return Measurement(float(seconds), float(memory) if _is_positive(memory) else 0.0, record)


def _provenance(directory: Path, address: str) -> dict[str, Any]:
    return json_object_or_empty(provenance_of(directory / output_of(address)))


def _is_positive(value: Any) -> TypeGuard[float]:
    """Whether a record holds a number that something can have taken."""
    return type(value) in (int, float) and 0 < value < float("inf")


def fit_coefficients(assumed: Coefficients, workload: Workload) -> tuple[Coefficients, dict[str, int]]:
    """Coefficients that finished jobs of ``workload`` show, else ``assumed`` ones; and the jobs behind each.

    Relative errors are squared and summed; coefficients are never negative, and the sum of the jobs is met. Programs
    that load a model record when their work begins; of others the start follows from the work where jobs differ, else
    it is the assumed one.
    """
    out = dict(assumed)
    counts = {}
    for rates, jobs in _finished_jobs(workload).items():
        works = np.array([work for work, _ in jobs])  # (jobs, coefficients)
        seconds = np.array([measurement.seconds for _, measurement in jobs])  # (jobs,)
        starts = [start for _, one in jobs if (start := one.provenance.get("start_seconds")) is not None]
        out[rates] = _fit(works, seconds, assumed[rates], sum(starts) / len(starts) if starts else None)
        counts[rates] = len(jobs)
    return out | {rates: out[other] for rates, other in SHARED_RATES.items()}, counts


def _finished_jobs(workload: Workload) -> dict[str, list[tuple[tuple[float, ...], Measurement]]]:
    """Work and measurement of every job that has finished, by the rates that it is a measurement of."""
    out: dict[str, list[tuple[tuple[float, ...], Measurement]]] = {}
    for address, job in workload.jobs.items():
        measurement = read_measurement(workload.directory, address) if workload.is_made(address) else None
        if measurement is not None:
            out.setdefault(SHARED_RATES.get(job.rates, job.rates), []).append((job.work, measurement))
    return out


def _fit(works: Array, seconds: Array, assumed: Sequence[float], mean_start: float | None) -> tuple[float, ...]:
    """Coefficients of one kind of work, ``works (jobs, coefficients)`` and ``seconds (jobs,)``.

    ``mean_start``: seconds until the work began, where programs recorded it.
    """
    totals = works[:, 1:] @ np.array(assumed[1:])  # (jobs,) seconds by the assumed coefficients
    similar = totals.max() < 1.3 * totals.min() or len(seconds) < 3  # too similar to separate the start from the rates
    if mean_start is None and not similar:
        fitted = _non_negative_least_squares(works, seconds, np.array(assumed))
        return tuple(fitted * (seconds.sum() / (works @ fitted).sum()))
    start = min(assumed[0] if mean_start is None else mean_start, 0.9 * float(seconds.min()))
    rates = np.array(assumed[1:])  # (coefficients - 1,)
    if not similar:
        rates = _non_negative_least_squares(works[:, 1:], seconds - start, rates)
    spent = float((works[:, 1:] @ rates).sum())
    return (start, *(rates * (float((seconds - start).sum()) / spent if spent else 1.0)))


def _non_negative_least_squares(works: Array, seconds: Array, assumed: Array) -> Array:
    """Least squares of relative errors, ``(coefficients,)``; unused coefficients stay as assumed.

    The most negative coefficient is set to 0 until there is none.
    """
    used: Array = np.array(works.any(axis=0))
    scaled = works / seconds[:, None]
    while True:
        columns = np.flatnonzero(used)
        size = np.abs(scaled[:, columns]).max(axis=0)
        solution = np.linalg.lstsq(scaled[:, columns] / size, np.ones(len(seconds)), rcond=None)[0] / size
        if (solution >= 0).all():
            break
        used[columns[int(np.argmin(solution * size))]] = False
    out: Array = np.where(works.any(axis=0), 0.0, assumed)
    out[columns] = solution
    return out
