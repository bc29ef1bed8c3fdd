"""The study as Snakemake sees it: checked, planned, and what a rule asks about its artifact. Imports no torch."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmfusion import ROOT
from llmfusion.io.digests import canonical
from llmfusion.io.files import write_file
from llmfusion.io.logs import redact_output
from llmfusion.study import requests
from llmfusion.study.addresses import FINGERPRINTS, TABLES, output_of
from llmfusion.study.errors import StudyError, nearest
from llmfusion.study.graph import ArtifactGraph, PlannedArtifact, build_graph
from llmfusion.study.kinds import all_kinds, gpus_of, kind_of, wildcards_of
from llmfusion.study.load import read_study, short_path
from llmfusion.study.schema.study import Study
from llmfusion.study.shell_names import problem_of
from llmfusion.study.staged import check_staged
from llmfusion.study.workload import Assumptions, JobWork, Workload


@dataclass(frozen=True)
class Limits:
    """What a cluster's profile says of the time that jobs may take."""

    are_set: bool = False  # False: jobs run on this machine, and nothing ends them
    minutes: int | None = None  # that no job may ask for more of

    @classmethod
    def of(cls, default_resources: Mapping[str, Any] | None) -> "Limits":
        """From a profile's ``default-resources``. Raises ``SystemExit`` for a ``max_runtime`` that is no number."""
        if default_resources is None:
            return cls()
        most = default_resources.get("max_runtime")
        minutes = getattr(most, "raw", most)
        if minutes is not None and (type(minutes) is not int or minutes < 1):
            raise SystemExit(f"default-resources: max_runtime: got {minutes}; expected minutes, a whole number")
        return cls(True, minutes)


class WorkflowStudy:
    """What the Snakefile needs of a study: its directory, stages, wildcard values, and each artifact's inputs and spec.

    ``inputs`` and ``spec`` give Snakemake a function of a rule's wildcards. Snakemake's own ``lookup`` does the same
    but walks the whole tree at every call: 18 s instead of 3 s to plan 366 jobs.
    """

    def __init__(self, study: Study, graph: ArtifactGraph, limits: Limits | None = None):
        self.limits = limits or Limits()
        self.study = study
        self.graph = graph
        self._artifacts = graph.artifacts
        self.directory = str(ROOT / study.directory)
        self.stages = stages_of(graph)  # files by the target that asks for them
        # regular expressions by wildcard; (?!) matches nothing
        self.names = {
            name: "|".join(map(re.escape, sorted(values))) or "(?!)" for name, values in self._wildcard_values().items()
        }

    def _wildcard_values(self) -> dict[str, set[str]]:
        """Every value that each wildcard of the rules takes; one that no artifact has matches nothing."""
        out: dict[str, set[str]] = {name: set() for kind in all_kinds().values() for name in kind.pattern.groupindex}
        for address in self._artifacts:
            for name, value in wildcards_of(address).items():
                out[name].add(value)
        return out

    def record_fingerprints(self, workflow: Any) -> None:
        """Write what the study asks for to :data:`FINGERPRINTS`, which its jobs compare their inputs with.

        Called before the first job, by the main process, in the study's directory. A place that cannot be written is
        left to the jobs, which say so.
        """
        if not workflow.is_main_process:
            return
        fingerprints = {address: artifact.fingerprint for address, artifact in self._artifacts.items()}
        with contextlib.suppress(OSError):
            FINGERPRINTS.parent.mkdir(parents=True, exist_ok=True)
            write_file(FINGERPRINTS, canonical(fingerprints).encode())

    def inputs(self, pattern: str) -> Callable[[Any], list[str]]:
        """The input function of artifacts at ``pattern``, e.g. ``scores/{model}/{task}``."""
        return lambda wildcards: self._artifact(pattern, wildcards).inputs

    def gpus(self, pattern: str) -> Callable[[Any], int]:
        """The resource function of artifacts at ``pattern``: GPUs of the job; 0 where it only stages or assembles."""

        def gpus(wildcards: Any) -> int:
            artifact = self._artifact(pattern, wildcards)
            return gpus_of(pattern.format(**wildcards), artifact.spec, len(artifact.shards))

        return gpus

    def memory_mb(self, pattern: str) -> Callable[[Any, int], int]:
        """The resource function of artifacts at ``pattern``: memory of the job in MB."""
        return lambda wildcards, attempt: requests.memory_mb(self._work(pattern, wildcards), attempt)

    def minutes(self, pattern: str) -> Callable[[Any, int], int]:
        """The resource function of artifacts at ``pattern``: the job's time limit, long where no cluster sets one."""
        if not self.limits.are_set:
            return lambda wildcards, attempt: requests.UNLIMITED
        return lambda wildcards, attempt: requests.minutes(self._work(pattern, wildcards), attempt, self.limits.minutes)

    def _work(self, pattern: str, wildcards: Any) -> JobWork:
        """Worked out anew for every job: meanwhile its inputs have been made, and tell more than their names did."""
        address = pattern.format(**wildcards)
        return self._workload.job(address, self._artifacts[address])

    @cached_property
    def _workload(self) -> Workload:
        return Workload(self.study, self.graph, Assumptions())

    def spec(self, pattern: str) -> Callable[[Any], str]:
        """The params function that gives the spec of artifacts at ``pattern``."""
        return lambda wildcards: self._artifact(pattern, wildcards).spec

    def _artifact(self, pattern: str, wildcards: Any) -> PlannedArtifact:
        return self._artifacts[pattern.format(**wildcards)]


