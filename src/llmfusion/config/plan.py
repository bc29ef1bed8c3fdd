"""From a study to its artifacts: for each one its address, its inputs and its spec.

The spec is canonical JSON (sorted keys, defaults left out) and all a program needs besides its inputs, so the log line of a
job reproduces the artifact. ``recipe`` is raised when a step's meaning changes. A fingerprint is the hash of a spec and of
its inputs' fingerprints: it says what was asked for, before anything has been computed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from llmfusion import ROOT
from llmfusion.artifacts import SHARDS
from llmfusion.digests import canonical, digest

if TYPE_CHECKING:  # a step that only needs a recipe starts without the models of a whole study
    from llmfusion.config.models import Study

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "LICENSE*", "NOTICE*")  # never code or pickles
RECIPES = {
    "dataset": 1, "mix": 1, "tasks": 1, "base": 1, "generate": 1, "capture": 2,
    "train": 1, "merge": 3, "answer": 1, "score": 1, "table": 2,
}  # fmt: skip


def dump(section: BaseModel, *leave_out: str) -> dict[str, Any]:
    """A section as plain data, without defaults and the fields to ``leave_out``."""
    return section.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=set(leave_out))


class Plan:
    """All artifacts of a study by address. ``add`` returns the path of what the job declares as its output."""

    def __init__(self, study: Study):
        self.study = study
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.common = {} if study.chat_template == "neutral" else {"chat_template": study.chat_template}

    def add(self, address: str, step: str, body: dict[str, Any], inputs: list[str], files: list[str] | None = None) -> str:
        """Enter one artifact whose inputs are the given artifacts' addresses and outside ``files``."""
        spec = canonical({"step": step, "recipe": RECIPES[step], **body})
        unique = list(dict.fromkeys(inputs))
        prints = [self.artifacts[i]["fingerprint"] for i in unique]
        self.artifacts[address] = {
            "inputs": [output_of(i) for i in unique] + [str(ROOT / f) for f in files or []],
            "spec": spec,
            "fingerprint": digest(spec, *sorted(prints)),
            "shards": [],  # jobs that do its work beforehand: it waits for them, but is the same without them
        }
        return address

    # ------------------------------------------------------------------------------------------------ one method a step
    def dataset(self, name: str) -> str:
        entry = self.study.datasets[name]
        return self.add(f"data/dataset/{name}", "dataset", {"dataset": dump(entry)}, [], _files(entry))

    def tasks(self, name: str) -> str:
        task = self.study.tasks[name]
        body = {"items": dump(task.items)} | ({"shots_from": dump(task.shots_from)} if task.shots_from else {})
        return self.add(f"data/tasks/{name}", "tasks", body, [], _files(task.items) + _files(task.shots_from))

    def mix(self, name: str) -> str:
        address = f"data/mix/{name}"
        if address not in self.artifacts:
            mix = self.study.mixes[name]
            inputs = [self.dataset(d) for d in mix.datasets] + [self.tasks(t) for t in mix.against] + [self.model(m) for m in mix.tokenizers]
            self.add(address, "mix", {"mix": dump(mix), **(self.common if mix.tokenizers else {})}, inputs)
        return address

    def model(self, model: str) -> str:
        if f"models/{model}" not in self.artifacts:
            kind, name = model.split("/")
            getattr(self, f"_{kind}")(name)
        return f"models/{model}"

    def _base(self, name: str) -> None:
        entry = self.study.models.base[name]
        inputs = [self.mix(entry.mix)] if entry.kind == "scratch" else []
        inputs += [self.model(entry.init)] if entry.kind == "scratch" and entry.init else []
        self.add(f"models/base/{name}", "base", {"base": dump(entry), **self.common}, inputs, _files(entry))

    def _trained(self, name: str) -> None:
        run = self.study.models.trained[name]
        inputs = [self.model(run.init), self.mix(run.mix)]
        inputs += [self.generated(m, run.mix) for m in run.generated] + [self.teacher(m, run.mix) for m in run.teachers]
        inputs += [self.model(m) for m in run.teachers] if self.study.capture.kind == "online" else []
        self.add(f"models/trained/{name}", "train", {"run": dump(run), **self._captured(run.teachers), **self.common}, inputs)

    def _captured(self, teachers: list[str]) -> dict[str, Any]:
        """What a training expects its caches to be made of."""
        prints = {m: self.artifacts[self.model(m)]["fingerprint"] for m in teachers}
        return {"captured": {"capture": dump(self.study.capture, "shards"), "teachers": prints}} if teachers else {}

    def _merged(self, name: str) -> None:
        merge = self.study.models.merged[name]
        self.add(f"models/merged/{name}", "merge", {"merge": dump(merge)}, [self.model(m) for m in [merge.pivot, *merge.parents]])

    def generated(self, model: str, mix: str) -> str:
        address = f"data/generated/{model}/{mix}"
        body = {"model": model, "mix": mix, "generation": dump(self.study.generation), **self.common}
        return self.add(address, "generate", body, [self.model(model), self.mix(mix)])

    def teacher(self, model: str, mix: str) -> str:
        body = {"model": model, "mix": mix, "capture": dump(self.study.capture, "shards"), **self.common}
        address, inputs = f"teachers/{model}/{mix}", [self.model(model), self.mix(mix)]
        if address not in self.artifacts:
            self.add(address, "capture", body, inputs)
            count = self._shards_made(address) or self.study.capture.shards
            for i in range(1, count + 1) if count > 1 else ():
                shard = self.add(f"{SHARDS}{model}/{mix}/{i}-of-{count}", "capture", {**body, "shard": [i, count]}, inputs)
                self.artifacts[address]["shards"].append(shard)
                self.artifacts[address]["inputs"].append(output_of(shard))
        return address

    def _shards_made(self, address: str) -> int | None:
        """In how many shards a cache was made that is there as the study asks for it: another number then does not make it again."""
        output = ROOT / self.study.directory / output_of(address)
        try:
            same = json.loads(output.read_bytes())["fingerprint"] == self.artifacts[address]["fingerprint"]
            return max(1, len(json.loads(output.with_name("provenance.json").read_bytes())["shards"])) if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def answers(self, model: str, batch: str) -> str:
        tasks = {name: dump(self.study.tasks[name], "items", "shots_from", "label") for name in self.study.batches[batch]}
        body = {"model": model, "tasks": tasks, "answering": dump(self.study.answering), **self.common}
        return self.add(f"answers/{model}/{batch}", "answer", body, [self.model(model), *(self.tasks(t) for t in tasks)])

    def score(self, model: str, task: str) -> str:
        address = f"scores/{model}/{task}"
        if address not in self.artifacts:
            batch = next(name for name, tasks in self.study.batches.items() if task in tasks)
            body = {"model": model, "task": task, "format": self.study.tasks[task].format, "batch": batch, "scale": self.study.scale}
            self.add(address, "score", body, [self.answers(model, batch), self.tasks(task)])
        return address

    def table(self, name: str) -> str:
        table = self.study.tables[name]
        cells = {model: {task: self.score(model, task) for task in table.tasks} for row in table.rows for model in row.models}
        prints = {model: {t: self.artifacts[a]["fingerprint"][:16] for t, a in tasks.items()} for model, tasks in cells.items()}
        rows = [[row.models, row.category, row.label, *describe(self.study, row.models[0])] for row in table.rows]
        tasks = [[task, self.study.tasks[task].label] for task in table.tasks]
        body = {"title": self.study.title, "scale": self.study.scale, "tasks": tasks, "rows": rows, "cells": prints}
        body |= {"reference": table.reference} if table.reference else {}
        return self.add(f"tables/{name}", "table", body, [a for tasks in cells.values() for a in tasks.values()])


