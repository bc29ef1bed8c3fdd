rule models:
    input:
        config["stages"]["models"],


rule stage_base:
    input:
        lookup(dpath="artifacts/models/base/{name}/inputs", within=config),
    output:
        manifest="results/models/base/{name}/manifest.json",
    log:
        "logs/models/base/{name}.log",
    benchmark:
        "logs/benchmarks/models/base/{name}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=lookup(dpath="artifacts/models/base/{name}/spec", within=config),
    shell:
        "python -m llmfusion.base --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule train_model:
    input:
        lookup(dpath="artifacts/models/trained/{name}/inputs", within=config),
    output:
        manifest="results/models/trained/{name}/manifest.json",
    log:
        "logs/models/trained/{name}.log",
    benchmark:
        "logs/benchmarks/models/trained/{name}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=lookup(dpath="artifacts/models/trained/{name}/spec", within=config),
    shell:
        "python -m llmfusion.train --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule merge_models:
    input:
        lookup(dpath="artifacts/models/merged/{name}/inputs", within=config),
    output:
        manifest="results/models/merged/{name}/manifest.json",
    log:
        "logs/models/merged/{name}.log",
    benchmark:
        "logs/benchmarks/models/merged/{name}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=lookup(dpath="artifacts/models/merged/{name}/spec", within=config),
    shell:
        "python -m llmfusion.merge --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"
