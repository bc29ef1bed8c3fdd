"""What a study's scale means: how its numbers are labelled, and what machine it expects."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """One value of a study's key ``scale``."""

    label: str | None  # stands above every table and report
    expects_gpu: bool  # the jobs that run a model are meant for GPUs
    devices: int  # GPUs, or without them cores, that an estimate counts with unless it is told


SCALES = {
    "paper": Scale(None, expects_gpu=True, devices=8),
    "small": Scale(
        "Small models: these numbers are not comparable with those of models of a paper's size.",
        expects_gpu=False,
        devices=1,
    ),
    "miniature": Scale(
        "Miniature models on generated tasks: these numbers check the pipeline and are not comparable with any "
        "paper's.",
        expects_gpu=False,
        devices=1,
    ),
}
