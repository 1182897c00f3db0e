"""The attribution methods by name. Adding one: a module, a line here, an entry in a config."""

from forgetrace.artifacts import UserError
from forgetrace.attribution.baselines import Pixel, PixelL2, Random, Text
from forgetrace.attribution.contract import Attributor, Features, Together
from forgetrace.attribution.ensemble import Ensemble
from forgetrace.attribution.image_features import Clip, Dino, DinoV2, EfficientNet, EncodedImages, ImageFeatures
from forgetrace.attribution.influence import DataInf, Influence, ReTrac, TracIn
from forgetrace.attribution.low_loss import LowLoss
from forgetrace.attribution.output_shift import OutputShift
from forgetrace.attribution.trak import Das, DTrak, JourneyTrak, Trak
from forgetrace.attribution.unet_features import UNetFeatures
from forgetrace.attribution.unlearning import Unlearning
from forgetrace.config import CEILING, HALF_SET, RANDOM, SEED_SET, Config
from forgetrace.layout import BASE, POOLS, SHARED, Layout

ATTRIBUTORS: dict[str, type[Attributor]] = {
    "unlearning": Unlearning,
    "output-shift": OutputShift,
    "influence": Influence,
    "datainf": DataInf,
    "tracin": TracIn,
    "retrac": ReTrac,
    "trak": Trak,
    "d-trak": DTrak,
    "journey-trak": JourneyTrak,
    "das": Das,
    "pixel": Pixel,
    "pixel-l2": PixelL2,
    "text": Text,
    "efficientnet": EfficientNet,
    "clip": Clip,
    "dino": Dino,
    "dinov2": DinoV2,
    "image-features": ImageFeatures,
    "unet-features": UNetFeatures,
    "ensemble": Ensemble,
    "low-loss": LowLoss,
    RANDOM: Random,
}


def attributor(layout: Layout, method: str, device: str = "auto") -> Attributor:
    """The attributor behind a method of the experiment.

    Raises:
        UserError: no such method in the config.
    """
    methods = layout.config.score.methods
    if method not in methods:
        raise UserError(f"score.methods has no '{method}' (it has {', '.join(methods)}).")
    return ATTRIBUTORS[methods[method].attributor or method](layout, method, device)


def together(layout: Layout) -> list[str]:
    """Methods of the experiment that score all queries in one job."""
    return [method for method in layout.config.score.methods if isinstance(attributor(layout, method), Together)]


def methods_features(layout: Layout, device: str = "auto") -> dict[str, Features]:
    """What the methods of the experiment leave to the ``fit`` stage, by name."""
    methods = [attributor(layout, method, device) for method in layout.config.score.methods]
    return {features.name: features for method in methods for features in method.features()}


def all_features(layout: Layout, device: str = "auto") -> dict[str, Features]:
    """As :func:`methods_features`, with what ``learn`` starts from."""
    learn = layout.config.learn
    start = EncodedImages(layout, learn.encoder, device) if learn else None
    return methods_features(layout, device) | ({start.name: start} if start else {})


def inputs(layout: Layout, method: str, query: str) -> list[str]:
    """Files a method's scores for a query are computed from."""
    return attributor(layout, method).inputs(query)


def check_methods(config: Config) -> None:
    """Check every entry of ``score.methods`` before anything runs.

    Raises:
        UserError: a reserved name, an unknown attributor, an option it does not use, or an unlearning variant
            that is not in the config.
    """
    for method, options in config.score.methods.items():
        if method in (BASE, SEED_SET, HALF_SET, CEILING, SHARED, POOLS):
            raise UserError(f"score.methods.{method}: '{method}' names models of the evaluation; choose another name.")
        name = options.attributor or method
        if (method == RANDOM) != (name == RANDOM):
            raise UserError(f"score.methods.{method}: the name '{RANDOM}' belongs to the attributor '{RANDOM}' alone.")
        if name not in ATTRIBUTORS:
            raise UserError(
                f"score.methods.{method}: '{name}' is no attribution method; choose one of {', '.join(ATTRIBUTORS)}."
            )
        for key in sorted(options.model_fields_set - {"attributor"} - ATTRIBUTORS[name].reads):
            raise UserError(f"score.methods.{method}.{key}: '{name}' has no such option; remove the key.")
        ATTRIBUTORS[name].check(config, method)


def describe() -> str:
    """One line per attribution method."""
    return "\n".join(f"{name}: {kind.summary}" for name, kind in ATTRIBUTORS.items())
