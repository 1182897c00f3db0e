# Which training images made this image, and is it true? One config file, one experiment.


include: "workflow/rules/common.smk"
include: "workflow/rules/dataset.smk"
include: "workflow/rules/model.smk"
include: "workflow/rules/attribution.smk"


if layout.config.leaves_out:

    include: "workflow/rules/counterfactual.smk"

else:

    include: "workflow/rules/no_counterfactual.smk"


include: "workflow/rules/customized.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/figures.smk"


report: "workflow/report/workflow.rst"


rule all:
    default_target: True
    input:
        rules.all_encode.input,
        rules.all_train.input,
        rules.all_synthesize.input,
        rules.all_fit.input,
        rules.all_unlearn.input,
        rules.all_scan.input,
        rules.all_score.input,
        rules.all_retrain.input,
        rules.all_customize.input,
        rules.all_retrieve.input,
        rules.all_learn.input,
        rules.all_evaluate.input,
        rules.all_figures.input,
