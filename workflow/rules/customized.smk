# customize, retrieve, learn: models with a known origin of what they make, and who finds it.


rule customize:
    input:
        MODEL,
        ENCODED,
        lambda wildcards: given_for(wildcards.model),
    output:
        list(layout.customized("{model}").values()),
    log:
        log_file("customize", "{model}"),
    benchmark:
        benchmark_file("customize", "{model}")
    wildcard_constraints:
        model=one_of(MODELS),
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
        # Without how many models there are: one more leaves the others as they are.
        shaped_by=lambda wildcards: shaped_by(
            "customize synthesize",
            "seed",
            ("synthesize", "sampler_steps"),
            ("synthesize", "guidance"),
            **concepts.shaping(layout.config.customize, wildcards.model),
        ),
    shell:
        "forgetrace customize --config {params.config:q} --model {wildcards.model:q}"
        " --threads {threads} --device auto > {log:q} 2>&1"


rule all_customize:
    input:
        [path for model in MODELS for path in layout.customized(model).values()],


rule retrieve:
    input:
        MODEL,
        ENCODED,
        list(layout.customized("{model}").values()),
        ranking_inputs(),
    output:
        layout.ranks("{model}"),
    log:
        log_file("retrieve", "{model}"),
    benchmark:
        benchmark_file("retrieve", "{model}")
    wildcard_constraints:
        model=one_of(MODELS),
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=600,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by(
            "retrieve unlearn scan score",
            "seed",
            "unlearn",
            "score",
            scan=layout.config.scan.of_base()
            | layout.config.scan.model_dump(include={"narrowing"}),
            costly=(
                layout.config.retrieve.model_dump() if layout.config.retrieve else None
            ),
        ),
    shell:
        "forgetrace retrieve --config {params.config:q} --model {wildcards.model:q}"
        " --threads {threads} --device auto > {log:q} 2>&1"


rule all_retrieve:
    input:
        [layout.ranks(model) for model in CONCEPTS["test"]],


rule learn:
    input:
        ENCODED,
        [path for model in MODELS for path in layout.customized(model).values()],
        ranking_inputs(),
        [layout.features(name) for name in FEATURES if name.startswith("image-")],
    output:
        list(layout.learned.values()),
    log:
        log_file("learn", "learn"),
    benchmark:
        benchmark_file("learn", "learn")
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by(
            "learn",
            "seed",
            learn=layout.config.learn and layout.config.learn.model_dump(),
        ),
    shell:
        "forgetrace learn --config {params.config:q} --threads {threads} --device auto > {log:q} 2>&1"


rule all_learn:
    input:
        list(layout.learned.values()) if layout.config.learn else [],
