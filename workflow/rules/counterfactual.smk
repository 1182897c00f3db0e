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
        method=one_of([RANDOM, SEED_SET]),
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
        method=one_of(JUDGED),
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
        method=one_of(JUDGED),
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
        method=HALF_SET,
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
        member=r"pool\d+",


rule measure:
    input:
        ENCODED,
        MODEL,
        [layout.retrained(*model) for model in layout.shared_models()],
        list(layout.query("{query}").values()),
    output:
        [
            path
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
            layout.measure(*model, "{query}")["losses"]
            for model in layout.shared_models()
        ],
    wildcard_constraints:
        query=one_of(OWN_IMAGES),


rule all_retrain:
    input:
        [layout.retrained(*model) for model in layout.shared_models()],
        [path for query in JUDGED_QUERIES for path in measures(query)],
        MEASURED_AT_ONCE,
