rule scores:
    input:
        config["stages"]["scores"],


rule answer:
    input:
        lookup(dpath="artifacts/answers/{model}/{batch}/inputs", within=config),
    output:
        manifest="results/answers/{model}/{batch}/manifest.json",
    log:
        "logs/answers/{model}/{batch}.log",
    benchmark:
        "logs/benchmarks/answers/{model}/{batch}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=lookup(dpath="artifacts/answers/{model}/{batch}/spec", within=config),
    shell:
        "python -m llmfusion.answer --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule score:
    input:
        lookup(dpath="artifacts/scores/{model}/{task}/inputs", within=config),
    output:
        cell="results/scores/{model}/{task}.json",
    log:
        "logs/scores/{model}/{task}.log",
    benchmark:
        "logs/benchmarks/scores/{model}/{task}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=lookup(dpath="artifacts/scores/{model}/{task}/spec", within=config),
    shell:
        "python -m llmfusion.score --spec {params.spec:q} --out {output.cell} --inputs {input:q} > {log} 2>&1"
