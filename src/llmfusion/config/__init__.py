"""Studies: strict YAML, typed sections, checks between them, and the plan of artifacts."""

from llmfusion.config.errors import StudyError
from llmfusion.config.study import read_study
from llmfusion.config.workflow import load_study, study_of

__all__ = ["StudyError", "load_study", "read_study", "study_of"]
