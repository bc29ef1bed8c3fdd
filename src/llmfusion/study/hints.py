"""What a study may well ask for, but a user should know of: hints, not mistakes."""

from collections.abc import Sequence

from llmfusion.study.schema.study import Study

RECOMMENDED_STEPS = 100


def hints(study: Study) -> list[str]:
    """A sentence for each hint on a study; none for most studies."""
    teachers: set[str] = set()
    trainings = []
    for name, run in study.models.trained.items():
        if run.fusion is not None and not run.fusion.projector_steps and (others := study.other_vocabularies(run)):
            teachers.update(others)
            trainings.append(f"trained/{name}")
    return [f"{', '.join(trainings)}: {untrained_projectors(sorted(teachers))}"] if trainings else []


def untrained_projectors(teachers: Sequence[str]) -> str:
    """The hint on a training with ``teachers`` of another vocabulary, whose projectors are not trained beforehand."""
    return (
        f"projectors of teachers with another vocabulary ({', '.join(teachers)}) start with random weights, "
        "and so the student's first targets are random. Recommended: train the projectors alone first, "
        f"fusion.projector_steps: {RECOMMENDED_STEPS} or more (docs/methods.md, other vocabularies)"
    )
