"""What all benchmarks share: the experiment they use and how long they measure."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.workers import devices
from forgetrace.artifacts import UserError, read_table
from forgetrace.layout import Layout, load_layout


@dataclass(frozen=True)
class Settings:
    """One run of the benchmarks.

    Attributes:
        config: the experiment's file.
        repeats: counted turns of each side.
        seconds: of work in one turn.
        folder: where results go.
    """

    config: str
    repeats: int = 7
    seconds: float = 2.0
    folder: Path = Path(__file__).parent

    @cached_property
    def layout(self) -> Layout:
        """The experiment's files."""
        return load_layout(self.config)

    @cached_property
    def accelerators(self) -> list[tuple[str, str, int]]:
        """(name, device, processes) of each GPU benchmark; none without a GPU."""
        return [(device, device, 1) for device in devices() if device != "cpu"]

    def encoded(self) -> str:
        """The config, once the training images are known to be encoded."""
        return self._having(self.layout.encode_manifest, self.layout.latents)

    def trained(self) -> str:
        """The config, once θ0 is known to be there too."""
        self.encoded()
        return self._having(self.layout.weights)

    def weights(self, queries: int) -> list[str]:
        """Files of θ0 and of the first queries unlearned by the first variant."""
        config = self.layout.config
        names = [name for name in config.queries() if not config.image_query(name)][:queries]
        variant = next(iter(config.unlearn), None)
        if variant is None or len(names) < queries:
            raise UserError(
                f"{self.config} has fewer than {queries} generated queries to unlearn: use config/digits.yaml."
            )
        files = [self.layout.weights, *(self.layout.unlearned(variant, name)["weights"] for name in names)]
        self._having(*files)
        return files

    def images(self) -> int:
        """N."""
        return len(read_table(self.layout.index))

    def _having(self, *files: str) -> str:
        for path in files:
            if not Path(path).exists():
                raise UserError(f"{path} is missing: run `make reproduce EXPERIMENT={self.layout.name}` first.")
        return self.config
