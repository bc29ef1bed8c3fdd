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
    conda:
        "../envs/llmfusion.yaml"
    resources:
        gpu=study.gpus("teachers/shards/{model}/{mix}/{shard}"),
        mem_mb=study.memory_mb("teachers/shards/{model}/{mix}/{shard}"),
        runtime=study.minutes("teachers/shards/{model}/{mix}/{shard}"),
    params:
        spec=study.spec("teachers/shards/{model}/{mix}/{shard}"),
    shell:
        "python -m llmfusion step capture_shard --spec - --out {output.manifest:q} --log {log:q} --inputs {input:q} <<< {params.spec:q}"


rule capture_teacher:
    input:
        study.inputs("teachers/{model}/{mix}"),
    output:
        manifest="results/teachers/{model}/{mix}/manifest.json",
    log:
        "logs/teachers/{model}/{mix}.log",
    conda:
        "../envs/llmfusion.yaml"
    resources:
        gpu=study.gpus("teachers/{model}/{mix}"),
        mem_mb=study.memory_mb("teachers/{model}/{mix}"),
        runtime=study.minutes("teachers/{model}/{mix}"),
    params:
        spec=study.spec("teachers/{model}/{mix}"),
    shell:
        "python -m llmfusion step capture_teacher --spec - --out {output.manifest:q} --log {log:q} --inputs {input:q} <<< {params.spec:q}"
