# figures: what a reader looks at, each as PNG (in the report) and PDF.


rule figure_training:
    input:
        layout.curve,
    output:
        report(
            layout.figure("training", "png"),
            caption="../report/training.rst",
            category="Model",
            labels={"figure": "training curve"},
        ),
        layout.figure("training", "pdf"),
    log:
        log_file("figures", "training"),
    benchmark:
        benchmark_file("figures", "training")
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=15,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("figures"),
    shell:
        "forgetrace figures --config {params.config:q} --name training > {log:q} 2>&1"


rule figure_attribution:
    input:
        lambda wildcards: scores(wildcards.query),
        list(layout.query("{query}").values()),
        layout.index,
        layout.data_manifest,
    output:
        report(
            layout.figure("attribution-{query}", "png"),
            caption="../report/attribution.rst",
            category="Attribution",
            labels={"query": "{query}"},
        ),
        layout.figure("attribution-{query}", "pdf"),
    log:
        log_file("figures", "attribution-{query}"),
    benchmark:
        benchmark_file("figures", "attribution-{query}")
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=15,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("figures", "figures", methods=METHODS),
    shell:
        "forgetrace figures --config {params.config:q} --name attribution-{wildcards.query:q}"
        " > {log:q} 2>&1"


rule figure_regions:
    input:
        lambda wildcards: [
            path
            for query in [
                wildcards.query,
                *layout.config.regions_of(wildcards.query).values(),
            ]
            for path in [*scores(query), *layout.query(query).values()]
        ],
        layout.index,
        layout.data_manifest,
    output:
        report(
            layout.figure("regions-{query}", "png"),
            caption="../report/regions.rst",
            category="Regions",
            labels={"what": "{query}"},
        ),
        layout.figure("regions-{query}", "pdf"),
    log:
        log_file("figures", "regions-{query}"),
    benchmark:
        benchmark_file("figures", "regions-{query}")
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=15,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("figures", "figures", methods=METHODS),
    shell:
        "forgetrace figures --config {params.config:q} --name regions-{wildcards.query:q}"
        " > {log:q} 2>&1"


rule figure_precision:
    input:
        [layout.table(name) for name in layout.tables() if name == "regions_summary"],
    output:
        report(
            layout.figure("precision", "png"),
            caption="../report/precision.rst",
            category="Regions",
            labels={"what": "all queries"},
        ),
        layout.figure("precision", "pdf"),
    log:
        log_file("figures", "precision"),
    benchmark:
        benchmark_file("figures", "precision")
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=15,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("figures", ("score", "methods")),
    shell:
        "forgetrace figures --config {params.config:q} --name precision > {log:q} 2>&1"


rule figure_counterfactual:
    input:
        lambda wildcards: measures(wildcards.query),
        list(layout.query("{query}").values()),
        # Ancient: another query changes this table, but not the rows of this one.
        ancient(layout.table("per_query")),
    output:
        report(
            layout.figure("counterfactual-{query}", "png"),
            caption="../report/counterfactual.rst",
            category="Proof by retraining",
            labels={"what": "{query}"},
        ),
        layout.figure("counterfactual-{query}", "pdf"),
    log:
        log_file("figures", "counterfactual-{query}"),
    benchmark:
        benchmark_file("figures", "counterfactual-{query}")
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=15,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by(
            "evaluate figures", ("evaluate", "encoder"), ("score", "methods")
        ),
    shell:
        "forgetrace figures --config {params.config:q} --name counterfactual-{wildcards.query:q}"
        " > {log:q} 2>&1"


rule figure_delta:
    input:
        layout.table("per_query"),
        layout.table("counterfactual"),
    output:
        report(
            layout.figure("delta", "png"),
            caption="../report/delta.rst",
            category="Proof by retraining",
            labels={"what": "all queries"},
        ),
        layout.figure("delta", "pdf"),
    log:
        log_file("figures", "delta"),
    benchmark:
        benchmark_file("figures", "delta")
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=15,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("figures", ("retrain", "methods"), ("score", "methods")),
    shell:
        "forgetrace figures --config {params.config:q} --name delta > {log:q} 2>&1"


rule figure_lds:
    input:
        [
            layout.table(name)
            for name in layout.tables()
            if name in ("lds", "lds_per_query", "pooled")
        ],
    output:
        report(
            layout.figure("lds", "png"),
            caption="../report/lds.rst",
            category="Linear datamodeling score",
            labels={"what": "all methods"},
        ),
        layout.figure("lds", "pdf"),
    log:
        log_file("figures", "lds"),
    benchmark:
        benchmark_file("figures", "lds")
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=15,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("figures", ("score", "methods")),
    shell:
        "forgetrace figures --config {params.config:q} --name lds > {log:q} 2>&1"


rule figure_unlearning:
    input:
        [layout.regenerated(variant) for variant in REGENERATED],
    output:
        report(
            layout.figure("unlearning", "png"),
            caption="../report/unlearning.rst",
            category="Attribution",
            labels={"query": "what unlearning changes"},
        ),
        layout.figure("unlearning", "pdf"),
    log:
        log_file("figures", "unlearning"),
    benchmark:
        benchmark_file("figures", "unlearning")
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=15,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("figures", "unlearn"),
    shell:
        "forgetrace figures --config {params.config:q} --name unlearning > {log:q} 2>&1"


rule figure_exemplars:
    input:
        lambda wildcards: layout.ranks(wildcards.shown.rpartition("-")[0]),
        lambda wildcards: layout.customized(wildcards.shown.rpartition("-")[0])[
            "record"
        ],
        layout.index,
        layout.data_manifest,
    output:
        report(
            layout.figure("exemplars-{shown}", "png"),
            caption="../report/exemplars.rst",
            category="Customised models",
            labels={"what": "{shown}"},
        ),
        layout.figure("exemplars-{shown}", "pdf"),
    log:
        log_file("figures", "exemplars-{shown}"),
    benchmark:
        benchmark_file("figures", "exemplars-{shown}")
    wildcard_constraints:
        shown=one_of(catalogue.shown(layout)),
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=15,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("figures", "figures", methods=METHODS),
    shell:
        "forgetrace figures --config {params.config:q} --name exemplars-{wildcards.shown:q} > {log:q} 2>&1"


rule figure_retrieval:
    input:
        [
            layout.table(name)
            for name in layout.tables()
            if name in ("retrieval", "retrieval_per_query")
        ],
    output:
        report(
            layout.figure("retrieval", "png"),
            caption="../report/retrieval.rst",
            category="Customised models",
            labels={"what": "all methods"},
        ),
        layout.figure("retrieval", "pdf"),
    log:
        log_file("figures", "retrieval"),
    benchmark:
        benchmark_file("figures", "retrieval")
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=15,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("figures", ("score", "methods")),
    shell:
        "forgetrace figures --config {params.config:q} --name retrieval > {log:q} 2>&1"


rule figure_reliability:
    input:
        [
            layout.table(name)
            for name in layout.tables()
            if name in ("calibration", "reliability")
        ],
    output:
        report(
            layout.figure("reliability", "png"),
            caption="../report/reliability.rst",
            category="Customised models",
            labels={"what": "reliability"},
        ),
        layout.figure("reliability", "pdf"),
    log:
        log_file("figures", "reliability"),
    benchmark:
        benchmark_file("figures", "reliability")
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=15,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("figures", ("score", "methods")),
    shell:
        "forgetrace figures --config {params.config:q} --name reliability > {log:q} 2>&1"


rule all_figures:
    input:
        [
            layout.figure(name, suffix)
            for name in catalogue.names(layout)
            for suffix in ("png", "pdf")
        ],
