# prepare and encode: from a dataset's source to arrays a model trains on.


rule prepare:
    input:
        # The list of one's own images; nothing for a bundled dataset.
        lambda wildcards: source_files(layout.config.prepare),  # a path may have braces
    output:
        layout.metadata,
        layout.data_manifest,
    log:
        log_file("prepare", layout.config.prepare.dataset),
    benchmark:
        benchmark_file("prepare", layout.config.prepare.dataset)
    conda:
        "../envs/forgetrace.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=120,
        # Not under params, whose changes run the rule again: experiments share the data they agree on.
        config=CONFIG_FILE,
    params:
        shaped_by=shaped_by("prepare", "prepare"),
    shell:
        "forgetrace prepare --config {resources.config:q} > {log:q} 2>&1"


rule encode:
    input:
        layout.metadata,
        layout.data_manifest,
        pipeline.local_files(
            layout.config.encode.pipeline, ["vae", "text_encoder", "tokenizer"]
        ),
        GIVEN_ENCODED,
    output:
        ENCODED,
    log:
        log_file("encode", "encode"),
    benchmark:
        benchmark_file("encode", "encode")
    conda:
        "../envs/forgetrace.yaml"
    threads: 2
    resources:
        mem_mb=2000,
        runtime=120,
    params:
        config=CONFIG_FILE,
        shaped_by=shaped_by("encode", "encode", "seed"),
    shell:
        "forgetrace encode --config {params.config:q} > {log:q} 2>&1"


if layout.config.encode.pipeline:

    # The encoders of a pipeline have work for a GPU, and more weights than those that ship with the environment.
    use rule encode as encode_pipeline with:
        resources:
            mem_mb=8000,
            runtime=600,
            gpu=1,

    ruleorder: encode_pipeline > encode


rule all_encode:
    input:
        ENCODED,
