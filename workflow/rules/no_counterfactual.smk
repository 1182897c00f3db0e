# In place of counterfactual.smk where θ0 is given and nobody says what it was trained from, and how, or where
# customised models are judged by their exemplars.

if not layout.config.train.trains:
    print(f"No leave-K-out models: {layout.config.train.lacks}.", file=sys.stderr)


rule all_retrain:
    input:
        [],
