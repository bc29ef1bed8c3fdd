rule data:
    input:
        study.stages["data"],


rule stage_dataset:
    input:
        study.inputs("data/dataset/{dataset}"),
    output:
        manifest="results/data/dataset/{dataset}/manifest.json",
    log:
        "logs/data/dataset/{dataset}.log",
    priority: 10
    conda:
        "../envs/llmfusion.yaml"
    resources:
        mem_mb=study.memory_mb("data/dataset/{dataset}"),
        runtime=study.minutes("data/dataset/{dataset}"),
    params:
        spec=study.spec("data/dataset/{dataset}"),
    shell:
        "python -m llmfusion step stage_dataset --spec - --out {output.manifest:q} --log {log:q} --inputs {input:q} <<< {params.spec:q}"


rule stage_tasks:
    input:
        study.inputs("data/tasks/{task}"),
    output:
        manifest="results/data/tasks/{task}/manifest.json",
    log:
        "logs/data/tasks/{task}.log",
    priority: 10
    conda:
        "../envs/llmfusion.yaml"
    resources:
        mem_mb=study.memory_mb("data/tasks/{task}"),
        runtime=study.minutes("data/tasks/{task}"),
    params:
        spec=study.spec("data/tasks/{task}"),
    shell:
        "python -m llmfusion step stage_tasks --spec - --out {output.manifest:q} --log {log:q} --inputs {input:q} <<< {params.spec:q}"


rule mix_samples:
    input:
        study.inputs("data/mix/{mix}"),
    output:
        manifest="results/data/mix/{mix}/manifest.json",
    log:
        "logs/data/mix/{mix}.log",
    priority: 10
    conda:
        "../envs/llmfusion.yaml"
    resources:
        mem_mb=study.memory_mb("data/mix/{mix}"),
        runtime=study.minutes("data/mix/{mix}"),
    params:
        spec=study.spec("data/mix/{mix}"),
    shell:
        "python -m llmfusion step mix_samples --spec - --out {output.manifest:q} --log {log:q} --inputs {input:q} <<< {params.spec:q}"


rule generate_answers:
    input:
        study.inputs("data/generated/{model}/{mix}"),
    output:
        manifest="results/data/generated/{model}/{mix}/manifest.json",
    log:
        "logs/data/generated/{model}/{mix}.log",
    conda:
        "../envs/llmfusion.yaml"
    resources:
        gpu=study.gpus("data/generated/{model}/{mix}"),
        mem_mb=study.memory_mb("data/generated/{model}/{mix}"),
        runtime=study.minutes("data/generated/{model}/{mix}"),
    params:
        spec=study.spec("data/generated/{model}/{mix}"),
    shell:
        "python -m llmfusion step generate_answers --spec - --out {output.manifest:q} --log {log:q} --inputs {input:q} <<< {params.spec:q}"
