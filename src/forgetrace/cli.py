"""The command line: one subcommand per stage, each of them parse, load, call, save.

Heavy imports happen inside the commands, so that ``--help`` and Snakemake's DAG stay quick.
"""

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from forgetrace.artifacts import UserError
from forgetrace.attribution.registry import all_features, attributor, check_methods, describe
from forgetrace.imports import lean_diffusers
from forgetrace.layout import Layout, load_layout

app = typer.Typer(
    help="Which training images made this generated image? One subcommand per stage of the workflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigPath = Annotated[Path, typer.Option("--config", help="The experiment: config/<name>.yaml.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …; auto takes CUDA where there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; does not change the result beyond rounding.")]
QueryName = Annotated[str, typer.Option("--query", help="Name of a query, such as report-00.")]


def _experiment(config: Path, query: str | None = None) -> Layout:
    layout = load_layout(config)
    check_methods(layout.config)
    if query is not None and query not in (names := layout.config.queries()):
        raise UserError(f"--query {query}: {config} has no such query (it has {', '.join(names)}).")
    # Merging a LoRA is what needs all of diffusers. A process that has torch already is somebody else's.
    if not layout.config.train.lora and "torch" not in sys.modules:
        lean_diffusers()
    return layout


def _use(threads: int | None) -> None:
    # Called after the config was read: a typo must not cost the seconds torch takes to import.
    if threads:
        import torch

        torch.set_num_threads(threads)


def _variant(layout: Layout, variant: str) -> str:
    if variant not in layout.config.unlearn:
        known = ", ".join(layout.config.unlearn) or "none"
        raise UserError(f"--variant {variant}: the section 'unlearn' has no such variant (it has {known}).")
    return variant


@app.command()
def prepare(config: ConfigPath) -> None:
    """Build the dataset: images, captions and caption pools."""
    layout = _experiment(config)
    from forgetrace.datasets.prepare import prepare

    prepare(layout.config.prepare, layout.data)


@app.command()
def encode(config: ConfigPath, device: Device = "auto") -> None:
    """Turn training images into latents and captions into token states."""
    layout = _experiment(config)
    from forgetrace.encoding.encode import encode

    if not layout.config.encode.pipeline:  # the built-in encoders are the CPU's, and none runs for what is given
        encode(layout)
        return
    from forgetrace.diffusion.device import pick_device

    encode(layout, pick_device(device))


@app.command()
def train(config: ConfigPath, device: Device = "auto") -> None:
    """Train the attributed model θ0.

    On several GPUs: accelerate launch -m forgetrace.cli train …; in several processes on CPUs:
    torchrun --nproc-per-node 2 -m forgetrace.cli train … --device cpu.
    """
    layout = _experiment(config)
    from forgetrace.diffusion.base import train_base

    train_base(layout, device)


@app.command()
def synthesize(config: ConfigPath, query: QueryName, threads: Threads = None, device: Device = "auto") -> None:
    """Generate one query, or read it from the user's image file or a release."""
    layout = _experiment(config, query)
    _use(threads)
    from forgetrace.diffusion.synthesis import synthesize

    synthesize(layout, query, device)


@app.command()
def fit(
    config: ConfigPath,
    features: Annotated[
        str | None, typer.Option(help="Compute these features of the training images; without it the Fisher.")
    ] = None,
    curvature: Annotated[Literal["diagonal", "ekfac"], typer.Option(help="The curvature to fit.")] = "diagonal",
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Compute once per model what methods need: Fisher information, features of the training images."""
    layout = _experiment(config)
    known = all_features(layout, device)
    if features is not None and features not in known:
        raise UserError(
            f"--features {features}: nothing in {config} needs them (there are {', '.join(known) or 'none'})."
        )
    _use(threads)
    if features is not None:
        known[features].fit()
        return
    from forgetrace.curvature.fit import fit

    fit(layout, curvature, device)


@app.command()
def unlearn(
    config: ConfigPath,
    variant: Annotated[str, typer.Option(help="A variant of the config's section unlearn.")],
    query: Annotated[
        str | None,
        typer.Option(help="Query to forget; without it, those forgotten and other images are generated again."),
    ] = None,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Make the model forget one query; show what it then makes of all of them and of other images."""
    layout = _experiment(config, query)
    _use(threads)
    if query is None:
        if not layout.config.evaluate.others:
            raise UserError("Give --query, or set evaluate.others to see what forgetting changes.")
        from forgetrace.unlearning.quality import regenerate_unlearned

        regenerate_unlearned(layout, _variant(layout, variant), device)
        return
    from forgetrace.unlearning.variants import unlearn_query

    unlearn_query(layout, _variant(layout, variant), query, device)


@app.command()
def sweep(
    config: ConfigPath,
    variant: Annotated[str, typer.Option(help="A variant of the config's section unlearn.")],
    queries: Annotated[
        int, typer.Option(help="Captions of the tuning pool, or images of validation models, to use.", min=1)
    ] = 4,
    share: Annotated[float, typer.Option(help="Largest relative rise of the loss of other images.")] = 0.01,
    table: Annotated[Path | None, typer.Option(help="Also write what was tried, as .csv.")] = None,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Choose a variant's step size on tuning queries or validation models, without any counterfactual."""
    layout = _experiment(config)
    _use(threads)
    from forgetrace.artifacts import write_table
    from forgetrace.unlearning.sweep import sweep, tuning_subjects

    name = _variant(layout, variant)
    if layout.config.customize:
        from forgetrace.attribution.candidates import discard, validation_subjects

        subjects = validation_subjects(layout, queries)
    else:
        subjects = tuning_subjects(layout, queries, device)
    chosen, tried = sweep(layout, name, subjects, share, device)
    if layout.config.customize:
        for subject in subjects:
            discard(subject.layout)
    if table:
        write_table(table, tried)
    summary = tried.groupby("step_size")[["query_before", "query_after", "others_before", "others_after"]].mean()
    typer.echo(summary.to_string(float_format="%.6g"))
    typer.echo(f"step_size: {chosen:.1e}  # largest that raises other images' loss by at most {share:.1%}")


@app.command()
def tune(
    config: ConfigPath,
    method: Annotated[str, typer.Option(help="A method of the config's section score; without --option, several.")],
    option: Annotated[str | None, typer.Option(help="A key of its entry or of its unlearning variant.")] = None,
    values: Annotated[str | None, typer.Option(help="What to try, separated by commas; goes with --option.")] = None,
    table: Annotated[Path | None, typer.Option(help="Also write every query's score, as .csv.")] = None,
    partial: Annotated[bool, typer.Option(help="Make do with the random halves trained so far.")] = False,
    leave_out: Annotated[
        int | None,
        typer.Option(help="Judge by a training without so many top images of every tuning query.", min=1),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(help="Where models are customised: images of validation models to try; by default 16.", min=1),
    ] = None,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Choose an option of a method on tuning queries, by linear datamodeling score (LDS) or leaving images out.

    Where models are customised it is chosen on validation models, by the average precision of their exemplars.
    Without --option the methods of --method, separated by commas, are judged as they are, by leaving images out.
    """
    if (option is None) != (values is None):
        raise UserError("--option and --values go together; without both, methods are judged as they are.")
    layout = _experiment(config)
    _use(threads)
    from forgetrace.artifacts import write_table
    from forgetrace.evaluation.tune import best, compare, judged_by, tune

    if option is None:
        if layout.config.customize or partial or queries or not leave_out:
            raise UserError("Methods are judged as they are by --leave-out K alone; or give --option and --values.")
        tried = compare(layout, [name.strip() for name in method.split(",")], leave_out, device)
    elif layout.config.customize:
        from forgetrace.evaluation.tune_exemplars import tune_on_exemplars

        if partial or leave_out:
            raise UserError("--partial and --leave-out have no effect where models are customised: leave them out.")
        tried = tune_on_exemplars(layout, method, option, values.split(","), queries or 16, device)
    else:
        if queries:
            raise UserError("--queries has no effect without customised models: all queries of the tuning pool count.")
        tried = tune(layout, method, option, values.split(","), device, partial, leave_out)
    if table:
        write_table(table, tried)
    summary = tried.groupby("value", sort=False)[judged_by(tried)].agg(["mean", "sem", "count"])
    typer.echo(summary.to_string(float_format="{:.4f}".format))
    typer.echo(f"{f'{method}.{option}' if option else 'best'}: {best(tried)}")


@app.command()
def scan(
    config: ConfigPath,
    variant: Annotated[str | None, typer.Option(help="Unlearning variant; without it θ0 is scanned.")] = None,
    query: Annotated[str | None, typer.Option(help="Query that was unlearned; goes with --variant.")] = None,
    shard: Annotated[
        int | None, typer.Option(help="Scan one of scan.shards parts of the images, from 0; by default all.", min=0)
    ] = None,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Loss of every training image and timestep."""
    if (variant is None) != (query is None):
        raise UserError("--variant and --query go together; without both, θ0 is scanned.")
    layout = _experiment(config, query)
    if shard is not None and shard >= (shards := layout.config.scan.shards):
        raise UserError(f"--shard {shard}: scan.shards of {config} is {shards}, and the first shard is 0.")
    _use(threads)
    from forgetrace.attribution.scan import scan

    scan(layout, _variant(layout, variant) if variant else None, query, device, shard)


@app.command(help=f"Rank the training images for one query.\n\n\b\nAttribution methods:\n{describe()}")
def score(  # noqa: D103 - its help is built from the registry
    config: ConfigPath,
    method: Annotated[str, typer.Option(help="A method of the config's section score.")],
    query: Annotated[str | None, typer.Option(help="Name of a query; by default all that are not scored.")] = None,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    layout = _experiment(config, query)
    attributor(layout, method)
    _use(threads)
    from forgetrace.attribution.score import score

    score(layout, method, query, device)


ModelName = Annotated[str, typer.Option("--model", help="A customised model, such as object-king.")]


def _customised(config: Path, model: str | None = None) -> Layout:
    layout = _experiment(config)
    if not layout.config.customize:
        raise UserError(f"{config} has no section customize, so there are no customised models.")
    from forgetrace.datasets.concepts import names

    known = [name for part in names(layout.config.customize, layout.config.seed).values() for name in part]
    if model is not None and model not in known:
        raise UserError(f"--model {model}: {config} has no such model (it has {', '.join(known)}).")
    return layout


@app.command()
def customize(config: ConfigPath, model: ModelName, threads: Threads = None, device: Device = "auto") -> None:
    """Customise θ0 on one concept's exemplars and let it generate its images."""
    layout = _customised(config, model)
    _use(threads)
    from forgetrace.diffusion.customization import customize

    customize(layout, model, device)


@app.command()
def retrieve(config: ConfigPath, model: ModelName, threads: Threads = None, device: Device = "auto") -> None:
    """Rank a customised model's exemplars and the base set for its images, by every method."""
    layout = _customised(config, model)
    _use(threads)
    from forgetrace.attribution.retrieve import retrieve

    retrieve(layout, model, device)


@app.command()
def learn(config: ConfigPath, threads: Threads = None, device: Device = "auto") -> None:
    """Learn features in which images of customised models are near their exemplars, and calibrate them."""
    layout = _customised(config)
    if not layout.config.learn:
        raise UserError(f"{config} has no section learn, so there is nothing to learn.")
    _use(threads)
    from forgetrace.attribution.learn import learn

    learn(layout, device)


@app.command()
def retrain(
    config: ConfigPath,
    method: Annotated[str | None, typer.Option(help="A method of the experiment, random, seed, or half.")] = None,
    k: Annotated[int | None, typer.Option(help="Images to leave out (0 for seed and half).")] = None,
    member: Annotated[str | None, typer.Option(help="A query, draw<i> for random, seed and half, or pool<i>.")] = None,
    together: Annotated[
        str | None,
        typer.Option(
            help="In place of these three, all models of a set, retrain.stack as one: shared, half, pools, or a "
            "judged method."
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train leave-K-out models from scratch, and measure those that belong to one query."""
    layout = _experiment(config)
    if together is None and None not in (method, k, member):
        models = [(method, k, member)]
    elif together is not None and (method, k, member) == (None, None, None):
        if together not in (sets := layout.retraining_sets()):
            raise UserError(f"--together {together}: {config} has no such set (it has {', '.join(sets) or 'none'}).")
        models = sets[together]
    else:
        raise UserError("Give --method, --k and --member for one model, or --together for all models of a set.")
    from forgetrace.counterfactual.retrain import retrain

    retrain(layout, models, device)


@app.command()
def measure(config: ConfigPath, query: QueryName, threads: Threads = None, device: Device = "auto") -> None:
    """Ask θ0 and the retrainings all queries share for one query's loss and image."""
    layout = _experiment(config, query)
    _use(threads)
    from forgetrace.counterfactual.retrain import measure_shared

    measure_shared(layout, query, device)


@app.command()
def evaluate(
    config: ConfigPath,
    partial: Annotated[
        bool,
        typer.Option(
            help="Make do with what is there, by whatever settings it was made; rows of methods without scores stay."
        ),
    ] = False,
) -> None:
    """Turn measurements into tables with intervals and tests."""
    layout = _experiment(config)
    from forgetrace.evaluation.tables import evaluate

    evaluate(layout, partial=partial)


@app.command()
def figures(
    config: ConfigPath,
    name: Annotated[
        str,
        typer.Option(
            help="training, delta, lds, unlearning, precision, attribution-<query>, regions-<query> or "
            "counterfactual-<query>."
        ),
    ],
) -> None:
    """Draw one figure as PNG and PDF."""
    layout = _experiment(config)
    from forgetrace.figures.catalogue import draw

    draw(layout, name)


@app.command()
def plan(
    config: ConfigPath,
    cores: Annotated[int | None, typer.Option(help="Cores that jobs share; by default all of them.", min=1)] = None,
    device: Device = "auto",
) -> None:
    """Estimate the hours, memory and disk of every stage, from about twenty seconds of timing on this machine."""
    layout = _experiment(config)
    if layout.config.customize:
        raise UserError(
            f"plan cannot estimate the customised models of {config}: see docs/customized.md for their times."
        )
    from forgetrace.planning.estimate import plan

    typer.echo(plan(layout, cores, device))


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The experiment; its config becomes config/<name>.yaml.")],
    data: Annotated[Path, typer.Option(help="Folder of images with metadata.jsonl or metadata.csv: file_name, text.")],
    device: Device = "auto",
) -> None:
    """Write a first config for your own captioned images, sized to them and, by timing, to this machine."""
    from forgetrace.planning.draft import init

    file, summary = init(name, data.as_posix(), device)
    typer.echo(f"{file}: {summary}\nNext: forgetrace plan --config {file}; make reproduce EXPERIMENT={name}")


@app.command("import-release")
def import_release(
    source: Annotated[Path, typer.Argument(help="AttributeByUnlearning's data/mscoco or FastGDA's data/coco.")],
    to: Annotated[Path, typer.Option(help="Folder to convert to: about half of the source's size, for COCO 100 GB.")],
    name: Annotated[str | None, typer.Option(help="The experiment; by default named after the folder.")] = None,
) -> None:
    """Convert published artifacts and write a config that runs their setting; run again, it goes on where it was."""
    from forgetrace.release.convert import import_release

    file, found = import_release(source, to, name)
    typer.echo(f"{found}\nNext: make reproduce EXPERIMENT={file.stem}; forgetrace compare-release --config {file} ...")


@app.command("compare-release")
def compare_release(
    config: ConfigPath,
    influence: Annotated[
        Path | None,
        typer.Option(help="A folder of influence_<i>.pkl, or influence_test.pkl or influence_train.pkl."),
    ] = None,
    losses: Annotated[Path | None, typer.Option(help="AbU's pretrain_loss.npy, to compare θ0's scan with.")] = None,
    method: Annotated[
        str | None, typer.Option(help="A method of the section score; by default the first that unlearns.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Also write every query's comparison, as .csv.")] = None,
) -> None:
    """Compare scores with published ones of the same queries: rank correlation, overlap of the top images."""
    layout = _experiment(config)
    if not (influence or losses):
        raise UserError("Give --influence, published scores, or --losses, published losses of the model, or both.")
    from forgetrace.artifacts import write_table
    from forgetrace.release.compare import compare, compare_losses, unlearning_method

    if losses:
        typer.echo("; ".join(f"{what} {value:.6g}" for what, value in compare_losses(layout, losses).items()))
    if not influence:
        return
    compared = compare(layout, influence, method or unlearning_method(layout))
    if table:
        write_table(table, compared)
    typer.echo(compared.to_string(index=False, float_format="%.4g"))
    typer.echo(f"mean of {len(compared)} queries:")
    typer.echo(compared.mean(numeric_only=True).to_string(float_format="%.4g"))


@app.command("evaluate-abc")
def evaluate_abc(
    background: Annotated[Path, typer.Option(help="Features of the background images, laion_subset.pth.")],
    features: Annotated[Path, typer.Option(help="Features of a file of test cases, such as test_artchive.pth.")],
    cases: Annotated[
        Path | None,
        typer.Option(help="The test cases, such as json/test_artchive.json: checks that they are the same."),
    ] = None,
    heads: Annotated[Path | None, typer.Option(help="Learned heads, such as mapper/clip_tuned.pth.")] = None,
    calibrator: Annotated[
        Path | None, typer.Option(help="Such as calibrator/clip_tuned.pth: also the probability of the exemplars.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Also write every query's metrics, as .csv.")] = None,
    device: Device = "auto",
) -> None:
    """Judge published features on the published customised models (AbC): average precision and recall of exemplars."""
    from forgetrace.artifacts import write_table
    from forgetrace.diffusion.device import pick_device
    from forgetrace.release.abc import (
        check_cases,
        read_calibrator,
        read_case_features,
        read_cases,
        read_features,
        read_heads,
    )
    from forgetrace.release.abc_judge import judge, summarised

    known = read_features(background)
    width = known.values.shape[1]
    found = read_case_features(features, width)
    if cases:
        check_cases(features, found, read_cases(cases))
    learned = read_heads(heads, width) if heads else None
    values = judge(known, found, learned, read_calibrator(calibrator) if calibrator else None, pick_device(device))
    if table:
        write_table(table, values)
    typer.echo(summarised(values).to_string(index=False, float_format="%.4f"))


@app.command("import-abc")
def import_abc(
    tasks: Annotated[Path, typer.Argument(help="AbU's list of customised models and their images, all_tasks.json.")],
    root: Annotated[Path, typer.Option(help="Folder of AbC's data: json/, exemplar/, synth/, models/.")],
    to: Annotated[Path, typer.Option(help="Folder for the list, weights and tokens; images stay where they are.")],
) -> None:
    """Convert published customised models to a list for customize.given; run again, it goes on where it was."""
    from forgetrace.release.abc_models import import_models

    count = import_models(tasks, root, to)
    typer.echo(f"{count} customised models.\nNext: customize: {{given: {to / 'concepts.json'}}} in a config.")


@app.command()
def tidy(
    config: ConfigPath,
    remove: Annotated[bool, typer.Option(help="Delete the files instead of listing them.")] = False,
) -> None:
    """List results and checkpoints that the config no longer asks for, such as those of a removed query."""
    layout = _experiment(config)
    from forgetrace.figures.catalogue import names

    wanted = layout.files() | {layout.figure(name, kind) for name in names(layout) for kind in ("png", "pdf")}
    wanted |= {path for name in all_features(layout) for path in (layout.features(name), layout.features_record(name))}
    for method in layout.config.score.methods:
        wanted |= {path for query in layout.config.queries()[:1] for path in attributor(layout, method).inputs(query)}
    if layout.config.customize:
        from forgetrace.attribution.asked import customised_files

        wanted |= customised_files(layout)
    unfinished = {Path(folder) for folder in layout.unfinished()}
    made = ("report.html", "rules.dot", "rules.svg")  # by make report and make dag
    chosen = {Path(layout.root, command) for command in ("tune", "sweep")}  # what the config's values rest on
    for path in sorted(path for path in Path(layout.root).rglob("*") if path.is_file()):
        if path.as_posix() not in wanted and path.name not in made and (unfinished | chosen).isdisjoint(path.parents):
            typer.echo(path)
            if remove:
                path.unlink()


@app.command()
def schema(
    write: Annotated[bool, typer.Option(help="Write the schema and the key tables into the repository.")] = False,
) -> None:
    """Print the JSON schema of a config."""
    from forgetrace.schema import print_or_write

    print_or_write(write)


def main() -> None:
    """Run the command line; a user's mistake ends with one sentence and exit code 1."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        app()
    except UserError as error:
        print(f"forgetrace: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
