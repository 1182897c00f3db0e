"""The work of an experiment by stage, counted from its config as ``workflow/rules`` ask for it."""

from typing import NamedTuple

from forgetrace.attribution.registry import attributor, together
from forgetrace.config import Config
from forgetrace.figures import catalogue
from forgetrace.layout import Layout

# Units of work: a job's start without and with torch, then what it does; a training step is a batch of evaluations.
START, TORCH = "start", "start with torch"
PREPARED, FIGURE, CAPTION, STEP = "dataset prepared", "figure drawn", "caption encoded", "training step"
STACKED = "training step in a stack"  # of one of its models
IMAGE = "image read"
SAMPLER, LOSS, SCAN = "sampler evaluation", "loss evaluation", "scan evaluation"
GRADIENT, FISHER, EKFAC = "query gradient draw", "per-example gradient", "EK-FAC draw and pass"
FITTED = {"diagonal": (FISHER, 1), "ekfac": (EKFAC, 2)}  # by curvature, what a fit does with a draw and how often
EVALUATIONS = (SAMPLER, LOSS, SCAN, GRADIENT, FISHER, EKFAC)
# What `unlearn` looks at before and after: draws of the query's loss; other images, draws of each.
QUERY_DRAWS, OTHERS, OTHERS_DRAWS = 1000, 256, 4


class Work(NamedTuple):
    """All work of one stage: its jobs, their units together by kind, the threads (cores) of one job, models trained."""

    jobs: int
    units: dict[str, int]
    threads: int = 1
    trainings: int = 0

    def evaluations(self, batch_size: int) -> int:
        """UNet evaluations, with or without gradient; ``batch_size`` is that of a training step."""
        steps = self.units.get(STEP, 0) + self.units.get(STACKED, 0)
        return steps * batch_size + sum(self.units.get(unit, 0) for unit in EVALUATIONS)


def fitted(config: Config) -> dict[str, tuple[str, int]]:
    """The part of ``FITTED`` that the variants of a config ask for."""
    wanted = {variant.curvature for variant in config.unlearn.values()}
    return {curvature: work for curvature, work in FITTED.items() if curvature in wanted}


def count(layout: Layout, images: int, captions: int, views: float = 1) -> dict[str, Work]:
    """The work of every stage, finished or not.

    Args:
        layout: the experiment.
        images: N, those that are trained on.
        captions: their distinct ones.
        views: captions times orientations of an image, on average.
    """
    config, queries, judged = layout.config, layout.config.queries(), layout.config.judged_queries()
    generated = [query for query in queries if config.generates(query)]  # a given image is not sampled
    shared, recipe, variants = layout.shared_models(), config.train, config.unlearn.values()
    # Leave-K-out models of one query.
    own = len(layout.measured_models(judged[0])) - len(shared) if judged else 0
    at_once, retrained = len(layout.asked_at_once()), len(layout.retrainings())
    sampled = config.synthesize.sampler_steps * (1 if config.synthesize.guidance == 1 else 2)
    asked = len(range(0, recipe.timesteps, config.evaluate.timestep_stride)) * config.evaluate.draws

    def measuring(models: int, all_queries: int = 0) -> dict[str, int]:
        """Each judged query by so many models, and every query by so many."""
        # A region is asked about as a whole, inside and outside.
        pairs = models * sum(3 if config.region(query) else 1 for query in judged) + all_queries * len(queries)
        drawn = models * len(set(judged).intersection(generated)) + all_queries * len(generated)
        return {LOSS: pairs * asked, SAMPLER: drawn * sampled}

    unlearned, fits, shards = len(variants) * len(queries), fitted(config), config.scan.shards
    scans = (1 + unlearned) * (shards + 1 if shards > 1 else 1)  # one more puts the shards together
    mirrored = sum(variant.procedure == "mucs" for variant in variants)  # asks an untrained model for its loss too
    gradients = len(queries) * sum(v.steps * v.draws * (2 if v.procedure == "mucs" else 1) for v in variants)  # at most
    asking, narrowing = {TORCH: len(queries)}, config.scan.narrowing
    stacks = config.retrain.stack > 1  # then one job makes all models of a set
    making = len(layout.retraining_sets()) if stacks else retrained
    training = {TORCH: making, STACKED if stacks else STEP: retrained * recipe.steps} if recipe.trains else {}
    most, mean = (narrowing.most, narrowing.mean) if narrowing else (config.scan.timesteps,) * 2  # of θ0, of a query
    checks = 2 * (QUERY_DRAWS + OTHERS_DRAWS * min(OTHERS, images)) * unlearned + QUERY_DRAWS * mirrored * len(queries)
    # Generated before, and with every query unlearned: that query and the others.
    forgotten, others = len(config.forgotten_queries()), config.evaluate.others
    again = len(variants) * (forgotten + others + forgotten * (1 + others)) * sampled if others else 0
    looks = len(variants) if others else 0
    passes, figures = len(together(layout)), len(catalogue.names(layout))  # a job of each such method; see estimate
    scores = (len(config.score.methods) - passes) * len(queries) + passes
    opened = images * len(queries) * sum(attributor(layout, method).opens_images for method in config.score.methods)
    return {
        "prepare": Work(1, {START: 1, PREPARED: 1} | ({IMAGE: images} if config.prepare.path else {})),
        "encode": Work(1, {TORCH: 1, IMAGE: images * (1 + config.encode.flips), CAPTION: captions}),
        "train": Work(
            1,
            {TORCH: 1} | ({} if recipe.pretrained else {STEP: recipe.steps}),
            recipe.threads,
            int(not recipe.pretrained),
        ),
        "synthesize": Work(
            len(queries),
            asking
            | {CAPTION: len(queries), SAMPLER: sampled * len(set(generated).intersection(config.whole_queries()))},
        ),
        "fit": Work(len(fits), {TORCH: len(fits)} | {unit: config.fit.draws * n for unit, n in fits.values()}),
        "unlearn": Work(
            unlearned + looks, {TORCH: unlearned + looks, GRADIENT: gradients, LOSS: checks, SAMPLER: again}
        ),
        "scan": Work(scans, {TORCH: scans, SCAN: round(images * views * (most + unlearned * mean))}),
        "score": Work(scores, {START: scores} | ({IMAGE: opened} if opened else {})),
        "retrain": Work(making, training | measuring(own, at_once), recipe.threads, retrained),
        "measure": Work(len(judged), {TORCH: len(judged)} | measuring(len(shared))),
        "evaluate": Work(1, {TORCH: 1}),
        "figures": Work(figures, {START: figures, FIGURE: figures}),
    }
