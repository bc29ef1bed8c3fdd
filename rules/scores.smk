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
    conda:
        "../envs/llmfusion.yaml"
    resources:
        gpu=study.gpus("answers/{model}/{batch}"),
        mem_mb=study.memory_mb("answers/{model}/{batch}"),
        runtime=study.minutes("answers/{model}/{batch}"),
    params:
        spec=study.spec("answers/{model}/{batch}"),
    shell:
        "python -m llmfusion step answer --spec - --out {output.manifest:q} --log {log:q} --inputs {input:q} <<< {params.spec:q}"


rule score:
    input:
        study.inputs("scores/{model}/{task}"),
    output:
        cell="results/scores/{model}/{task}.json",
    log:
        "logs/scores/{model}/{task}.log",
    conda:
        "../envs/llmfusion.yaml"
    resources:
        mem_mb=study.memory_mb("scores/{model}/{task}"),
        runtime=study.minutes("scores/{model}/{task}"),
    params:
        spec=study.spec("scores/{model}/{task}"),
    shell:
        "python -m llmfusion step score --spec - --out {output.cell:q} --log {log:q} --inputs {input:q} <<< {params.spec:q}"
