"""A model's folder, as far as anything is read of it: checked files, settings without what leads outside or runs code.

transformers finds files by name and follows what settings say: other files, code, kernels to download. So it never
sees the folder: it gets a private one with links to exactly the files that were checked, and settings from which
everything that is about loading or computing, and not about the model, has been taken out.
"""

import errno
import inspect
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmfusion.artifacts.store import Artifact
from llmfusion.errors import DamagedError, UserError
from llmfusion.io.files import SETTINGS_LIMIT, model_file, read_json_object, read_regular
from llmfusion.io.safetensors import INDEX, TensorInfo, read_headers, weight_files

DEEPEST = 32  # levels of lists and objects in settings
LARGEST = 2**53  # no number of a model's settings is larger
LAYERS = re.compile(r"(num|n)_(\w+_)?layers?")  # keys of counts: a layer has a tensor at least
COUNTS = ("vocab_size", "hidden_size", "n_embd", "num_attention_heads", "n_head", "max_position_embeddings")
MOST_ADDED_TOKENS = 20_000  # Gemma 3 has 6,415
MOST_GROWTH = 1000
MOST_LABELS = 100_000  # of a classifier; transformers makes a name for each
DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")
# keys of config.json about how a model is loaded and computed: files and code to read, kernels to download and run,
# layouts over devices
NOT_OF_THE_MODEL = re.compile(
    r"_*(attn|experts)_implementation(_\w+)?|auto_map|configuration_files|transformers_weights|fusion_config"
    r"|_*name_or_path|_commit_hash|base_model_\w+_plan|distributed_config|attribute_map|kernel_config|use_kernels"
    r"|custom_\w+|output_attentions|output_hidden_states|return_dict"
)
# keys of tokenizer_config.json that name files, code, or a tokenizer instead of tokenizer.json's
NOT_OF_THE_TOKENIZER = re.compile(
    r"\w*_files?|auto_map|init_inputs|name_or_path|tokenizer_object|vocab|merges|custom_\w+|is_local|local_files_only"
    r"|post_processor|tokenizer_(padding|truncation)|_\w+|trust_remote_code|\w+_kwargs|backend"
)
TOKENIZER_FILES = (  # that transformers may read besides tokenizer_config.json
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ModelFolder:
    """The files that a model's folder has: those of a verified manifest, or (None) the plain files in it."""

    folder: Path
    listed: frozenset[str] | None = None

    @classmethod
    def of(cls, model: Artifact | Path) -> "ModelFolder":
        """The folder of an artifact, or one that is being staged."""
        if isinstance(model, Artifact):
            return cls(model.folder, frozenset(model.manifest["files"]))
        return cls(model)

    def find(self, name: str) -> Path | None:
        """One of its files, None where it has none of this name. Raises :class:`DamagedError` for no plain file."""
        path = self.folder / name
        if self.listed is not None and name not in self.listed:
            if path.is_symlink() or path.exists():
                raise DamagedError(f"{path}: is not in {self.folder / 'manifest.json'}; move it away")
            return None
        if self.listed is None and not path.is_symlink() and not path.exists():
            return None
        return model_file(self.folder, name)

    def settings(self, name: str) -> dict[str, Any] | None:
        """A JSON file of settings; None where there is none. Raises :class:`DamagedError`."""
        path = self.find(name)
        if path is None:
            return None
        return read_json_object(path, SETTINGS_LIMIT)

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``, checked (:func:`check_config`) but otherwise as it is."""
        content = self.settings("config.json")
        if content is None:
            raise UserError(f"{self.folder}: has no config.json; take the whole folder of the model")
        _require_ordinary(content, self.folder / "config.json")
        check_config(content, self.folder / "config.json")
        return content

    @cached_property
    def weights(self) -> dict[str, TensorInfo]:
        """Headers of the weights that transformers would read: one file, else those of the index."""
        files = weight_files(self.folder)
        if not files:
            raise UserError(f"{self.folder}: has no .safetensors weights; pickled weights are never read")
        for file in files:
            self.find(file.name)
        return read_headers(files)


def _require_ordinary(content: Any, path: Path) -> None:
    """Raise :class:`DamagedError` for settings nested too deeply, or with numbers that no model has."""
    level = [content]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        numbers = (n for n in level if isinstance(n, int) and abs(n) > LARGEST)
        if (number := next(numbers, None)) is not None:
            raise DamagedError(f"{path}: holds the number {str(number)[:40]}, expected none over {LARGEST}")
        if not level:
            return
    raise DamagedError(f"{path}: is nested more than {DEEPEST} levels deep; fetch the file again")


def check_config(config: dict[str, Any], path: Path) -> None:
    """Raise :class:`DamagedError` for a ``config.json`` whose keys that count cannot be right."""
    if not isinstance(config.get("model_type", ""), str):
        raise DamagedError(f'{path}: model_type is {_shown(config["model_type"])}, expected a text, e.g. "llama"')
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        expected = 'expected a list with the name of a class of transformers, e.g. ["LlamaForCausalLM"]'
        raise DamagedError(f"{path}: architectures is {_shown(names)}, {expected}")
    for part in (config, text_config(config)):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) not in (None, *DTYPES):
                raise DamagedError(f"{path}: {key} is {_shown(part[key])}, expected one of {', '.join(DTYPES)}")
        for key in COUNTS:
            if key in part and part[key] is not None and (type(part[key]) is not int or part[key] < 1):
                raise DamagedError(f"{path}: {key} is {_shown(part[key])}, expected a whole number of 1 or more")
    if config.get("quantization_config") is not None:
        remedy = "take the weights it was made from"
        raise UserError(f"{path.parent}: its weights are quantised (config.json: quantization_config); {remedy}")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the language model, which some models have apart from those of other parts."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def check_layers(config: dict[str, Any], tensors: int, path: Path) -> None:
    """Raise :class:`DamagedError` where settings count more layers than the weights have tensors, or absurd labels.

    transformers makes lists of this length before it makes a model.
    """
    for part in (config, *(inner for inner in config.values() if isinstance(inner, dict))):
        for key, value in part.items():
            most = tensors if LAYERS.fullmatch(key) else MOST_LABELS if key == "num_labels" else None
            if most is None or value is None:
                continue
            if type(value) is not int or not 0 <= value <= most:
                has = f"; the weights have {tensors} tensors" if most == tensors else ""
                raise DamagedError(f"{path}: {key} is {_shown(value)}, expected a number from 0 to {most}{has}")


def _shown(value: Any) -> str:
    """A value for a message, not longer than a line can bear."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def clean_config(config: dict[str, Any], methods: Callable[[str], bool]) -> dict[str, Any]:
    """``config`` and its parts without keys that are not about the model, or for whose name ``methods`` is true."""
    return {
        key: clean_config(value, methods) if isinstance(value, dict) else value
        for key, value in config.items()
        if not (NOT_OF_THE_MODEL.fullmatch(key) or key.startswith("__") or methods(key))
    }


def is_method(config_class: Any) -> Callable[[str], bool]:
    """Whether a key has the name of something that every config of the class can do: as a value it would replace it."""

    def test(key: str) -> bool:
        found = inspect.getattr_static(config_class, key, None)
        return callable(found) or isinstance(found, (classmethod, staticmethod))

    return test


@contextmanager
def private_folder(files: Mapping[str, Path | dict[str, Any] | None]) -> Iterator[Path]:
    """A folder of our own that holds links to files, and JSON; what is None is left out."""
    with tempfile.TemporaryDirectory(prefix="llmfusion-") as name:
        folder = Path(name)
        for target, content in files.items():
            if isinstance(content, Path):
                (folder / target).symlink_to(content.resolve())
            elif content is not None:
                (folder / target).write_text(json.dumps(content))
        yield folder


def loadable_files(model: ModelFolder, config_class: Any) -> dict[str, Path | dict[str, Any] | None]:
    """What transformers may see of a model: weights with an index made from their headers, and cleaned settings."""
    weights = model.weights
    files = sorted({tensor.file for tensor in weights.values()})
    settings: dict[str, Any] = {
        "config.json": clean_config(model.config, is_method(config_class)),
        "generation_config.json": generation_settings(model),
    }
    if len(files) == 1:
        return {**settings, "model.safetensors": files[0]}
    weight_map = {name: tensor.file.name for name, tensor in weights.items()}
    links = {file.name: file for file in files}
    return {**settings, INDEX: {"metadata": {}, "weight_map": weight_map}, **links}


def generation_settings(model: ModelFolder) -> dict[str, Any] | None:
    """``generation_config.json`` without what names code; None where there is none.

    Raises :class:`DamagedError` for end tokens that are no token ids.
    """
    content = model.settings("generation_config.json")
    if content is None:
        return None
    ends = content.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [ends]
    if ends is not None and not all(type(token) is int and token >= 0 for token in listed):
        place = model.folder / "generation_config.json"
        raise DamagedError(f"{place}: eos_token_id is {_shown(ends)}, expected a token id or a list of them")
    return {key: value for key, value in content.items() if not NOT_OF_THE_MODEL.fullmatch(key)}


def tokenizer_files(model: ModelFolder) -> dict[str, Path | dict[str, Any] | None]:
    """What transformers may see of a model's tokenizer: its files, and settings without names of files and code."""
    files: dict[str, Path | dict[str, Any] | None] = {name: model.find(name) for name in TOKENIZER_FILES}
    for name, content in files.items():
        if isinstance(content, Path) and name.endswith(".json"):
            _check_tokenizer_file(content)
    if isinstance(template := files["chat_template.jinja"], Path):
        _require_utf8(template)
    settings = model.settings("tokenizer_config.json")
    if settings is not None:
        _check_tokenizer_settings(settings, model.folder / "tokenizer_config.json")
        # what is empty leads nowhere
        settings = {
            key: value for key, value in settings.items() if not (value and NOT_OF_THE_TOKENIZER.fullmatch(key))
        }
    config = None
    if files["tokenizer.json"] is None and model.find("config.json") is not None:
        config = clean_config(model.config, lambda key: False)  # names the tokenizer's class
    return {**files, "tokenizer_config.json": settings, "config.json": config}


def _check_tokenizer_file(path: Path) -> None:
    """Raise :class:`DamagedError` unless a JSON file of a tokenizer has the parts that everything else relies on."""
    content = read_json_object(path)
    if path.name != "tokenizer.json":
        return
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)):
        raise DamagedError(f"{path}: has no model with a vocabulary; take a complete tokenizer.json")
    vocabulary = model["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else []
    added = content.get("added_tokens") or []
    ids = [*ids, *(token.get("id") if isinstance(token, dict) else None for token in added)]
    if not all(type(number) is int and 0 <= number < 2**31 for number in ids):
        raise DamagedError(f"{path}: a token's id is no number from 0 to {2**31 - 1}; take a complete tokenizer.json")
    if not vocabulary:
        raise DamagedError(f"{path}: its vocabulary is empty; take a complete tokenizer.json")
    if model.get("dropout"):
        raise DamagedError(f"{path}: its dropout is {model['dropout']}: texts are cut at random; set it to null")
    _require_few_tokens(added, "added_tokens", path)
    _require_bounded_growth(content, path)


def _require_few_tokens(tokens: Any, key: str, path: Path) -> None:
    """Raise :class:`DamagedError` for more added tokens than any model has: each takes longer than the one before."""
    if isinstance(tokens, (list, dict)) and len(tokens) > MOST_ADDED_TOKENS:
        raise DamagedError(f"{path}: {key} has {len(tokens):,} tokens, expected at most {MOST_ADDED_TOKENS:,}")


def _require_bounded_growth(content: dict[str, Any], path: Path) -> None:
    """Raise :class:`DamagedError` for a tokenizer that makes far more of a text than there is.

    A replacement of every character by a hundred, six times over, is a line of JSON.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(content.get(part))) > MOST_GROWTH:
            raise DamagedError(
                f"{path}: {part} makes a text up to {growth:.0e} times as long; take the model's own file"
            )
    if (items := _count_items(content.get("post_processor"))) > MOST_GROWTH:
        raise DamagedError(f"{path}: post_processor adds {items:,} tokens to every text; take the model's own file")


def _growth(part: Any) -> float:
    """How many times as long a text can be behind a part of a tokenizer."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1
    pattern = part.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    added = max((len(part[key]) for key in ("content", "prepend") if isinstance(part.get(key), str)), default=0)
    own = max(1, added / len(replaced)) if isinstance(replaced, str) and replaced else 1 + added
    return own * math.prod(map(_growth, part.values()))


def _count_items(part: Any) -> int:
    """How many elements the lists in a part of a tokenizer have."""
    values = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    return (len(part) if isinstance(part, list) else 0) + sum(map(_count_items, values))


def _require_utf8(path: Path) -> None:
    try:
        read_regular(path, follow_links=True, limit=SETTINGS_LIMIT).decode()
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path}: is no text in UTF-8: {error.reason} at byte {error.start}") from None