def describe(study: Study, model: str) -> tuple[str, str]:
    """``(method, sources)`` of a table row, from the entry itself: e.g. ``("kd", "code")``, ``("pairwise-rsaf", "code+math")``."""
    kind, name = model.split("/")
    if kind == "base":
        return "none", name
    if kind == "merged":
        merge = study.models.merged[name]
        return f"pairwise-{merge.method}", "+".join(dict.fromkeys(s for p in merge.parents for s in describe(study, p)[1].split("+")))
    run = study.models.trained[name]
    if run.fusion is None:
        return ("seqkd" if run.generated else "sft"), "+".join(m.split("/")[1] for m in run.generated or [run.init])
    sources = [m.split("/")[1] for m in run.teachers if m != run.init]
    return run.fusion.target if len(sources) == 1 else f"unified-{run.fusion.target}", "+".join(sources)


def gpus_of(spec: dict[str, Any], shards: Sequence[str] = ()) -> int:
    """GPUs a job with this spec asks for: one a process of a training, one where a model reads or answers, else none.

    None where ``shards`` have done the work.
    """
    training = spec.get("run") or spec.get("base") or {}
    if spec["step"] == "train" or training.get("kind") == "scratch":
        return training.get("processes", 1)
    return int(spec["step"] in ("capture", "generate", "answer") and not shards)


def output_of(address: str) -> str:
    """The file a job declares for an artifact: its manifest, the score, or the table."""
    if address.startswith("scores/"):
        return f"results/{address}.json"
    if address.startswith("tables/"):
        return f"results/{address.removeprefix('tables/')}.csv"
    return f"results/{address}/manifest.json"


def _files(entry: Any) -> list[str]:
    """Files outside the study that an entry reads."""
    path = getattr(entry, "path", None)
    if path is None:
        return []
    if type(entry).__name__ != "PathModel":
        return [path]
    names = sorted(p.name for pattern in MODEL_FILES for p in (ROOT / path).glob(pattern))
    return [f"{path}/{name}" for name in names or ["config.json"]]  # a folder that is not there yet is missed by its config


def make_plan(study: Study) -> Plan:
    """Every artifact the study can make: all data and models, the caches its runs use, every model on every task."""
    plan = Plan(study)
    for name in study.datasets:
        plan.dataset(name)
    for name in study.mixes:
        plan.mix(name)
    models = [f"{kind}/{name}" for kind in ("base", "trained", "merged") for name in getattr(study.models, kind)]
    for model in models:
        plan.model(model)
        for task in study.tasks:
            plan.score(model, task)
    for name in study.tables:
        plan.table(name)
    return plan
