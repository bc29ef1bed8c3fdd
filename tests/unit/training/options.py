"""Options of the trainings in these tests, as a study's entry would give them."""

from typing import Any

from llmfusion.study.schema.training import TrainedModel


def run_of(**options: Any) -> TrainedModel:
    """A training from ``base/pivot`` on the mix ``m`` with these options."""
    return TrainedModel.model_validate({"init": "base/pivot", "mix": "m", "lr": 1e-2, **options})
