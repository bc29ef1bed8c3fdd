"""The data sections of a study: where rows come from, how samples are drawn from them, and the tests."""

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from llmfusion.study.data_plugins import format_sentences, layouts, task_formats
from llmfusion.study.schema.base import (
    REPOSITORY,
    Address,
    Commit,
    FilePath,
    Licensed,
    Name,
    Positive,
    Section,
    Share,
    Shown,
    template_fields,
)

# Names of plug-ins: one file each in llmfusion/data/layouts and llmfusion/evaluation/tasks.
if TYPE_CHECKING:
    Layout: TypeAlias = str
    TaskFormatName: TypeAlias = str
else:
    Layout = Literal[tuple(layouts("sample"))] | Literal[tuple(layouts("item"))]
    TaskFormatName = Literal[tuple(task_formats())]

ITEM_FIELDS = (*dict.fromkeys(field for layout in layouts("item").values() for field in layout.fields), "item")
_NEED_COLUMNS = ", ".join(name for name, layout in layouts("sample").items() if layout.needs_columns)
_COLUMNS = f"for layout {_NEED_COLUMNS}: the columns that hold prompt and response"


# ---------------------------------------------------------------------------------------------- where rows come from


class Columns(Section):
    prompt: str = Field(description="column with what the user says")
    response: str = Field(description="column with what the model should answer")


def _inside_repository(pattern: str) -> str:
    """A file of the repository, or a pattern of some: whoever resolves it must not be led out of the repository."""
    parts = pattern.split("/")
    if "" in parts or ".." in parts or "." in parts or any(text in pattern for text in (":", "\\", "~")):
        raise ValueError(
            f"got {pattern[:60]!r}; expected a file of the repository, relative to its top, such as "
            "data/train.parquet; * stands for any characters but /, ** for any"
        )
    return pattern


def _is_dataset(repo: str) -> str:
    if repo.startswith("buckets/"):
        raise ValueError(f"got {repo!r}: a bucket has no commits that a study could name")
    return repo


FilePattern = Annotated[FilePath, AfterValidator(_inside_repository)]
SPLIT = r"^[A-Za-z0-9_.]+(\[[0-9%:-]*\])?(\+[A-Za-z0-9_.]+(\[[0-9%:-]*\])?)*$"


class HubSource(Licensed):
    kind: Literal["hub"] = Field(description="a dataset repository on the Hugging Face hub")
    repo: Annotated[str, Field(pattern=REPOSITORY), AfterValidator(_is_dataset)] = Field(
        description="repository id, e.g. meta-math/MetaMathQA"
    )
    revision: Commit = Field(
        description="the repository's commit, 40 hex digits: the data cannot change under the study"
    )
    split: str = Field(
        "train",
        pattern=SPLIT,
        description="split to read; a part of one: `train[:10%]`; several: `train+test`. Only its files are downloaded",
    )
    subset: str | list[str] | None = Field(
        None,
        description="the repository's configuration (subset), if it has several; a list reads them one after another",
    )
    files: FilePattern | list[FilePattern] | None = Field(
        None,
        description="download and read only these data files of the repository: a path or a pattern "
        "(`data/train_1M-*.parquet`), or a list of them. Default: those that the repository gives for the split",
    )
    layout: Layout = Field(description="how its columns become samples or items (docs/extending.md)")
    columns: Columns | None = Field(None, description=_COLUMNS)

    @property
    def split_names(self) -> list[str]:
        """The splits that ``split`` names, without the parts of them that are read."""
        return list(dict.fromkeys(part.partition("[")[0] for part in self.split.split("+")))

    @model_validator(mode="after")
    def _files_of_one_split(self) -> "HubSource":
        if self.files is not None and len(self.split_names) > 1:
            raise ValueError(f"files are those of one split, {self.split!r} names {len(self.split_names)}")
        return self


class PathSource(Licensed):
    kind: Literal["path"] = Field(description="a .jsonl or .parquet file of your own")
    path: FilePath = Field(description="the file, relative to the repository root, or absolute")
    layout: Layout = Field(description="how its columns become samples or items (docs/extending.md)")
    columns: Columns | None = Field(None, description=_COLUMNS)


class GeneratedSource(Section):
    kind: Literal["generated"] = Field(
        description="made by this package: the miniature study's own texts and questions"
    )
    generator: Literal["animals", "sums", "steps", "stories", "code"] = Field(description="which little world")
    form: Literal["text", "chat", "test"] = Field(
        description="raw text, question and answer, or held-out test items (disjoint from the other two by content)"
    )
    rows: Positive = Field(description="how many rows to draw; tests are drawn without repetition")
    seed: int = Field(42, description="seed of the draws")
    wrong: Share = Field(0.0, description="share of answers replaced by wrong ones (label noise); chat only")


class Domain(Section):
    domain: Name = Field(description="what it teaches (general, math, code, ...): counted in the mix's manifest")


class Conversations(Domain):
    split_characters: Positive | None = Field(
        None,
        description="cut conversations longer than this between turns into several samples (FuseChat's blocks); "
        "default: never",
    )


