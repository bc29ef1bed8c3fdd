rule models:
    input:
        study.stages["models"],


rule stage_base:
    input:
        study.inputs("models/base/{base}"),
    output:
        manifest="results/models/base/{base}/manifest.json",
    log:
        "logs/models/base/{base}.log",
    priority: 10
    conda:
        "../envs/llmfusion.yaml"
    resources:
        gpu=study.gpus("models/base/{base}"),
        mem_mb=study.memory_mb("models/base/{base}"),
        runtime=study.minutes("models/base/{base}"),
    params:
        spec=study.spec("models/base/{base}"),
    shell:
        "python -m llmfusion step stage_base --minutes {resources.runtime} --spec - --out {output.manifest:q} --log {log:q} --inputs {input:q} <<< {params.spec:q}"


rule train_model:
    input:
        study.inputs("models/trained/{trained}"),
    output:
        manifest="results/models/trained/{trained}/manifest.json",
    log:
        "logs/models/trained/{trained}.log",
    conda:
        "../envs/llmfusion.yaml"
    resources:
        gpu=study.gpus("models/trained/{trained}"),
        mem_mb=study.memory_mb("models/trained/{trained}"),
        runtime=study.minutes("models/trained/{trained}"),
    params:
        spec=study.spec("models/trained/{trained}"),
    shell:
        "python -m llmfusion step train_model --minutes {resources.runtime} --spec - --out {output.manifest:q} --log {log:q} --inputs {input:q} <<< {params.spec:q}"


rule merge_models:
    input:
        study.inputs("models/merged/{merged}"),
    output:
        manifest="results/models/merged/{merged}/manifest.json",
    log:
        "logs/models/merged/{merged}.log",
    conda:
        "../envs/llmfusion.yaml"
    resources:
        mem_mb=study.memory_mb("models/merged/{merged}"),
        runtime=study.minutes("models/merged/{merged}"),
    params:
        spec=study.spec("models/merged/{merged}"),
    shell:
        "python -m llmfusion step merge_models --spec - --out {output.manifest:q} --log {log:q} --inputs {input:q} <<< {params.spec:q}"
