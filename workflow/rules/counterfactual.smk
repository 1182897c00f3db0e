# retrain and measure: models trained from scratch without some images, and what they say of a query.


SHAPING_RETRAININGS = shaped_by(
    "train retrain measure",
    "train",
    "seed",
    ("evaluate", "timestep_stride"),
    ("evaluate", "draws"),
)


# A retraining takes minutes to hours: update() leaves its last result in place, so that the job can
# recognise, by the key in it, that the same images were left out and there is nothing to train.
rule retrain_shared:
    input:
        ENCODED,
        PARENT,
    output:
        update(layout.retrained("{method}", "{k}", "{draw}")),
    log:
        log_file("retrain", "{method}", "k{k}", "{draw}"),
    benchmark:
        benchmark_file("retrain", "{method}", "k{k}", "{draw}")
    wildcard_constraints:
        method=one_of([RANDOM, SEED_SET] if not STACKED else []),
    conda:
        "../envs/forgetrace.yaml"
    threads: layout.config.train.threads
    resources:
        mem_mb=3000,
        runtime=240,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("train retrain", "train", "seed"),
    shell:
        "forgetrace retrain --config {params.config:q} --method {wildcards.method:q} --k {wildcards.k}"
        " --member {wildcards.draw:q} --device auto > {log:q} 2>&1"


rule retrain:
    input:
        ENCODED,
        PARENT,
        layout.score("{method}", "{query}"),
        list(layout.query("{query}").values()),
    output:
        list(
            map(
                update,
                layout.measure("{method}", "{k}", "{query}", "{query}").values(),
            )
        ),
        [update(layout.retrained("{method}", "{k}", "{query}"))]
        if layout.config.retrain.keep_weights
        else [],
    log:
        log_file("retrain", "{method}", "k{k}", "{query}"),
    benchmark:
        benchmark_file("retrain", "{method}", "k{k}", "{query}")
    wildcard_constraints:
        method=one_of(JUDGED if not STACKED else []),
        query=one_of([query for query in JUDGED_QUERIES if query not in OWN_IMAGES]),
    conda:
        "../envs/forgetrace.yaml"
    threads: layout.config.train.threads
    resources:
        mem_mb=3000,
        runtime=240,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=SHAPING_RETRAININGS,
    shell:
        "forgetrace retrain --config {params.config:q} --method {wildcards.method:q} --k {wildcards.k}"
        " --member {wildcards.query:q} --device auto > {log:q} 2>&1"


# A user's image came from no initial noise of ours: it has losses, but cannot be regenerated.
use rule retrain as retrain_own_image with:
    output:
        update(layout.measure("{method}", "{k}", "{query}", "{query}")["losses"]),
        [update(layout.retrained("{method}", "{k}", "{query}"))]
        if layout.config.retrain.keep_weights
        else [],
    wildcard_constraints:
        method=one_of(JUDGED if not STACKED else []),
        query=one_of(OWN_IMAGES),


rule retrain_half:
    input:
        ENCODED,
        PARENT,
        [path for query in QUERIES for path in layout.query(query).values()],
    output:
        update(layout.losses("{method}", "{k}", "{member}")),
        [update(layout.retrained("{method}", "{k}", "{member}"))]
        if layout.config.retrain.keep_weights
        else [],
    log:
        log_file("retrain", "{method}", "k{k}", "{member}"),
    benchmark:
        benchmark_file("retrain", "{method}", "k{k}", "{member}")
    wildcard_constraints:
        method=one_of([HALF_SET] if not STACKED else []),
        member=r"draw\d+(-seed\d+)?",
    conda:
        "../envs/forgetrace.yaml"
    threads: layout.config.train.threads
    resources:
        mem_mb=3000,
        runtime=240,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=SHAPING_RETRAININGS,
    shell:
        "forgetrace retrain --config {params.config:q} --method {wildcards.method:q} --k {wildcards.k}"
        " --member {wildcards.member:q} --device auto > {log:q} 2>&1"


use rule retrain_half as retrain_pool with:
    input:
        ENCODED,
        PARENT,
        lambda wildcards: [
            layout.score(wildcards.method, query)
            for query in layout.pool(wildcards.member)
        ],
        [path for query in QUERIES for path in layout.query(query).values()],
    wildcard_constraints:
        method=one_of(layout.config.score.methods if not STACKED else []),
        member=r"pool\d+",


