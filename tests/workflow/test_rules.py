"""Rules, steps and kinds have the same names, and a rule asks for its artifact at its kind's address."""

import re
from pathlib import Path

import pytest

from llmfusion.study.addresses import address_of, manifest_of, output_of
from llmfusion.study.graph import build_graph
from llmfusion.study.kinds import Kind, all_kinds
from llmfusion.study.load import read_study
from tests.project import ROOT

STUDIES = sorted([*(ROOT / "config").glob("*.yaml"), *(ROOT / "config/examples").glob("*.yaml")])
TEXT = "\n".join(file.read_text() for file in [ROOT / "Snakefile", *sorted((ROOT / "rules").glob("*.smk"))])
RULES = {block.split(":")[0]: block for block in re.split(r"^rule ", TEXT, flags=re.MULTILINE)[1:]}
STAGES = {name for name in RULES if f'study.stages["{name}"],\n' in RULES[name] and "output:" not in RULES[name]}
COSTS = {"cost", "cost_of_all"}
NAMES = sorted(set(RULES) - STAGES - COSTS)  # what tables took is no artifact: it differs from run to run


def lookups(rule: str, method: str) -> list[str]:
    """Addresses that a rule hands to a method of the study."""
    return re.findall(rf'study\.{method}\("([^"]+)"\)', RULES[rule])


def section(rule: str, name: str) -> list[str]:
    """The strings in one section of a rule."""
    body = re.search(rf"^    {name}:\n((?:        .*\n)+)", RULES[rule], re.MULTILINE)
    return re.findall(r'"([^"]+)"', body[1]) if body else []


def test_rules_steps_and_kinds_have_the_same_names() -> None:
    kinds = {path.stem for path in (ROOT / "src/llmfusion/study/kinds").glob("[a-z]*.py")}
    steps = {path.stem for path in (ROOT / "src/llmfusion/steps").glob("[a-z]*.py")}
    assert NAMES == sorted(all_kinds()) == sorted(kinds) == sorted(steps)
    assert {kind.stage for kind in all_kinds().values()} - {None} == STAGES


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_uses_its_kinds_own_address(name: str) -> None:
    kind = all_kinds()[name]
    assert lookups(name, "inputs") == [kind.address]
    assert lookups(name, "spec") == [kind.address]
    assert lookups(name, "gpus") == ([kind.address] if kind.gpus is not Kind.gpus else [])
    output = output_of(kind.address)
    assert section(name, "output")[0] == output
    assert str(manifest_of(Path(output))) in section(name, "output")
    assert section(name, "log") == [f"logs/{kind.address}.log"]
    assert "benchmark" not in RULES[name]  # Snakemake writes one for a job that only waited, too


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_calls_its_step_and_a_training_gets_its_time_limit(name: str) -> None:
    [shell] = [line for line in section(name, "shell") if "step" in line]
    minutes = "--minutes {resources.runtime} " if name in ("stage_base", "train_model") else ""
    [output] = re.findall(r"--out \{output\.(\w+):q\}", shell)
    made = f"--spec - --out {{output.{output}:q}} --log {{log:q}} --inputs {{input:q}} <<< {{params.spec:q}}"
    assert shell == f"python -m llmfusion step {name} {minutes}{made}"


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_that_is_submitted_asks_for_memory_and_time_by_its_kinds_address(name: str) -> None:
    kind = all_kinds()[name]
    expected = [] if kind.is_local else [kind.address]
    assert (lookups(name, "memory_mb"), lookups(name, "minutes")) == (expected, expected)


def test_only_rules_of_local_kinds_are_local() -> None:
    local = re.search(r"^localrules:\n((?:    .*\n)+)", TEXT, re.MULTILINE)
    assert local is not None
    names = {name for name, kind in all_kinds().items() if kind.is_local}
    assert set(re.findall(r"\w+", local[1])) == {*names, *COSTS}


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.name)
def test_every_address_of_a_study_is_of_one_kind_and_found_again_from_its_output(file: Path) -> None:
    addresses = build_graph(read_study(file)).artifacts
    assert len(addresses) > 10
    for address in addresses:
        assert sum(bool(kind.pattern.fullmatch(address)) for kind in all_kinds().values()) == 1, address
        assert address_of(output_of(address)) == address
        assert address_of(manifest_of(Path(output_of(address)))) == address
