"""Print the JSON schema of a study, as `config/schema.json` holds it for editors."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(arguments: argparse.Namespace) -> int:
    """Print the schema."""
    from llmfusion.study.schema.study import Study

    print(json.dumps(Study.model_json_schema(), indent=1))
    return 0