if STACKED:

    rule retrain_together:
        input:
            ENCODED,
            PARENT,
            [path for query in JUDGED_QUERIES for path in layout.query(query).values()],
            lambda wildcards: [
                layout.score(wildcards.method, query) for query in JUDGED_QUERIES
            ],
        output:
            [
                update(path)
                for query in JUDGED_QUERIES
                for k in layout.config.retrain.k
                for path in told([("{method}", k, query)])
            ],
        log:
            log_file("retrain", "{method}", "together"),
        benchmark:
            benchmark_file("retrain", "{method}", "together")
        wildcard_constraints:
            method=one_of(JUDGED),
        conda:
            "../envs/forgetrace.yaml"
        threads: layout.config.train.threads
        resources:
            mem_mb=8000,
            runtime=480,
            gpu=1,
        params:
            config=CONFIG_FILE,
            together=lambda wildcards: wildcards.method,
            shaped_by=SHAPING_RETRAININGS,
        shell:
            "forgetrace retrain --config {params.config:q} --together {params.together:q}"
            " --device auto > {log:q} 2>&1"

    use rule retrain_together as retrain_shared_together with:
        input:
            ENCODED,
            PARENT,
        output:
            [update(path) for path in told(STACKED["shared"])],
        log:
            log_file("retrain", "shared", "together"),
        benchmark:
            benchmark_file("retrain", "shared", "together")
        params:
            config=CONFIG_FILE,
            together="shared",
            shaped_by=shaped_by("train retrain", "train", "seed"),


if "half" in STACKED:

    use rule retrain_together as retrain_half_together with:
        input:
            ENCODED,
            PARENT,
            [path for query in QUERIES for path in layout.query(query).values()],
        output:
            [update(path) for path in told(STACKED["half"])],
        log:
            log_file("retrain", "half", "together"),
        benchmark:
            benchmark_file("retrain", "half", "together")
        params:
            config=CONFIG_FILE,
            together="half",
            shaped_by=SHAPING_RETRAININGS,


if "pools" in STACKED:

    use rule retrain_together as retrain_pools_together with:
        input:
            ENCODED,
            PARENT,
            [path for query in QUERIES for path in layout.query(query).values()],
            [
                layout.score(method, query)
                for method in layout.config.score.methods
                for query in JUDGED_QUERIES
            ],
        output:
            [update(path) for path in told(STACKED["pools"])],
        log:
            log_file("retrain", "pools", "together"),
        benchmark:
            benchmark_file("retrain", "pools", "together")
        params:
            config=CONFIG_FILE,
            together="pools",
            shaped_by=SHAPING_RETRAININGS,


rule measure:
    input:
        ENCODED,
        MODEL,
        [layout.retrained(*model) for model in layout.shared_models()],
        list(layout.query("{query}").values()),
    output:
        [
            update(path)
            for model in layout.shared_models()
            for path in layout.measure(*model, "{query}").values()
        ],
    log:
        log_file("measure", "{query}"),
    benchmark:
        benchmark_file("measure", "{query}")
    wildcard_constraints:
        query=one_of([query for query in JUDGED_QUERIES if query not in OWN_IMAGES]),
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=60,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by(
            "measure", "seed", ("evaluate", "timestep_stride"), ("evaluate", "draws")
        ),
    shell:
        "forgetrace measure --config {params.config:q} --query {wildcards.query:q} --threads {threads}"
        " --device auto > {log:q} 2>&1"


use rule measure as measure_own_image with:
    output:
        [
            update(layout.measure(*model, "{query}")["losses"])
            for model in layout.shared_models()
        ],
    wildcard_constraints:
        query=one_of(OWN_IMAGES),


rule all_retrain:
    input:
        [layout.retrained(*model) for model in layout.shared_models()],
        [path for query in JUDGED_QUERIES for path in measures(query)],
        MEASURED_AT_ONCE,
        [layout.retrained(*model) for model in layout.retrainings()]
        if layout.config.retrain.keep_weights
        else [],