def stages_of(graph: ArtifactGraph) -> dict[str, list[str]]:
    """Files of a study by the stage, a target of Snakemake, that asks for them; none for a stage that it leaves out."""
    out: dict[str, list[str]] = {kind.stage: [] for kind in all_kinds().values() if kind.stage is not None}
    for address in graph.artifacts:
        if (stage := kind_of(address).stage) is not None:
            out[stage].append(output_of(address))
    tables = (table for address, table in graph.artifacts.items() if address.startswith(TABLES))
    out["scores"] = sorted({cell for table in tables for cell in table.inputs})  # only cells that a table needs
    return out


def study_of(workflow: Any) -> WorkflowStudy:
    """The study that a Snakemake workflow was started with: its ``configfile``, or the paper's."""
    redact_output()
    return load_study(
        *(workflow.overwrite_configfiles or [ROOT / "config/config.yaml"]),
        overrides=workflow.config_settings.config,
        directory=workflow.overwrite_workdir,
        default_resources=workflow.resource_settings.default_resources,
    )


def load_study(
    *files: str | Path,
    overrides: dict[str, Any] | None = None,
    directory: object = None,
    default_resources: Mapping[str, Any] | None = None,
) -> WorkflowStudy:
    """Read, check and plan the one study of a run.

    Sets the environment of the jobs (PYTHONPATH, PATH). Raises ``SystemExit`` with the whole message for the user:
    Snakemake shows it without a traceback and starts nothing. ``overrides``, ``directory`` and ``default_resources``
    are the values of ``--config``, ``--directory`` and ``--default-resources``; a study is complete in itself, so the
    first two, and several studies at once, are refused.
    """
    # jobs run this clone's code, in the environment that started Snakemake
    os.environ["PYTHONPATH"] = str(ROOT / "src")
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    if overrides:
        keys = " ".join(overrides)
        raise SystemExit(f"--config {keys}: a study is one file and complete in itself; copy it and edit the copy")
    if directory is not None:
        raise SystemExit(f"--directory {directory}: a study names its own directory; set its key 'directory' instead")
    if len(files) != 1:
        names = [short_path(Path(file)) for file in files]
        given = f"several --configfile given: a study is one file and complete in itself: {', '.join(names)}"
        raise SystemExit(f"{given}. Put targets before --configfile, or write --configfile={''.join(names[:1])}")
    _refuse_shell_names(files[0])
    try:
        return WorkflowStudy(*checked(files[0]), Limits.of(default_resources))
    except StudyError as error:
        raise SystemExit(str(error)) from None


def _refuse_shell_names(file: str | Path) -> None:
    """Raise ``SystemExit`` for a path outside the study that jobs get on their command lines and a shell would read."""
    paths = {
        "the study's file": Path(file).absolute(),
        "the folder of the clone": ROOT,
        "the folder that Snakemake was started in": Path.cwd(),
        "the environment's Python": Path(sys.executable),
    }
    for what, path in paths.items():
        if (problem := problem_of(str(path))) is not None:
            raise SystemExit(
                f"{what}: {str(path)!r} {problem}. Rename it, or a folder that it is in; nothing was started"
            )


def checked(file: str | Path) -> tuple[Study, ArtifactGraph]:
    """A study and its graph after all checks, those against staged files included. Raises :class:`StudyError`."""
    study = read_study(file)
    graph = build_graph(study)
    check_staged(file, study, graph)
    return study, graph


def addresses_of(graph: ArtifactGraph, targets: Iterable[str]) -> list[str]:
    """Addresses of what Snakemake makes for these targets: stages, files of artifacts, or addresses themselves.

    Costs are made from tables. Raises :class:`ValueError` for a target that the study does not make.
    """
    outputs = {output_of(address): address for address in graph.artifacts}
    stages = stages_of(graph)
    out: list[str] = []
    for target in targets:
        file = target.removesuffix(".cost.csv") + ".csv" if target.endswith(".cost.csv") else target
        files = stages["tables"] if target == "results/cost.csv" else stages.get(target, [file])
        for name in files:
            if name not in outputs and name not in graph.artifacts:
                raise ValueError(f"{target}: the study makes no such file; {nearest(target, {*outputs, *stages})}")
            out.append(outputs.get(name, name))
    return out
