rule teachers:
    input:
        study.stages["teachers"],


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
        "python -m llmfusion.capture --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"
