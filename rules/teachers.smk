rule teachers:
    input:
        study.stages["teachers"],


rule capture_shard:
    input:
        study.inputs("teachers/shards/{model}/{mix}/{shard}"),
    output:
        manifest="results/teachers/shards/{model}/{mix}/{shard}/manifest.json",
    log:
        "logs/teachers/shards/{model}/{mix}/{shard}.log",
    benchmark:
        "logs/benchmarks/teachers/shards/{model}/{mix}/{shard}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    resources:
        gpu=study.gpus("teachers/shards/{model}/{mix}/{shard}"),
    params:
        spec=study.spec("teachers/shards/{model}/{mix}/{shard}"),
    shell:
        "python -m llmfusion step capture_shard --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"


rule capture_teacher:
    input:
        study.inputs("teachers/{model}/{mix}"),
    output:
        manifest="results/teachers/{model}/{mix}/manifest.json",
    log:
        "logs/teachers/{model}/{mix}.log",
    benchmark:
        "logs/benchmarks/teachers/{model}/{mix}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    resources:
        gpu=study.gpus("teachers/{model}/{mix}"),
    params:
        spec=study.spec("teachers/{model}/{mix}"),
    shell:
        "python -m llmfusion step capture_teacher --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"
