"""The literal profile on a real SLURM: what jobs ask for and get, a second attempt, an array, and the same table."""

import time
from collections.abc import Callable

import pytest

from tests.project import snakemake
from tests.slurm import cluster as module
from tests.slurm.cluster import Cluster, NoSlurm, cluster, wait
from tests.slurm.conftest import STUDY, TARGET, OnSlurm


def test_the_cluster_is_up_within_five_seconds(slurm: Cluster) -> None:
    assert slurm.seconds < 5


def test_a_cluster_leaves_nothing_behind() -> None:
    with cluster(nodes=1) as passing:
        processes = dict(passing.processes)
        assert set(processes) == {"munged", "slurmctld", "node1"}
        assert passing.root.exists()
    assert all(process.poll() is not None for process in processes.values())
    assert not passing.root.exists()


def test_without_slurm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRAMS", ("slurmctld", "not-installed"))
    remedy = "sudo apt-get install --no-install-recommends slurmctld"
    with pytest.raises(NoSlurm, match=f"not-installed cannot be found: {remedy}"), cluster():
        pass


def test_the_slice_runs_through_the_profile_and_gives_the_local_table(on_slurm: Callable[..., OnSlurm]) -> None:
    run = on_slurm("slice")
    began = time.monotonic()
    main = run.start()
    wait(lambda: any(job["JobState"] == "RUNNING" for job in run.jobs("wildcards_sft")) or main.poll() is not None, 300)
    [first] = run.jobs("wildcards_sft")
    run.slurm.ask("scancel", first["JobId"])  # so that there is a second attempt
    run.finish(main)
    assert time.monotonic() - began < 360
    run.same_as_undisturbed()

    first, second = run.jobs("wildcards_sft")
    assert (first["JobState"], second["JobState"]) == ("CANCELLED", "COMPLETED")
    assert [(job["MinMemoryNode"], job["TimeLimit"]) for job in (first, second)] == [
        ("200000M", "1-00:00:00"),
        ("400000M", "2-00:00:00"),
    ]
    assert f"--minutes {2 * 1440} " in run.log("models/trained/sft")  # the trainer knows of the second attempt's time
    assert (first["TresPerJob"].strip(), run.provenance("models/trained/sft")["visible_devices"]) == ("gres:gpu:1", "0")

    [fused] = run.jobs("wildcards_kd-code")
    assert (fused["TresPerJob"].strip(), fused["NumNodes"]) == ("gres:gpu:2", "1")
    assert run.provenance("models/trained/kd-code")["visible_devices"] == "0,1"
    assert "2 processes share the samples of every step" in run.log("models/trained/kd-code")

    [merge] = run.jobs("rule_merge_models")
    assert "TresPerJob" not in merge
    assert run.provenance("models/merged/ta-homogeneous")["visible_devices"] is None
    assert merge["MinMemoryNode"] == "8000M"

    cells = run.jobs("rule_score")
    assert len(cells) == 2
    assert len({job["ArrayJobId"] for job in cells}) == 1
    assert all(job["JobState"] == "COMPLETED" for job in run.jobs() if job["JobId"] != first["JobId"])
    assert len(run.jobs()) == 7  # two trainings, one twice; merge, answers, two cells; the table is made here


def test_nothing_is_left_to_do_afterwards_and_without_slurm_a_plan_says_so(on_slurm: Callable[..., OnSlurm]) -> None:
    run = on_slurm("done", ())
    assert "Nothing to be done" in snakemake(run.folder, "--profile", "slurm", "-n", TARGET, *STUDY)
