# train and synthesize: the model under study and the images whose influence is asked for.


# update() leaves what is there in place: a θ0 or a query of the same recipe, maybe of another machine, is kept.
rule train:
    input:
        ENCODED,
        PARENT,
        # Those of a model from elsewhere, where it is a folder too.
        pipeline.local_files(layout.config.train.pretrained, ["unet", "scheduler"]),
        pipeline.local_files(layout.config.train.lora, ["."]),
    output:
        [update(path) for path in MODEL],
        [update(path) for path in layout.snapshots],
        update(layout.curve),
        update(layout.recipe),
    log:
        log_file("train", "train"),
    benchmark:
        benchmark_file("train", "train")
    # Everything but the shared retrainings waits for it.
    priority: TRAINING_FIRST
    conda:
        "../envs/forgetrace.yaml"
    threads: layout.config.train.threads
    resources:
        mem_mb=3000,
        runtime=240,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("train", "train", "seed"),
    shell:
        "forgetrace train --config {params.config:q} --device auto > {log:q} 2>&1"


rule all_train:
    input:
        rules.train.output,


rule synthesize:
    input:
        MODEL,
        layout.captions,
        layout.encode_manifest,
        layout.metadata,
        layout.data_manifest,
        own_image=lambda wildcards: own_image(wildcards.query),
    output:
        [update(path) for path in layout.query("{query}").values()],
    log:
        log_file("synthesize", "{query}"),
    benchmark:
        benchmark_file("synthesize", "{query}")
    wildcard_constraints:
        query=one_of(layout.config.whole_queries()),
    priority: SCORES_NEXT
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
        gpu=1,
    params:
        config=CONFIG_FILE,
        shaped_by=lambda wildcards: shaped_by(
            "synthesize",
            "seed",
            ("synthesize", "sampler_steps"),
            ("synthesize", "guidance"),
            prompt=getattr(layout.config.image_query(wildcards.query), "prompt", None),
            **READ_ANEW if layout.config.image_query(wildcards.query) else {},
        ),
    shell:
        "forgetrace synthesize --config {params.config:q} --query {wildcards.query:q} --threads {threads}"
        " --device auto > {log:q} 2>&1"


# A region of a query: the same image, latent and noise, and which part of them is meant.
rule synthesize_region:
    input:
        lambda wildcards: list(
            layout.query(layout.config.whole(wildcards.query)).values()
        ),
        region=lambda wildcards: region_files(settings_of_region(wildcards.query)),
        detector=lambda wildcards: (
            pipeline.local_files(layout.config.synthesize.detector, ["."])
            if settings_of_region(wildcards.query).phrase
            else []
        ),
    output:
        list(layout.query("{query}").values()),
    log:
        log_file("synthesize", "{query}"),
    benchmark:
        benchmark_file("synthesize", "{query}")
    wildcard_constraints:
        query=one_of(REGIONS),
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
            "synthesize",
            region=settings_of_region(wildcards.query).model_dump(mode="json"),
            detector=(
                layout.config.synthesize.detector,
                layout.config.synthesize.detector_threshold,
            ),
            **READ_ANEW if settings_of_region(wildcards.query).mask else {},
        ),
    shell:
        "forgetrace synthesize --config {params.config:q} --query {wildcards.query:q} --threads {threads}"
        " --device auto > {log:q} 2>&1"


rule all_synthesize:
    input:
        [path for query in QUERIES for path in layout.query(query).values()],
