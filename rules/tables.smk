localrules:
    table,


rule table:
    input:
        lookup(dpath="artifacts/tables/{table}/inputs", within=config),
    output:
        csv="results/{table}.csv",
        markdown="results/{table}.md",
        manifest="results/{table}.json",
    log:
        "logs/tables/{table}.log",
    benchmark:
        "logs/benchmarks/tables/{table}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=lookup(dpath="artifacts/tables/{table}/spec", within=config),
    shell:
        "python -m llmfusion.table --spec {params.spec:q} --out {output.csv} --inputs {input:q} > {log} 2>&1"
