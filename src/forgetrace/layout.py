"""Where every file of an experiment lives; the rules and the command line share these paths.

Paths are relative POSIX strings, so a Snakemake rule can pass its own wildcards as arguments:
``layout.score("{method}", "{query}")`` is the pattern of a rule's output.
"""

from dataclasses import dataclass
from pathlib import Path

from forgetrace.artifacts import safe_name
from forgetrace.config import HALF_SET, RANDOM, SEED_SET, Config, load_config

BASE = "base"  # θ0 where a model is named by (method, k, member)
SHARED, POOLS = "shared", "pools"  # sets of models, beside those of methods and halves
STACKED = "stacked"  # folder for checkpoints of models that are trained as one


def training_name(method: str, k: int, member: str) -> str:
    """The training of the model (method, k, member), for messages and its checkpoints."""
    return BASE if method == BASE else f"{method}-k{k}-{member}"


@dataclass(frozen=True)
class Layout:
    """Files of one experiment.

    Attributes:
        name: the experiment, the stem of its config file.
        config: its validated config.
    """

    name: str
    config: Config

    @property
    def root(self) -> str:
        """Folder of all results of the experiment."""
        return f"results/{self.name}"

    def checkpoints(self, work: str) -> str:
        """Folder of an unfinished training, scan or fit; outside every stage's outputs, emptied at the end."""
        return f"{self.root}/checkpoints/{work}"

    def unfinished(self) -> set[str]:
        """Every folder in which trainings, scans, features and scores of the current config may leave checkpoints."""
        models = {(BASE, 0, BASE), *self.retrainings()}
        return {
            self.checkpoints(name)
            for name in ("scan", "features", "score", "retrieve", STACKED, *(training_name(*model) for model in models))
        }

    # prepare: shared by all experiments with the same settings of it

    @property
    def data(self) -> str:
        """Dataset folder: ``metadata.jsonl``, ``manifest.json`` and, of the digits, ``images/``.

        Its name holds every setting that is not the default, so that no experiment rewrites another's data; of a
        path, a short hash too. DVC versions the digits of the default settings alone: .dvcignore names all folders
        of data/ with a hyphen.
        """
        settings = self.config.prepare
        changed = settings.model_dump(exclude={"dataset", "path"}, exclude_defaults=True)
        own = [safe_name(settings.path)] if settings.path else []
        return "-".join([f"data/{settings.dataset}", *own, *(f"{key}-{value}" for key, value in changed.items())])

    @property
    def metadata(self) -> str:
        """One line of JSON per image: id, file_name, text (a caption or a list), split; of own images, sha256."""
        return f"{self.data}/metadata.jsonl"

    @property
    def data_manifest(self) -> str:
        """Counts, caption pools and the hash of all images."""
        return f"{self.data}/manifest.json"

    # encode

    @property
    def latents(self) -> str:
        """Array (N, C, H, W), float32: latents of the training images."""
        return f"{self.root}/encode/latents.npy"

    @property
    def captions(self) -> str:
        """Array (distinct captions + 1, tokens, width), float32; the last row is the empty caption."""
        return f"{self.root}/encode/captions.npy"

    @property
    def index(self) -> str:
        """Table of the training images: image_id, file_name, caption, caption_row."""
        return f"{self.root}/encode/index.parquet"

    @property
    def encode_manifest(self) -> str:
        """Shapes, image size and hashes of the encoded data."""
        return f"{self.root}/encode/manifest.json"

    @property
    def encoded(self) -> list[str]:
        """All that later stages read of the encoded data."""
        return [self.latents, self.captions, self.index, self.encode_manifest]

    # train

    @property
    def model(self) -> str:
        """Folder of θ0 in diffusers' layout: ``unet/`` and ``scheduler/``."""
        return f"{self.root}/train"

    @property
    def weights(self) -> str:
        """θ0's weights (the average over training, EMA)."""
        return f"{self.model}/unet/diffusion_pytorch_model.safetensors"

    @property
    def architecture(self) -> str:
        """θ0's architecture as diffusers saves it."""
        return f"{self.model}/unet/config.json"

    @property
    def scheduler(self) -> str:
        """Noise schedule as diffusers saves it."""
        return f"{self.model}/scheduler/scheduler_config.json"

    @property
    def model_files(self) -> list[str]:
        """All that later stages read of θ0."""
        return [self.weights, self.architecture, self.scheduler]

    @property
    def snapshots(self) -> list[str]:
        """Weights at evenly spaced steps, raw (not averaged)."""
        return [f"{self.model}/snapshots/step-{step:06d}.safetensors" for step in self.config.train.snapshot_steps()]

    @property
    def curve(self) -> str:
        """Training curve: step, loss, learning_rate."""
        return f"{self.model}/curve.csv"

    @property
    def recipe(self) -> str:
        """The recipe, its seed and what was measured while training; written last."""
        return f"{self.model}/recipe.json"

    # synthesize

    def query(self, query: str) -> dict[str, str]:
        """Files of one query: ``record`` (prompt, seed, source), ``image`` and ``tensors``.

        ``tensors`` holds the latent (C, H, W), the initial noise (C, H, W; absent for a user's
        image) and the prompt's token states (tokens, width), all float32.
        """
        folder = f"{self.root}/synthesize/{query}"
        return {
            "record": f"{folder}/query.json",
            "image": f"{folder}/image.png",
            "tensors": f"{folder}/query.npz",
        }

    # fit

    @property
    def fisher(self) -> str:
        """Diagonal Fisher information by weight name, float64."""
        return f"{self.root}/fit/fisher.safetensors"

    @property
    def fisher_report(self) -> str:
        """Draws, zero entries and mean of each layer's Fisher."""
        return f"{self.root}/fit/fisher.json"

    def features(self, name: str) -> str:
        """Array (N, width), float32: what some methods need of every training image."""
        return f"{self.root}/fit/features/{name}.npy"

    @property
    def ekfac(self) -> str:
        """EK-FAC Fisher information: eigenvectors, float32, and eigenvalues, float64, by layer."""
        return f"{self.root}/fit/ekfac.safetensors"

    @property
    def ekfac_report(self) -> str:
        """Draws, zero entries and mean of each layer's eigenvalues."""
        return f"{self.root}/fit/ekfac.json"

    def fitted(self, curvature: str) -> list[str]:
        """What ``fit`` writes of a curvature of the config: the file a step reads and the report; none of ``none``."""
        files = {"diagonal": [self.fisher, self.fisher_report], "ekfac": [self.ekfac, self.ekfac_report], "none": []}
        return files[curvature]

    def all_fitted(self) -> list[str]:
        """What ``fit`` writes of every curvature of the config."""
        return [path for curvature in self.config.curvatures() for path in self.fitted(curvature)]

    def features_record(self, name: str) -> str:
        """Settings and hashes of what those features were computed from, where they must be met again (JSON)."""
        return f"{self.root}/fit/features/{name}.json"

    # unlearn, scan, score

    def unlearned(self, variant: str, query: str) -> dict[str, str]:
        """The changed ``weights`` only, and the ``losses`` before and after."""
        stem = f"{self.root}/unlearn/{variant}/{query}"
        return {"weights": f"{stem}.safetensors", "losses": f"{stem}.json"}

    def regenerated(self, variant: str) -> str:
        """Images (uint8) before and after unlearning: the forgotten queries and, beside each, the same others."""
        return f"{self.root}/unlearn/{variant}.npz"

    @property
    def base_scan(self) -> str:
        """Loss of every training image and timestep under θ0."""
        return f"{self.root}/scan/{BASE}.npz"

    def scan(self, variant: str, query: str) -> str:
        """Loss of every training image and timestep under unlearned weights."""
        return f"{self.root}/scan/{variant}/{query}.npz"

    def scan_shard(self, scan: str, shard: int | str) -> str:
        """Losses of a part of the images, for :attr:`base_scan` or :meth:`scan`; needed until that is complete."""
        stem = scan.removeprefix(f"{self.root}/scan/").removesuffix(".npz")
        return f"{self.checkpoints('scan')}/{stem}/shard-{shard}.npz"

    def score(self, method: str, query: str) -> str:
        """Table of image_id, score, rank (1 is the most influential), by descending score."""
        return f"{self.root}/score/{method}/{query}.parquet"

    # retrain: a model is named by (method, k, member); member is a query or a draw

    def retrained(self, method: str, k: int | str, member: str) -> str:
        """Weights of a retrained model."""
        if method == BASE:
            return self.weights
        return f"{self.root}/retrain/weights/{method}/k{k}/{member}.safetensors"

    def measure(self, method: str, k: int | str, member: str, query: str) -> dict[str, str]:
        """What a model says of a query: ``losses`` (JSON) and, unless it is a user's, the regenerated ``image``."""
        stem = f"{self.root}/retrain/measures/{method}/k{k}/{member}/{query}"
        return {"losses": f"{stem}.json", "image": f"{stem}.png"}

    def losses(self, method: str, k: int | str, member: str) -> str:
        """What one model says of every query (JSON), for models of random halves and of pools."""
        return f"{self.root}/retrain/measures/{method}/k{k}/{member}.json"

    def tuned(self, key: str) -> str:
        """A result of ``forgetrace tune`` by its fingerprint: what a leave-K-out model said, or a precision."""
        return f"{self.root}/tune/models/{key[:16]}.json"

    def half_models(self) -> list[tuple[str, int, str]]:
        """(method, k, member) of the models of random halves: draw<i>, then draw<i>-seed<j>."""
        retrain = self.config.retrain
        seeds = ["", *(f"-seed{j}" for j in range(1, retrain.subset_seeds))]
        return [(HALF_SET, 0, f"draw{i}{seed}") for seed in seeds for i in range(retrain.subsets)]

    def pooled_models(self) -> list[tuple[str, int, str]]:
        """(method, k, member) of the models of the pooled protocol; members are pool<i>."""
        retrain = self.config.retrain
        pools = [f"pool{i}" for i in range(retrain.pools)]
        return [(method, k, pool) for method in self.config.score.methods for k in retrain.pooled_k for pool in pools]

    def asked_at_once(self) -> list[tuple[str, int, str]]:
        """(method, k, member) of the models that are asked about every query as soon as they are trained."""
        return self.half_models() + self.pooled_models()

    def pool(self, member: str) -> list[str]:
        """The queries of pool<i>, whose top images are left out together; all other queries are its controls.

        Images are dealt, their regions go with them: what is found for one side of an image tells of the other too.
        """
        images = self.config.judged_images()[int(member.removeprefix("pool")) :: self.config.retrain.pools]
        return [query for query in self.config.judged_queries() if self.config.whole(query) in images]

    def shared_models(self) -> list[tuple[str, int, str]]:
        """(method, k, member) of the models every query is measured with: θ0, random draws, seeds."""
        retrain = self.config.retrain
        if not self.config.leaves_out:
            return []
        draws = [(RANDOM, k, f"draw{i}") for k in retrain.k for i in range(retrain.random_draws)]
        seeds = [(SEED_SET, 0, f"draw{i}") for i in range(retrain.seeds)]
        return [(BASE, 0, BASE), *draws, *seeds]

    def measured_models(self, query: str) -> list[tuple[str, int, str]]:
        """(method, k, member) of all models a query is measured with on its own."""
        retrain = self.config.retrain
        if query not in self.config.judged_queries():
            return []
        own = [(m, k, query) for m in retrain.methods if m != RANDOM for k in retrain.k]
        return self.shared_models() + own

    def retraining_sets(self) -> dict[str, list[tuple[str, int, str]]]:
        """All models that are trained without images, (method, k, member), by what one job makes with retrain.stack.

        The sets are ``shared``, ``half``, ``pools`` and each judged method; none is empty.
        """
        sets = {SHARED: self.shared_models()[1:], HALF_SET: self.half_models(), POOLS: self.pooled_models()}
        for query in self.config.judged_queries():
            for model in self.measured_models(query)[len(self.shared_models()) :]:
                sets.setdefault(model[0], []).append(model)
        return {name: models for name, models in sets.items() if models}

    def retrainings(self) -> list[tuple[str, int, str]]:
        """All models of :meth:`retraining_sets`."""
        return [model for models in self.retraining_sets().values() for model in models]

    def timing(self, stage: str, *names: str) -> str:
        """What Snakemake measured of the job (stage, names): seconds and memory."""
        return "/".join(("timings", self.name, stage, *names)) + ".tsv"

    # customize, retrieve, learn: a customised model is named by its concept

    def customized(self, model: str) -> dict[str, str]:
        """Files of one customised model.

        ``weights`` are the changed ones only, ``token`` holds the new token's embedding row. ``exemplars`` has latents
        (n, C, H, W; with encode.flips the mirrored ones behind) and the token states of their prompts (n, tokens,
        width); ``queries`` the latents, initial noise and prompts of the images it generated. ``record`` says what
        they are, and is written last.
        """
        folder = f"{self.root}/customize/{model}"
        return {
            "weights": f"{folder}/weights.safetensors",
            "token": f"{folder}/token.safetensors",
            "exemplars": f"{folder}/exemplars.npz",
            "queries": f"{folder}/queries.npz",
            "record": f"{folder}/model.json",
        }

    def customized_image(self, model: str, name: str) -> str:
        """An exemplar (``exemplar-00``) or a generated image (the query's name) of a customised model."""
        return f"{self.root}/customize/{model}/images/{name}.png"

    def retrieved(self, model: str, method: str, query: str) -> str:
        """A method's scores of all candidates for a query of a customised model, as :meth:`score`."""
        return f"{self.root}/retrieve/{model}/{method}/{query}.parquet"

    def ranks(self, model: str) -> str:
        """Table of method, query, image_id, score, rank: where each exemplar of a customised model comes."""
        return f"{self.root}/retrieve/{model}.parquet"

    @property
    def learned(self) -> dict[str, str]:
        """The ``heads``, the ``ranks`` they give exemplars of test models (as :meth:`ranks`), how they came about.

        ``curve`` is the table of validation while learning, ``calibration`` (JSON) the fit to probabilities and
        ``probabilities`` a table of test queries and candidates with probability and whether they are exemplars.
        """
        folder = f"{self.root}/learn"
        files = {"heads": "heads.safetensors", "ranks": "ranks.parquet", "curve": "curve.csv"}
        files |= {"calibration": "calibration.json", "probabilities": "probabilities.parquet"}
        return {role: f"{folder}/{name}" for role, name in files.items()}

    # evaluate, figures

    def tables(self) -> list[str]:
        """Names of the result tables: those of leaving images out, then those the config asks for beside them."""
        retrain = self.config.retrain
        names = ["per_query", "counterfactual", "comparisons"] if self.config.leaves_out else []
        names += ["retrieval_per_query", "retrieval", "retrieval_comparisons"] if self.config.customize else []
        names += ["calibration", "reliability"] if self.config.learn else []
        names += ["lds", "lds_per_query"] if retrain.subsets else []
        names += ["pooled"] if retrain.pools else []
        names += ["regions", "regions_summary"] if self.config.evaluate.precision_k else []
        names += ["unlearning"] if self.config.evaluate.others else []
        return names + (["agreement", "cost"] if retrain.subsets or retrain.pools else [])

    def table(self, name: str) -> str:
        """A result table, one of :meth:`tables`."""
        return f"{self.root}/evaluate/{name}.csv"

    @property
    def metrics(self) -> str:
        """The summary DVC reads."""
        return f"{self.root}/evaluate/metrics.json"

    def figure(self, name: str, suffix: str = "png") -> str:
        """A figure by name; every one exists as .png and .pdf."""
        return f"{self.root}/figures/{name}.{suffix}"

    # all of it

    def files(self) -> set[str]:
        """Every file the stages write below ``root``, figures excepted, for the current config."""
        config, queries = self.config, self.config.queries()
        files = {*self.encoded, *self.model_files, self.curve, self.recipe, self.base_scan}
        files |= set(self.all_fitted())
        files |= {*self.snapshots, self.metrics}
        files |= {self.table(name) for name in self.tables()}
        for model in self.asked_at_once():
            files |= {self.losses(*model), self.retrained(*model)}
        if config.evaluate.others:
            files |= {self.regenerated(variant) for variant in config.unlearn}
        for query in queries:
            files |= set(self.query(query).values())
            files |= {self.score(method, query) for method in config.score.methods}
            for variant in config.unlearn:
                files |= {*self.unlearned(variant, query).values(), self.scan(variant, query)}
            for model in self.measured_models(query):
                files |= {self.retrained(*model), *self.measure(*model, query).values()}
        return files


def load_layout(config_path: str | Path) -> Layout:
    """The layout of the experiment a config file describes.

    Raises:
        UserError: as :func:`forgetrace.config.load_config`.
    """
    return Layout(Path(config_path).stem, load_config(config_path))
