"""Addresses and the files they stand for."""

from pathlib import Path

import pytest

from llmfusion.errors import UserError
from llmfusion.study.addresses import address_of, is_shard, manifest_of, output_of, results_index, whole_of

PLACES = [
    ("models/base/p", "results/models/base/p/manifest.json"),
    ("data/generated/base/code/mix", "results/data/generated/base/code/mix/manifest.json"),
    ("scores/merged/m/gsm8k", "results/scores/merged/m/gsm8k.json"),
    ("tables/table2", "results/table2.csv"),
]


@pytest.mark.parametrize(("address", "path"), PLACES)
def test_addresses_have_one_place_on_disk(address: str, path: str) -> None:
    assert output_of(address) == path
    assert address_of(path) == address
    assert address_of(Path("/studies/results/mine") / path) == address


@pytest.mark.parametrize(
    "path", ["results/manifest.json", "results/models/manifest.json", "a/b/manifest.json", "results"]
)
def test_what_is_no_artifact_of_a_study_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="lies in no results/ folder of a study"):
        results_index(path)


def test_a_table_has_its_manifest_beside_it() -> None:
    assert manifest_of(Path("results/table2.csv")) == Path("results/table2.json")
    assert manifest_of(Path("results/models/base/p/manifest.json")) == Path("results/models/base/p/manifest.json")


def test_a_shard_names_what_it_is_a_part_of() -> None:
    assert whole_of("teachers/shards/base/p/mix/1-of-4") == "teachers/base/p/mix"
    assert is_shard("teachers/shards/base/p/mix/1-of-4")


@pytest.mark.parametrize(
    "address",
    [
        "teachers/base/shards/mix",
        "answers/base/shards/all",
        "scores/base/shards/mmlu",
        "tables/shards",
        "models/base/shards",
    ],
)
def test_a_model_or_table_named_shards_is_none(address: str) -> None:
    assert not is_shard(address)
    assert whole_of(address) == address
