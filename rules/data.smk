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
    benchmark:
        "logs/benchmarks/data/dataset/{dataset}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    priority: 10
    params:
        spec=study.spec("data/dataset/{dataset}"),
    shell:
        "python -m llmfusion step stage_dataset --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule stage_tasks:
    input:
        study.inputs("data/tasks/{task}"),
    output:
        manifest="results/data/tasks/{task}/manifest.json",
    log:
        "logs/data/tasks/{task}.log",
    benchmark:
        "logs/benchmarks/data/tasks/{task}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    priority: 10
    params:
        spec=study.spec("data/tasks/{task}"),
    shell:
        "python -m llmfusion step stage_tasks --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule mix_samples:
    input:
        study.inputs("data/mix/{mix}"),
    output:
        manifest="results/data/mix/{mix}/manifest.json",
    log:
        "logs/data/mix/{mix}.log",
    benchmark:
        "logs/benchmarks/data/mix/{mix}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    priority: 10
    params:
        spec=study.spec("data/mix/{mix}"),
    shell:
        "python -m llmfusion step mix_samples --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule generate_answers:
    input:
        study.inputs("data/generated/{model}/{mix}"),
    output:
        manifest="results/data/generated/{model}/{mix}/manifest.json",
    log:
        "logs/data/generated/{model}/{mix}.log",
    benchmark:
        "logs/benchmarks/data/generated/{model}/{mix}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    resources:
        gpu=study.gpus("data/generated/{model}/{mix}"),
    params:
        spec=study.spec("data/generated/{model}/{mix}"),
    shell:
        "python -m llmfusion step generate_answers --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"
