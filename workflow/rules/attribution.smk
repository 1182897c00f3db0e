# fit, unlearn, scan, score: from a query to one score per training image and method.


rule fit:
    input:
        MODEL,
        ENCODED,
        given_fisher("diagonal"),
    output:
        layout.fisher,
        layout.fisher_report,
    log:
        log_file("fit", "fisher"),
    benchmark:
        benchmark_file("fit", "fisher")
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=60,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("fit", "fit", "seed"),
    shell:
        "forgetrace fit --config {params.config:q} --threads {threads} --device auto > {log:q} 2>&1"


rule fit_features:
    input:
        lambda wildcards: FEATURES[wildcards.features].inputs(),
        # Files of an encoder that is a folder; the features' record has their hashes.
        lambda wildcards: pipeline.local_files(
            getattr(FEATURES[wildcards.features], "encoder", None), ["."]
        ),
    output:
        layout.features("{features}"),
        layout.features_record("{features}"),
    log:
        log_file("fit", "{features}"),
    benchmark:
        benchmark_file("fit", "{features}")
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=120,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("fit", "seed"),  # its settings are in its name
    shell:
        "forgetrace fit --config {params.config:q} --features {wildcards.features:q}"
        " --threads {threads} --device auto > {log:q} 2>&1"


# fit's command with another option, which comes with the file's name: were it a word of its own in the command,
# the diagonal Fisher would be fitted again wherever it is finished.
use rule fit as fit_ekfac with:
    input:
        MODEL,
        ENCODED,
        given_fisher("ekfac"),
    output:
        layout.ekfac,
        layout.ekfac_report,
    log:
        log_file("fit", "ekfac"),
    benchmark:
        benchmark_file("fit", "ekfac")
    params:
        config=[CONFIG_FILE, "--curvature", "ekfac"],
        shaped_by=shaped_by("fit", "fit", "seed"),


rule all_fit:
    input:
        layout.all_fitted(),
        # Customised models have features of the UNet each for itself.
        [
            layout.features(name)
            for name in FEATURES
            if QUERIES or name.startswith("image-")
        ],


rule unlearn:
    input:
        MODEL,
        ENCODED,
        list(layout.query("{query}").values()),
        curvature=lambda wildcards: fitted(wildcards.variant)[:1],
    output:
        list(layout.unlearned("{variant}", "{query}").values()),
    log:
        log_file("unlearn", "{variant}", "{query}"),
    benchmark:
        benchmark_file("unlearn", "{variant}", "{query}")
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=60,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=lambda wildcards: shaped_by(
            "unlearn", "seed", ("unlearn", wildcards.variant)
        ),
    shell:
        "forgetrace unlearn --config {params.config:q} --variant {wildcards.variant:q}"
        " --query {wildcards.query:q} --threads {threads} --device auto > {log:q} 2>&1"


rule regenerate_unlearned:
    input:
        MODEL,
        ENCODED,
        lambda wildcards: [
            path
            for query in layout.config.forgotten_queries()
            for path in [
                layout.query(query)["tensors"],
                layout.unlearned(wildcards.variant, query)["weights"],
            ]
        ],
    output:
        layout.regenerated("{variant}"),
    log:
        log_file("unlearn", "{variant}", "regenerated"),
    benchmark:
        benchmark_file("unlearn", "{variant}", "regenerated")
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
            "synthesize",
            "seed",
            ("synthesize", "sampler_steps"),
            ("synthesize", "guidance"),
            others=layout.config.evaluate.others,
        ),
    shell:
        "forgetrace unlearn --config {params.config:q} --variant {wildcards.variant:q}"
        " --threads {threads} --device auto > {log:q} 2>&1"


rule all_unlearn:
    input:
        [layout.regenerated(variant) for variant in REGENERATED],
        [
            path
            for variant in layout.config.unlearn
            for query in QUERIES
            for path in layout.unlearned(variant, query).values()
        ],


rule scan_base:
    input:
        MODEL,
        ENCODED,
        shards(layout.base_scan),
    output:
        layout.base_scan,
    log:
        log_file("scan", "base"),
    benchmark:
        benchmark_file("scan", "base")
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=120,
        gpu=0 if layout.config.scan.shards > 1 else 1,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("scan", "seed", scan=layout.config.scan.of_base()),
    shell:
        "forgetrace scan --config {params.config:q} --threads {threads} --device auto > {log:q} 2>&1"


