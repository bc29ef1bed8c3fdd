localrules:
    table,
    cost,
    cost_of_all,


rule table:
    input:
        study.inputs("tables/{table}"),
    output:
        csv="results/{table}.csv",
        markdown="results/{table}.md",
        manifest="results/{table}.json",
    log:
        "logs/tables/{table}.log",
    conda:
        "../envs/llmfusion.yaml"
    params:
        spec=study.spec("tables/{table}"),
    shell:
        "python -m llmfusion step table --spec - --out {output.csv:q} --log {log:q} --inputs {input:q} <<< {params.spec:q}"


rule cost:
    input:
        "results/{table}.csv",
    output:
        csv="results/{table}.cost.csv",
    log:
        "logs/costs/{table}.log",
    benchmark:
        "logs/benchmarks/costs/{table}.tsv"
    conda:
        "../envs/llmfusion.yaml"
    shell:
        "python -m llmfusion cost {input:q} --out {output.csv} > {log} 2>&1"


rule cost_of_all:
    input:
        study.stages["tables"],
    output:
        csv="results/cost.csv",
    log:
        "logs/cost.log",
    conda:
        "../envs/llmfusion.yaml"
    shell:
        "python -m llmfusion cost {input:q} --out {output.csv:q} > {log:q} 2>&1"
