# One study, all of its artifacts. What each rule makes of which inputs is worked out in src/llmfusion/study/kinds/.
import sys

sys.path.insert(0, f"{workflow.basedir}/src")  # a fresh clone plans without an install
from llmfusion.artifacts import kept
from llmfusion.study.snakemake import study_of

study = study_of(workflow)


workdir: study.directory


wildcard_constraints:
    **study.names,


kept.put_back_after_a_kill(workflow, study.graph)


onstart:
    from llmfusion.reporting.estimate import require_disk

    require_disk(workflow, study)
    study.record_fingerprints(workflow)
    kept.keep_outputs(workflow, study.graph)


onsuccess:
    kept.put_back_outputs(workflow, study.graph)


onerror:
    kept.put_back_outputs(workflow, study.graph)


rule tables:
    input:
        study.stages["tables"],


include: "rules/data.smk"
include: "rules/models.smk"
include: "rules/teachers.smk"
include: "rules/scores.smk"
include: "rules/tables.smk"
