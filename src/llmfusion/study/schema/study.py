"""A whole study: everything the workflow needs to know, in one file.

Every key has a description; a default, once released, never changes, because artifacts leave defaults out of their
spec.
"""

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, create_model, field_validator

from llmfusion.study.kinds import all_kinds
from llmfusion.study.plugins import PluginError
from llmfusion.study.scales import SCALES
from llmfusion.study.schema.base import FilePath, Name, Section, Shown, started_from, template_fields
from llmfusion.study.schema.base_models import BaseModelEntry
from llmfusion.study.schema.data import Dataset, Mix, Task
from llmfusion.study.schema.merging import Merge
from llmfusion.study.schema.settings import Answering, Capture, Generation
from llmfusion.study.schema.tables import Table
from llmfusion.study.schema.training import TrainedModel
from llmfusion.study.shell_names import problem_of

if TYPE_CHECKING:
    ScaleName: TypeAlias = str
else:
    ScaleName = Literal[tuple(SCALES)]


class Models(Section):
    """All models, by kind."""

    base: dict[Name, BaseModelEntry] = Field(
        min_length=1, description="pivot and sources: staged, or trained from scratch"
    )
    trained: dict[Name, TrainedModel] = Field(
        {}, description="models trained from the pivot: SFT, SeqKD, knowledge and unified fusion"
    )
    merged: dict[Name, Merge] = Field({}, description="merges of trained models")


class BuiltinSections(Section):
    """One study: everything the workflow needs to know, in one file."""

    title: Shown = Field(min_length=1, description="one line that says what is studied")
    scale: ScaleName = Field(
        description="small: real models that need no GPU; miniature: made-up models; "
        "the numbers of both are labelled as such everywhere"
    )
    directory: FilePath = Field(
        description="where results/, work/ and logs/ go, relative to the repository root, or absolute"
    )
    chat_template: str = Field(
        "neutral", description="for models without one: neutral (User/Assistant), or a Jinja template"
    )
    capture: Capture = Field(Capture(), description="how teachers are cached")
    generation: Generation = Field(Generation(), description="how SeqKD answers are made (greedy)")
    answering: Answering = Field(Answering(), description="how models are asked (greedy)")
    datasets: dict[Name, Dataset] = Field(min_length=1, description="data to train on")
    mixes: dict[Name, Mix] = Field(min_length=1, description="samples drawn from datasets")
    tasks: dict[Name, Task] = Field(min_length=1, description="tests")
    batches: dict[Name, list[Name]] = Field(
        min_length=1, description="tasks that one job asks, the model loaded once; each task in exactly one batch"
    )
    models: Models = Field(description="all models, by kind; addressed as KIND/NAME")
    tables: dict[Name, Table] = Field(min_length=1, description="tables: models against tasks")

    def model_addresses(self) -> list[str]:
        """Addresses of all models: ``base/NAME``, ``trained/NAME``, ``merged/NAME``."""
        return [f"{kind}/{name}" for kind in ("base", "trained", "merged") for name in getattr(self.models, kind)]

    def model_entry(self, address: str) -> Any:
        """The entry of a model by its address."""
        kind, name = address.split("/")
        return getattr(self.models, kind)[name]

    def vocabulary(self, address: str) -> str:
        """A word that is the same for models with one vocabulary: what the base model says, or its own address."""
        entry = self.model_entry(address)
        while before := started_from(entry):
            address = before
            entry = self.model_entry(address)
        return str(getattr(entry, "vocabulary", address))

    def other_vocabularies(self, run: TrainedModel) -> list[str]:
        """Teachers of a training whose vocabulary is not the student's: they are projected into its space (DSKD)."""
        own = self.vocabulary(run.init)
        return [teacher for teacher in run.teachers if self.vocabulary(teacher) != own]

    @field_validator("directory")
    @classmethod
    def _directory(cls, path: str) -> str:
        if (problem := problem_of(path)) is not None:
            raise ValueError(f"got {path!r}, which {problem}")
        return path

    @field_validator("chat_template")
    @classmethod
    def _template(cls, text: str) -> str:
        if text != "neutral":
            if "{{" not in text:
                raise ValueError(
                    f"got {text!r}; expected neutral, or a Jinja template that prints the messages with {{{{ ... }}}}"
                )
            example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            template_fields(text, "chat", messages=example, bos_token="", eos_token="", add_generation_prompt=False)
        return text


def _added_sections() -> dict[str, Any]:
    """Sections that kinds of artifacts add to a study: ``{key: {NAME: entry}}``, empty by default."""
    out: dict[str, Any] = {}
    for name, kind in all_kinds().items():
        if kind.section is None:
            continue
        key, entry, description = kind.section
        if (
            not key.isidentifier()
            or key.startswith("_")
            or hasattr(BuiltinSections, key)
            or key in BuiltinSections.model_fields
        ):
            raise PluginError(f"kind {name}: section {key!r} is taken, or no name of a section; take another")
        out[key] = (dict[Name, entry], Field({}, description=description))  # type: ignore[valid-type]
    return out


if TYPE_CHECKING:
    Study = BuiltinSections
else:
    Study = create_model("Study", __base__=BuiltinSections, __doc__=BuiltinSections.__doc__, **_added_sections())