rule scan:
    input:
        MODEL,
        ENCODED,
        layout.unlearned("{variant}", "{query}")["weights"],
        [layout.base_scan] if layout.config.scan.narrowing else [],
        shards(layout.scan("{variant}", "{query}")),
    output:
        layout.scan("{variant}", "{query}"),
    log:
        log_file("scan", "{variant}", "{query}"),
    benchmark:
        benchmark_file("scan", "{variant}", "{query}")
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=120,
        gpu=0 if layout.config.scan.shards > 1 else 1,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("scan", "scan", "seed"),
    shell:
        "forgetrace scan --config {params.config:q} --variant {wildcards.variant:q}"
        " --query {wildcards.query:q} --threads {threads} --device auto > {log:q} 2>&1"


# With scan.shards, scan and scan_base only put together what these jobs have computed.
rule scan_shard:
    input:
        MODEL,
        ENCODED,
        layout.unlearned("{variant}", "{query}")["weights"],
    output:
        temp(layout.scan_shard(layout.scan("{variant}", "{query}"), "{shard}")),
    log:
        log_file("scan", "{variant}", "{query}", "shard-{shard}"),
    benchmark:
        benchmark_file("scan", "{variant}", "{query}", "shard-{shard}")
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=120,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("scan", "scan", "seed"),
    shell:
        "forgetrace scan --config {params.config:q} --variant {wildcards.variant:q}"
        " --query {wildcards.query:q} --shard {wildcards.shard} --threads {threads} --device auto > {log:q} 2>&1"


rule scan_base_shard:
    input:
        MODEL,
        ENCODED,
    output:
        temp(layout.scan_shard(layout.base_scan, "{shard}")),
    log:
        log_file("scan", "base", "shard-{shard}"),
    benchmark:
        benchmark_file("scan", "base", "shard-{shard}")
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=120,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("scan", "seed", scan=layout.config.scan.of_base()),
    shell:
        "forgetrace scan --config {params.config:q} --shard {wildcards.shard}"
        " --threads {threads} --device auto > {log:q} 2>&1"


rule all_scan:
    input:
        [layout.base_scan] if QUERIES else [],
        [
            layout.scan(variant, query)
            for variant in layout.config.unlearn
            for query in QUERIES
        ],


rule score:
    input:
        lambda wildcards: registry.inputs(layout, wildcards.method, wildcards.query),
    output:
        layout.score("{method}", "{query}"),
    log:
        log_file("score", "{method}", "{query}"),
    benchmark:
        benchmark_file("score", "{method}", "{query}")
    wildcard_constraints:
        method=one_of(set(layout.config.score.methods).difference(TOGETHER)),
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        config=CONFIG_FILE,
        shaped_by=lambda wildcards: shaped_by(
            "score",
            "seed",
            ("score", "methods", wildcards.method),
            **registry.attributor(layout, wildcards.method).shaped_by(),
        ),
    shell:
        "forgetrace score --config {params.config:q} --method {wildcards.method:q}"
        " --query {wildcards.query:q} > {log:q} 2>&1"


# Methods that run the model over the training images do so once for all queries. update() keeps the scores that
# are there: the job finds out which of them are still right.
rule score_together:
    input:
        lambda wildcards: [
            path
            for query in QUERIES
            for path in registry.inputs(layout, wildcards.method, query)
        ],
    output:
        [update(layout.score("{method}", query)) for query in QUERIES],
    log:
        log_file("score", "{method}", "all"),
    benchmark:
        benchmark_file("score", "{method}", "all")
    wildcard_constraints:
        method=one_of(TOGETHER),
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=240,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=lambda wildcards: shaped_by(
            "score",
            "seed",
            ("score", "methods", wildcards.method),
            **registry.attributor(layout, wildcards.method).shaped_by(),
        ),
    shell:
        "forgetrace score --config {params.config:q} --method {wildcards.method:q}"
        " --threads {threads} --device auto > {log:q} 2>&1"


rule all_score:
    input:
        [path for query in QUERIES for path in scores(query)],
