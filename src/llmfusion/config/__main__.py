"""``python -m llmfusion.config FILE [FILE ...]`` checks studies; ``--schema`` prints the JSON schema. Exit 2 on mistakes."""

import argparse
import json
import sys

from llmfusion.config.errors import StudyError
from llmfusion.config.models import Study
from llmfusion.config.workflow import checked


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llmfusion.config", description="Check studies: all mistakes at once, nothing is started.")
    parser.add_argument("studies", nargs="*", metavar="FILE", help="study files (config/*.yaml)")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of a study (config/schema.json)")
    given = parser.parse_args(arguments)
    if given.schema:
        print(json.dumps(Study.model_json_schema(), indent=1))
        return 0
    if not given.studies:
        parser.error("name a study file, e.g. config/mini.yaml")
    return max(_check(file) for file in given.studies)


def _check(file: str) -> int:
    try:
        study, plan = checked(file)
    except StudyError as error:
        print(error, file=sys.stderr)
        return 2
    counts = ", ".join(f"{len(getattr(study.models, kind))} {kind}" for kind in ("base", "trained", "merged"))
    print(f"{file}: {study.scale} study, {counts} models, {len(study.tasks)} tasks, {len(plan.artifacts)} artifacts: no mistakes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
