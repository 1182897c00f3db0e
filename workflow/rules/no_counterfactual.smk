# In place of counterfactual.smk where θ0 is given and nobody says what it was trained from, and how, or where
# customised models are judged by their exemplars.

if not layout.config.train.trains:
    print(
        "No leave-K-out models: name what the given θ0 was fine-tuned from in train.parent, and give its recipe.",
        file=sys.stderr,
    )


rule all_retrain:
    input:
        [],