class HubDataset(HubSource, Conversations):
    """Samples from the hub."""


class PathDataset(PathSource, Conversations):
    """Samples from a file of your own."""


class GeneratedDataset(GeneratedSource, Domain):
    """Samples made by this package."""


Dataset = Annotated[HubDataset | PathDataset | GeneratedDataset, Field(discriminator="kind")]
Source = Annotated[HubSource | PathSource | GeneratedSource, Field(discriminator="kind")]


class UpTo(Section):
    """As many samples as there are, and no more than this."""

    up_to: Positive = Field(description="number of samples that is not exceeded; how many there were, the mix tells")


def _count_tag(count: object) -> str:
    return "mapping" if isinstance(count, (dict, UpTo)) else "number"


SampleCount = Annotated[
    Annotated[Positive, Tag("number")] | Annotated[UpTo, Tag("mapping")],
    Discriminator(_count_tag),
]


def most_samples(count: int | UpTo) -> int:
    """How many samples a mix draws from a dataset at most."""
    return count.up_to if isinstance(count, UpTo) else count


# ISO 639-1 codes of the languages that llmfusion.data.language tells apart
_CODES = (
    "af am an ar as az ba be bg bn br bs ca cs cy da de dz el en eo es et eu fa fi fo fr fy ga gd gl gu "
    "ha he hi hr ht hu hy id ig is it ja jv ka kk km kn ko ku ky la lb lg ln lo lt lv mg mk ml mn mr ms "
    "mt my ne nl nn no oc om or pa pl ps pt qu ro ru rw sa se si sk sl sn so sq sr st sv sw ta te tg th "
    "tk tl tr tt ug uk ur uz vi vo wa xh yo zh zu"
)
LANGUAGES = tuple(_CODES.split())


def _language(code: str) -> str:
    if code not in LANGUAGES:
        raise ValueError(f"got {code[:60]!r}; expected ISO 639-1 codes such as en; there are: {', '.join(LANGUAGES)}")
    return code


Language = Annotated[str, AfterValidator(_language)]
ENGLISH = (
    "is replaced: write languages: [en] for texts in English, and min_ascii: 0.9 for the share of ASCII characters"
)


class Mix(Section):
    model_config = ConfigDict(json_schema_extra={"x-replaced": {"english": ENGLISH}})

    datasets: dict[Name, SampleCount] = Field(
        min_length=1,
        description="dataset: number of samples drawn from it without replacement, all of which must be there, "
        "or `{up_to: NUMBER}`: as many as there are, at most so many",
    )
    max_length: Positive = Field(
        description="longest sample in tokens, prompt and response; longer ones are dropped and counted"
    )
    tokenizers: list[Address] = Field(
        [],
        description="models in whose tokenizer and chat template every sample must fit max_length "
        "(the pivot and all teachers)",
    )
    languages: list[Language] = Field(
        [],
        description="keep samples in these languages (ISO 639-1 codes, e.g. `[en]`), told by their prose: code, LaTeX "
        "and texts too short to tell are kept; default: all",
    )
    min_ascii: Share = Field(0.0, description="smallest share of ASCII characters in a sample; 0 keeps all")
    against: list[Name] = Field(
        [],
        description="task sets to compare with: "
        "the manifest reports samples sharing a 13-gram or an 8-gram with a test",
    )
    decontaminate: Literal["report", "remove"] = Field(
        "report", description="remove: also drop samples that share a 13-gram with a test"
    )
    seed: int = Field(42, description="seed of the draws and of the order")


class TaskPrompt(Section):
    """How a task is asked and graded; what a job that asks it needs to know."""

    limit: Positive | None = Field(
        None,
        description="ask only so many items, spread evenly over the test (all its subjects); tables say so. "
        "Default: all items",
    )
    shots: int = Field(0, ge=0, description="number of few-shot examples, the first of each subject")
    format: TaskFormatName = Field(description=f"how it is asked and graded; {format_sentences()}")
    prompt: str | None = Field(
        None, description="Jinja text of the question with the item's fields; the format has a default"
    )
    max_new_tokens: Positive = Field(256, description="longest generated answer in tokens")

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, text: str | None) -> str | None:
        example = {field: ["a"] if field == "choices" else "a" for field in ITEM_FIELDS}
        unknown = sorted(template_fields(text or "", "prompt", **example) - set(ITEM_FIELDS))
        if unknown:
            raise ValueError(
                f"reads {', '.join(unknown)}; items have: {', '.join(ITEM_FIELDS)} (by layout, docs/extending.md)"
            )
        return text


class Task(TaskPrompt):
    items: Source = Field(description="where the test items come from")
    shots_from: Source | None = Field(None, description="where few-shot examples come from; needed if shots > 0")
    label: Shown = Field(description="column header in the table")


def outside_files(source: HubSource | PathSource | GeneratedSource | None) -> list[str]:
    """Files outside the study that a dataset or a task's items are read from."""
    return [source.path] if isinstance(source, PathSource) else []
