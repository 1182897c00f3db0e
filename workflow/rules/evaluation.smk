# evaluate: the tables of the counterfactual experiment.


rule evaluate:
    input:
        [path for query in QUERIES for path in measures(query)],
        [path for query in QUERIES for path in layout.query(query).values()],
    output:
        report(
            layout.table("counterfactual"),
            caption="../report/counterfactual_table.rst",
            category="Proof by retraining",
            labels={"what": "summary"},
        ),
        report(
            layout.table("comparisons"),
            caption="../report/comparisons.rst",
            category="Proof by retraining",
            labels={"what": "pairs of methods"},
        ),
        layout.table("per_query"),
        layout.metrics,
    log:
        log_file("evaluate", "evaluate"),
    benchmark:
        benchmark_file("evaluate", "evaluate")
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("evaluate", "evaluate", "retrain", "seed"),
    shell:
        "forgetrace evaluate --config {params.config:q} > {log:q} 2>&1"


rule all_evaluate:
    input:
        rules.evaluate.output,
