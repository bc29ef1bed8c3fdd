rule teachers:
    input:
        config["stages"]["teachers"],


rule capture_teacher:
    input:
        lookup(dpath="artifacts/teachers/{model}/{mix}/inputs", within=config),
    output:
        manifest="results/teachers/{model}/{mix}/manifest.json",
    log:
        "logs/teachers/{model}/{mix}.log",
    benchmark:
        "logs/benchmarks/teachers/{model}/{mix}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=lookup(dpath="artifacts/teachers/{model}/{mix}/spec", within=config),
    shell:
        "python -m llmfusion.capture --spec {params.spec:q} --out {output.manifest} --inputs {input:q} > {log} 2>&1"
