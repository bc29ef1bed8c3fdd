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
    benchmark:
        "logs/benchmarks/models/base/{base}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    priority: 10
    resources:
        gpu=study.gpus("models/base/{base}"),
        runtime=10080,  # minutes; a profile can set it
    params:
        spec=study.spec("models/base/{base}"),
    shell:
        "python -m llmfusion step stage_base --minutes {resources.runtime} --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule train_model:
    input:
        study.inputs("models/trained/{trained}"),
    output:
        manifest="results/models/trained/{trained}/manifest.json",
    log:
        "logs/models/trained/{trained}.log",
    benchmark:
        "logs/benchmarks/models/trained/{trained}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    resources:
        gpu=study.gpus("models/trained/{trained}"),
        runtime=10080,  # minutes; a profile can set it
    params:
        spec=study.spec("models/trained/{trained}"),
    shell:
        "python -m llmfusion step train_model --minutes {resources.runtime} --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule merge_models:
    input:
        study.inputs("models/merged/{merged}"),
    output:
        manifest="results/models/merged/{merged}/manifest.json",
    log:
        "logs/models/merged/{merged}.log",
    benchmark:
        "logs/benchmarks/models/merged/{merged}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=study.spec("models/merged/{merged}"),
    shell:
        "python -m llmfusion step merge_models --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"
