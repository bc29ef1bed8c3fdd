"""The data sections of a study: where rows come from, how samples are drawn from them, and the tests."""

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field, field_validator

from llmfusion.study.data_plugins import format_sentences, layouts, task_formats
from llmfusion.study.schema.base import Address, Commit, Licensed, Name, Positive, Section, Share, template_fields

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


class HubSource(Licensed):
    kind: Literal["hub"] = Field(description="a dataset repository on the Hugging Face hub")
    repo: str = Field(pattern=r"^[^/\s]+/[^/\s]+$", description="repository id, e.g. meta-math/MetaMathQA")
    revision: Commit = Field(
        description="the repository's commit, 40 hex digits: the data cannot change under the study"
    )
    split: str = Field("train", description="split to read")
    subset: str | list[str] | None = Field(
        None,
        description="the repository's configuration (subset), if it has several; a list reads them one after another",
    )
    files: str | None = Field(None, description="read only this data file of the repository")
    layout: Layout = Field(description="how its columns become samples or items (docs/extending.md)")
    columns: Columns | None = Field(None, description=_COLUMNS)


class PathSource(Licensed):
    kind: Literal["path"] = Field(description="a .jsonl or .parquet file of your own")
    path: str = Field(min_length=1, description="the file, relative to the repository root, or absolute")
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


class Mix(Section):
    datasets: dict[Name, Positive] = Field(
        min_length=1, description="dataset: number of samples drawn from it without replacement"
    )
    max_length: Positive = Field(
        description="longest sample in tokens, prompt and response; longer ones are dropped and counted"
    )
    tokenizers: list[Address] = Field(
        [],
        description="models in whose tokenizer and chat template every sample must fit max_length "
        "(the pivot and all teachers)",
    )
    english: Share = Field(0.0, description="smallest share of ASCII characters in a sample; 0 keeps all")
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
    label: str = Field(description="column header in the table")


def outside_files(source: HubSource | PathSource | GeneratedSource | None) -> list[str]:
    """Files outside the study that a dataset or a task's items are read from."""
    return [source.path] if isinstance(source, PathSource) else []
