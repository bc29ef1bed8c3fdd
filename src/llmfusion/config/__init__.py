"""Studies: strict YAML, typed sections, checks between them, and the plan of artifacts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmfusion.config.errors import StudyError
    from llmfusion.config.study import read_study
    from llmfusion.config.workflow import load_study, study_of

__all__ = ["StudyError", "load_study", "read_study", "study_of"]

_MODULES = {"StudyError": "errors", "read_study": "study", "load_study": "workflow", "study_of": "workflow"}


def __getattr__(name: str) -> Any:
    """Load a name when it is asked for: a step that needs only its own options starts without the models of a whole study."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
