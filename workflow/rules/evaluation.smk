# evaluate: the tables of the counterfactual experiment.


# What the report shows of the tables, in its categories.
REPORTED = {
    "counterfactual": ("Proof by retraining", "summary"),
    "comparisons": ("Proof by retraining", "pairs of methods"),
    "lds": ("Linear datamodeling score", "summary"),
    "pooled": ("Proof by retraining", "pooled protocol"),
    "agreement": ("Attribution", "agreement of methods"),
    "cost": ("Attribution", "cost of methods"),
    "unlearning": ("Attribution", "what unlearning changes"),
    "retrieval": ("Customised models", "summary"),
    "retrieval_comparisons": ("Customised models", "pairs of methods"),
    "calibration": ("Customised models", "mass on exemplars"),
    "regions_summary": ("Regions", "what top images share"),
}


# Tables that look at all scores, not only at what retrained models say.
SCORES_EVALUATED = MEASURED_AT_ONCE or layout.config.evaluate.precision_k


rule evaluate:
    input:
        [path for query in QUERIES for path in measures(query)],
        [path for query in QUERIES for path in layout.query(query).values()],
        MEASURED_AT_ONCE,
        [layout.index] if SCORES_EVALUATED else [],
        (
            [path for query in QUERIES for path in scores(query)]
            if SCORES_EVALUATED
            else []
        ),
        [
            path
            for variant in REGENERATED
            for path in [
                layout.regenerated(variant),
                *(
                    layout.unlearned(variant, query)["losses"]
                    for query in layout.config.forgotten_queries()
                ),
            ]
        ],
        rules.all_retrieve.input,
        rules.all_learn.input,
    output:
        [
            report(
                layout.table(name),
                caption=f"../report/{name}_table.rst",
                category=REPORTED[name][0],
                labels={"what": REPORTED[name][1]},
            )
            for name in layout.tables()
            if name in REPORTED
        ],
        [layout.table(name) for name in layout.tables() if name not in REPORTED],
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
