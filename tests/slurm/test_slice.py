"""The literal profile on a real SLURM: what jobs ask for and get, a second attempt, an array, and the same table."""

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
    main = run.start()
    wait(lambda: any(job["JobState"] == "RUNNING" for job in run.jobs("wildcards_sft")) or main.poll() is not None, 300)
    [first] = run.jobs("wildcards_sft")
    run.slurm.ask("scancel", first["JobId"])  # so that there is a second attempt
    run.finish(main)
    run.same_as_undisturbed()

    first, second = run.jobs("wildcards_sft")
    assert (first["JobState"], second["JobState"]) == ("CANCELLED", "COMPLETED")
    assert [(job["MinMemoryNode"], job["TimeLimit"]) for job in (first, second)] == [
        ("5000M", "01:00:00"),
        ("10000M", "01:00:00"),  # a training resumes: no more time
    ]
    assert "--minutes 60 " in run.log("models/trained/sft")
    assert (first["TresPerJob"].strip(), run.provenance("models/trained/sft")["visible_devices"]) == ("gres:gpu:1", "0")

    [fused] = run.jobs("wildcards_kd-code")
    assert (fused["TresPerJob"].strip(), fused["NumNodes"]) == ("gres:gpu:2", "1")
    assert run.provenance("models/trained/kd-code")["visible_devices"] == "0,1"
    assert "2 processes share the samples of every step" in run.log("models/trained/kd-code")

    [merge] = run.jobs("rule_merge_models")
    assert "TresPerJob" not in merge
    assert run.provenance("models/merged/ta-homogeneous")["visible_devices"] is None
    assert merge["MinMemoryNode"] == "5000M"

    cells = run.jobs("rule_score")
    assert len(cells) == 2
    assert all(job["JobState"] == "COMPLETED" for job in run.jobs() if job["JobId"] != first["JobId"])
    assert len(run.jobs()) == 7  # two trainings, one twice; merge, answers, two cells; the table is made here


def test_nothing_is_left_to_do_afterwards_and_without_slurm_a_plan_says_so(on_slurm: Callable[..., OnSlurm]) -> None:
    run = on_slurm("done", ())
    assert "Nothing to be done" in snakemake(run.folder, "--profile", "slurm", "-n", TARGET, *STUDY)


def test_a_forced_job_that_slurm_refuses_loses_nothing(on_slurm: Callable[..., OnSlurm]) -> None:
    run = on_slurm("refused", (), "results/models/trained/sft/manifest.json")
    folder = run.folder / "runs/slice/results/models/trained/sft"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    main = run.start("-f", "--default-resources", "slurm_partition=nowhere", "mem_mb=1000", "runtime=10")
    assert main.wait(300) == 1
    assert "SLURM sbatch failed" in run.output()
    assert run.jobs() == []
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before
    again = snakemake(run.folder, "--profile", "slurm", "-n", TARGET, *STUDY)
    assert "Nothing to be done" in again


def test_a_forced_job_that_fails_on_its_node_loses_nothing_and_its_log_is_printed(
    on_slurm: Callable[..., OnSlurm],
) -> None:
    run = on_slurm("failing", (), "results/models/merged/ta-homogeneous/manifest.json")
    step = run.folder / "src/llmfusion/steps/merge_models.py"
    text = step.read_text()
    step.write_text(
        text.replace(
            "def build(job: Job) -> None:\n", 'def build(job: Job) -> None:\n    raise ValueError("on purpose")\n'
        )
    )
    folder = run.folder / "runs/slice/results/models/merged/ta-homogeneous"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    main = run.start("-f", "--retries", "0")
    assert main.wait(300) == 1
    assert "ValueError: on purpose" in run.output().split("Logfile logs/models/merged/ta-homogeneous.log:")[1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    step.write_text("import nothing_of_this_name\n" + text)
    main = run.start("-f", "--retries", "0")
    assert main.wait(300) == 1
    assert "No module named 'nothing_of_this_name'" in run.output()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    step.write_text(text)
    assert "Nothing to be done" in snakemake(run.folder, "--profile", "slurm", "-n", TARGET, *STUDY)


def test_no_name_of_a_file_is_read_by_a_shell(on_slurm: Callable[..., OnSlurm]) -> None:
    """Such a study is refused; and where it were not, the command would reach the job as it is."""
    run = on_slurm("names", (), "results/models/merged/ta-homogeneous/manifest.json")
    name = "config/$(touch pwned).yaml"
    (run.folder / "config/slice.yaml").rename(run.folder / name)
    run.study = (f"--configfile={name}",)
    main = run.start("-f")
    assert main.wait(60) == 1
    assert "the study's file: " in run.output()
    check = run.folder / "src/llmfusion/study/snakemake.py"
    check.write_text(check.read_text().replace("    _refuse_shell_names(files[0])\n", ""))
    run.finish(run.start("-f"))
    assert [job["JobState"] for job in run.jobs()] == ["COMPLETED"]
    assert list(run.folder.rglob("pwned*")) == []