def _check_tokenizer_settings(settings: dict[str, Any], path: Path) -> None:
    """Raise :class:`DamagedError` for a chat template or tokens of a type that no tokenizer has."""
    template = settings.get("chat_template")
    entries = template if isinstance(template, list) else [{"name": "default", "template": template or ""}]
    is_right = all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in entries
    )
    if not is_right:
        expected = "expected Jinja text, or a list of templates with a name each"
        raise DamagedError(f"{path}: chat_template is {_shown(template)}, {expected}")
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        _require_few_tokens(settings.get(key), key, path)
    for key, value in settings.items():
        if not re.fullmatch(r"(bos|eos|pad|unk|sep|cls|mask)_token", key) or value is None or isinstance(value, str):
            continue
        if not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise DamagedError(f"{path}: {key} is {_shown(value)}, expected a text")


@contextmanager
def explain_failure(folder: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a model into a :class:`UserError` of one sentence.

    Some of it is no ``Exception``: tokenizers and safetensors panic. A full disk and a wish to stop stay as they are.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _failure(folder, what, error) from error


def _failure(folder: Path, what: str, error: BaseException) -> UserError:
    """What a library's error means: no right to read, too little memory, or a file that is not what it should be."""
    if isinstance(error, OSError) and error.filename is not None:
        place = Path(str(error.filename))
        file = folder / place.name if place.parent.name.startswith("llmfusion-") else place
        return UserError(f"{file}: cannot be read: {error.strerror}; give yourself the right to read it")
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return UserError(f"{folder}: this machine has too little memory for the {what}; use a larger one")
    reason = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())[:400]
    text = f"the {what} cannot be loaded: {type(error).__name__}: {reason or 'no reason given'}"
    return UserError(f"{folder}: {text}; take a complete copy of a model that transformers knows")
