rule data:
    input:
        config["stages"]["data"],


rule stage_dataset:
    input:
        lookup(dpath="artifacts/data/dataset/{dataset}/inputs", within=config),
    output:
        manifest="results/data/dataset/{dataset}/manifest.json",
    log:
        "logs/data/dataset/{dataset}.log",
    benchmark:
        "logs/benchmarks/data/dataset/{dataset}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=lookup(dpath="artifacts/data/dataset/{dataset}/spec", within=config),
    shell:
        "python -m llmfusion.dataset --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule stage_tasks:
    input:
        lookup(dpath="artifacts/data/tasks/{task}/inputs", within=config),
    output:
        manifest="results/data/tasks/{task}/manifest.json",
    log:
        "logs/data/tasks/{task}.log",
    benchmark:
        "logs/benchmarks/data/tasks/{task}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=lookup(dpath="artifacts/data/tasks/{task}/spec", within=config),
    shell:
        "python -m llmfusion.tasks --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule mix_samples:
    input:
        lookup(dpath="artifacts/data/mix/{mix}/inputs", within=config),
    output:
        manifest="results/data/mix/{mix}/manifest.json",
    log:
        "logs/data/mix/{mix}.log",
    benchmark:
        "logs/benchmarks/data/mix/{mix}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=lookup(dpath="artifacts/data/mix/{mix}/spec", within=config),
    shell:
        "python -m llmfusion.mix --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule generate_answers:
    input:
        lookup(dpath="artifacts/data/generated/{model}/{mix}/inputs", within=config),
    output:
        manifest="results/data/generated/{model}/{mix}/manifest.json",
    log:
        "logs/data/generated/{model}/{mix}.log",
    benchmark:
        "logs/benchmarks/data/generated/{model}/{mix}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=lookup(dpath="artifacts/data/generated/{model}/{mix}/spec", within=config),
    shell:
        "python -m llmfusion.generate --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"
