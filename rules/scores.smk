rule scores:
    input:
        study.stages["scores"],


rule answer:
    input:
        study.inputs("answers/{model}/{batch}"),
    output:
        manifest="results/answers/{model}/{batch}/manifest.json",
    log:
        "logs/answers/{model}/{batch}.log",
    benchmark:
        "logs/benchmarks/answers/{model}/{batch}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    resources:
        gpu=study.gpus("answers/{model}/{batch}"),
    params:
        spec=study.spec("answers/{model}/{batch}"),
    shell:
        "python -m llmfusion step answer --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule score:
    input:
        study.inputs("scores/{model}/{task}"),
    output:
        cell="results/scores/{model}/{task}.json",
    log:
        "logs/scores/{model}/{task}.log",
    benchmark:
        "logs/benchmarks/scores/{model}/{task}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=study.spec("scores/{model}/{task}"),
    shell:
        "python -m llmfusion step score --spec {params.spec:q} --out {output.cell} --inputs {input:q} > {log} 2>&1"
