"""Options of a merge outside a study: one method's, checked as a study's would be."""

from typing import Any

import yaml
from pydantic import ValidationError

from llmfusion.errors import UserError, require
from llmfusion.study.errors import from_pydantic, nearest
from llmfusion.study.merge_methods import load_method, method_names
from llmfusion.study.schema.options import MergeOptions
from llmfusion.study.strict_yaml import load_text

ADDRESSES = ("method", "pivot", "parents")  # given otherwise outside a study


def options_of(method: str, own: dict[str, Any], models: int) -> MergeOptions:
    """Options of a method for so many models. Raises :class:`UserError` with all mistakes."""
    if method not in method_names():
        raise UserError(f"method: got {method!r} (str); {nearest(method, method_names())}")
    entry = {"method": method, "pivot": "base/pivot", "parents": [f"trained/{j}" for j in range(models)], **own}
    model: type[MergeOptions] = load_method(method).Options
    try:
        options = model.model_validate(entry)
    except ValidationError as error:
        problems = from_pydantic(error, entry, model.model_json_schema())
        raise UserError("\n  ".join(f"{'.'.join(map(str, p.key))}: {p.text}" for p in problems)) from None
    weight = own.get("weight")
    if isinstance(weight, list):
        require(len(weight) == models, f"weight: {len(weight)} values for {models} models; give one value, or one each")
    return options


def parse_options(method: str, words: list[str], models: int) -> MergeOptions:
    """Options from ``KEY=VALUE`` words. Raises :class:`UserError` with all mistakes."""
    return options_of(method, dict(_parse_word(word) for word in words), models)


def _parse_word(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    require(bool(equals), f"--set {word}: expected KEY=VALUE")
    require(
        key not in ADDRESSES,
        f"--set {word}: {key} is no option of the method; give --method, --pivot or --models",
    )
    try:
        return key, load_text(f"[{text}]" if "," in text else text)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError):  # the last two: PyYAML on "!!bool x"
        raise UserError(f"--set {word}: expected a number, a word or a list of numbers with commas between") from None
