import shutil
from pathlib import Path

import pytest

from forgetrace.layout import Layout

from . import synthetic


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    """The synthetic experiment's files, written once; not to be changed."""
    folder = tmp_path_factory.mktemp("pristine")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        synthetic.write_results(synthetic.experiment())
    return folder


@pytest.fixture
def results(pristine, tmp_path, monkeypatch) -> Layout:
    """The synthetic experiment; a copy of its files is in the current folder."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return synthetic.experiment()
