"""Declarations of kinds: what a faulty one lacks is reported at loading, and a new one needs no other file."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmfusion import ROOT
from llmfusion.study import kinds
from llmfusion.study.addresses import output_of
from llmfusion.study.graph import build_graph
from llmfusion.study.kinds import Cost, Kind, all_kinds, gpus_of, kind_of, parse_spec
from llmfusion.study.plugins import PluginError
from llmfusion.study.workload import Assumptions, Workload
from tests.unit.mini_study import small, small_study

SCORE = all_kinds()["score"]


def load(monkeypatch: pytest.MonkeyPatch, **declared: Any) -> dict[str, Kind]:
    """Load these declarations as if they were all plug-ins there are."""
    modules = {name: SimpleNamespace(KIND=kind, __file__=f"/kinds/{name}.py") for name, kind in declared.items()}
    monkeypatch.setattr(kinds, "load_plugins", lambda package, required: modules)
    return kinds.all_kinds.__wrapped__()


def without_arguments() -> Any:
    return None


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        (5, "expected a Kind, got int"),
        (replace(SCORE, spec=dict), "spec: expected a subclass of StepSpec"),
        (replace(SCORE, declare=without_arguments), "declare: is called with (graph, model, task): "),
        (
            replace(SCORE, cost=lambda workload, spec: None),
            "cost: is called with (workload, spec, shards, model, task): ",
        ),
        (replace(SCORE, rates={}), "rates: none are declared"),
        (replace(SCORE, address="scores"), "address 'scores': give at least two parts"),
        (replace(SCORE, address="other/results/{model}/{task}"), "address 'other/results/{model}/{task}': its file"),
    ],
)
def test_what_a_declaration_lacks_is_named_with_its_file(
    monkeypatch: pytest.MonkeyPatch, kind: Any, mistake: str
) -> None:
    with pytest.raises(PluginError) as caught:
        load(monkeypatch, score=kind)
    assert str(caught.value).startswith("/kinds/score.py: KIND: ")
    assert mistake in str(caught.value)


def test_a_kind_without_a_step_of_its_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match=re.escape("there is no step llmfusion/steps/socre.py")):
        load(monkeypatch, socre=SCORE)


def test_addresses_rates_and_sections_belong_to_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(SCORE, section=("ensembles", dict, "some"))
    other = replace(own, rates={"score": lambda assumed: (1.0, 1.0, 1.0)})
    with pytest.raises(PluginError) as caught:
        load(monkeypatch, answer=own, score=other)
    assert "address 'scores/{model}/{task}' is also an address of answer" in str(caught.value)
    assert "rates 'score': answer declares other rates of this name" in str(caught.value)
    assert "section 'ensembles' is declared by answer already" in str(caught.value)


def test_every_kind_has_a_step_and_its_addresses_are_its_own() -> None:
    assert set(all_kinds()) == {path.stem for path in (ROOT / "src/llmfusion/steps").glob("[a-z]*.py")}
    for address, artifact in build_graph(small_study()).artifacts.items():
        matching = [kind for kind in all_kinds().values() if kind.pattern.fullmatch(address)]
        assert matching == [kind_of(address)]
        assert parse_spec(address, artifact.spec).recipe == kind_of(address).recipe


def test_an_address_of_no_kind_is_no_source() -> None:
    assert not kinds.is_source("reports/of/something")
    assert kinds.is_source("models/base/pivot")
    with pytest.raises(KeyError):
        kind_of("reports/of/something")


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        (lambda *_, **__: Cost("scorre", (1.0, 1.0), 0), "its kind has no rates 'scorre'; did you mean 'score'?"),
        (lambda *_, **__: Cost("score", (1.0,), 0), "the start and 1 amounts of work for 3 coefficients of 'score'"),
    ],
)
def test_costs_must_fit_their_rates(monkeypatch: pytest.MonkeyPatch, cost: Callable[..., Cost], message: str) -> None:
    study = small_study()
    graph = build_graph(study)
    faulty = replace(SCORE, cost=cost)
    monkeypatch.setattr(
        "llmfusion.study.workload.kind_of",
        lambda address: faulty if address.startswith("scores/") else kind_of(address),
    )
    with pytest.raises(PluginError, match=re.escape(message)):
        Workload(study, graph, Assumptions())


SHARD = {"shard": [1, 2]}
CAPTURE = {"model": "base/p", "mix": "m", "capture": {}}
RUN = {"init": "base/p", "mix": "m", "steps": 1, "lr": 0.1}
SCRATCH = {"kind": "scratch", "mix": "m", "steps": 1, "lr": 0.1, "batch_size": 2, "init": "base/p"}
HUB = {"kind": "hub", "repo": "a/b", "revision": "0" * 40, "vocabulary": "x", "license": "mit"}
GPUS = [
    ("models/trained/m", {"step": "train", "run": RUN}, 0, 1),
    ("models/trained/m", {"step": "train", "run": {**RUN, "processes": 8}}, 0, 8),
    ("models/base/p", {"step": "base", "base": HUB}, 0, 0),
    ("models/base/p", {"step": "base", "base": {**SCRATCH, "processes": 2}}, 0, 2),
    ("teachers/base/p/m", {"step": "capture", **CAPTURE}, 0, 1),
    ("teachers/base/p/m", {"step": "capture", **CAPTURE}, 2, 0),
    ("teachers/shards/base/p/m/1-of-2", {"step": "capture", **CAPTURE, **SHARD}, 0, 1),
    ("data/generated/base/p/m", {"step": "generate", "model": "base/p", "mix": "m", "generation": {}}, 0, 1),
    ("answers/base/p/all", {"step": "answer", "model": "base/p", "tasks": {}, "answering": {}}, 0, 1),
    ("models/merged/m", {"step": "merge", "merge": {"method": "sce", "pivot": "base/p", "parents": ["base/q"]}}, 0, 0),
    (
        "scores/base/p/t",
        {"step": "score", "model": "base/p", "task": "t", "format": "letter", "batch": "all", "scale": "paper"},
        0,
        0,
    ),
]


@pytest.mark.parametrize(("address", "spec", "shards", "gpus"), GPUS)
def test_a_spec_says_how_many_gpus_its_job_asks_for(address: str, spec: dict[str, Any], shards: int, gpus: int) -> None:
    assert gpus_of(address, json.dumps({"recipe": 1, **spec}), shards) == gpus


PLUGIN = '''"""Averages of the answers of several models."""

from typing import Annotated, Literal

from pydantic import Field

from llmfusion.study.errors import Problem
from llmfusion.study.kinds import Cost, Declaration, Kind, StepSpec
from llmfusion.study.schema.base import Address, Section, dump


class Vote(Section):
    mode: Literal["vote"]
    members: list[Address]
    ties: Literal["first", "none"] = "first"


class Mean(Section):
    mode: Literal["mean"]
    members: list[Address]


class Spec(StepSpec):
    ensemble: Annotated[Vote | Mean, Field(discriminator="mode")]


def declare(graph, ensemble):
    entry = graph.study.ensembles[ensemble]
    return Declaration({"ensemble": dump(entry)}, [f"models/{model}" for model in entry.members])


def cost(workload, spec, shards, ensemble):
    return Cost("ensemble", (1.0,), 10.0)


def problems(declared):
    for key, entry in declared.entries("ensembles"):
        yield from declared.addresses((*key, "members"), entry.members)


KIND = Kind(
    step="ensemble",
    recipe=1,
    address="ensembles/{ensemble}",
    stage="ensembles",
    report_stage="ensembles",
    spec=Spec,
    declare=declare,
    cost=cost,
    rates={"ensemble": lambda assumed: (assumed.light_start, 1.0)},
    wanted=lambda study: (f"ensembles/{name}" for name in study.ensembles),
    problems=problems,
    section=("ensembles", Annotated[Vote | Mean, Field(discriminator="mode")], "models that answer together"),
)
'''
COMMAND = """
import sys
import llmfusion.steps, llmfusion.study.kinds
llmfusion.steps.__path__.append(sys.argv[1] + "/steps")
llmfusion.study.kinds.__path__.append(sys.argv[1] + "/kinds")
from llmfusion.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def extended(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command of ``llmfusion`` where a new kind has been added: a declaration and a step."""
    for folder, text in (
        ("kinds", PLUGIN),
        ("steps", '"""Ensembles."""\n\n\ndef build(job):\n    job.facts["n"] = 1\n'),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ensemble.py").write_text(text)

    def run(command: str, ensembles: object, *words: str) -> subprocess.CompletedProcess[str]:
        data = small() | {"directory": str(tmp_path / "run")}
        if ensembles is not None:
            data["ensembles"] = ensembles
        (tmp_path / "study.yaml").write_text(json.dumps(data))
        call = [sys.executable, "-c", COMMAND, str(tmp_path), command, str(tmp_path / "study.yaml"), *words]
        return subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)

    return run


def test_a_kind_that_is_added_has_its_section_its_artifacts_and_its_line_of_the_estimate(
    extended: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    def artifacts(done: subprocess.CompletedProcess[str]) -> int:
        assert done.returncode == 0, done.stderr
        return int(re.search(r"(\d+) artifacts", done.stdout).group(1))  # type: ignore[union-attr]

    without = artifacts(extended("check", None))
    entries = {
        "all": {"mode": "vote", "members": ["trained/sft", "base/code"]},
        "two": {"mode": "mean", "members": ["base/code"]},
    }
    assert artifacts(extended("check", entries)) == without + 2
    lines = extended("estimate", entries, "ensembles").stdout.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("ensembles")] == [["ensembles", "2", "0"]]


@pytest.mark.parametrize(
    ("key", "entry", "message"),
    [
        ("ensembels", {}, "ensembels: unknown key; did you mean 'ensembles'?"),
        (
            "ensembles",
            {"a": {"mode": "vote", "membres": []}},
            "ensembles.a.membres: unknown key; did you mean 'members'?",
        ),
        ("ensembles", {"a": {"mode": "vote"}}, "ensembles.a.members: is missing"),
        (
            "ensembles",
            {"a": {"mode": "voet", "members": []}},
            "ensembles.a.mode: got 'voet' (str); did you mean 'vote'?",
        ),
        ("ensembles", {"a": {"members": []}}, "ensembles.a.mode: is missing"),
        ("ensembles", {"a": 5}, "ensembles.a: got 5 (int); expected a mapping of keys"),
        ("ensembles", {"A": {"mode": "vote", "members": []}}, "ensembles.A: a name is made of lower-case letters"),
        (
            "ensembles",
            {"a": {"mode": "mean", "members": ["base/coda"]}},
            "ensembles.a.members[0]: there is no model 'base/coda'; did you mean 'base/code'?",
        ),
        (
            "ensembles",
            {"vote": {"mode": "vote", "members": [], "ties": "last"}},
            "ensembles.vote.ties: got 'last' (str); allowed: 'first' or 'none'",
        ),
    ],
)
def test_mistakes_in_a_section_that_a_kind_added_are_reported_like_all_others(
    extended: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, key: str, entry: object, message: str
) -> None:
    data = small() | {key: entry}
    extended("check", None)
    (tmp_path / "other.yaml").write_text(json.dumps(data))
    call = [sys.executable, "-c", COMMAND, str(tmp_path), "check", str(tmp_path / "other.yaml")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("key", ["tasks", "model_entry", "not a name", "model_config"])
def test_a_section_whose_name_is_taken_is_refused_in_one_line(
    extended: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, key: str
) -> None:
    file = tmp_path / "kinds/ensemble.py"
    file.write_text(file.read_text().replace('section=("ensembles"', f'section=("{key}"'))
    done = extended("check", None)
    assert done.returncode == 1
    assert done.stderr == f"error: kind ensemble: section '{key}' is taken, or no name of a section; take another\n"


def test_a_step_that_is_added_can_be_called(
    extended: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    spec = json.dumps({"step": "ensemble", "recipe": 1, "ensemble": {"mode": "vote", "members": []}})
    words = ["step", "ensemble", "--spec", spec, "--out", output_of("ensembles/all")]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, str(tmp_path), *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / output_of("ensembles/all")).read_text())
    assert (manifest["address"], manifest["facts"]) == ("ensembles/all", {"n": 1})
