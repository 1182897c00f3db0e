import shutil
from pathlib import Path

import pytest
import yaml

from forgetrace.layout import Layout, load_layout
from forgetrace.release.convert import import_release

from .published import write_abu, write_fastgda


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> dict[str, Path]:
    """Both releases, not to be changed."""
    pytest.importorskip("pycocotools", reason="an extra: pip install pycocotools")
    folder = tmp_path_factory.mktemp("published")
    return {"abu": write_abu(folder / "mscoco"), "fastgda": write_fastgda(folder / "coco")}


@pytest.fixture
def abu(published, tmp_path, monkeypatch) -> Path:
    """AbU's artifacts in the current folder, to be damaged."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(published["abu"], "mscoco"))


@pytest.fixture
def fastgda(published, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(published["fastgda"], "coco"))


def imported(source: Path, **changes: dict) -> Layout:
    """The experiment of a release, converted to the folder ``given``, with some keys of some sections replaced."""
    file, _ = import_release(source, Path("given"), "published")
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    for section, keys in changes.items():
        config[section] |= keys
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return load_layout(file)
