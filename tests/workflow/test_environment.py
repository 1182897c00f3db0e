"""``make environment``, with an interpreter that installs nothing."""

import shutil
import subprocess
import sys

from .conftest import ROOT

INTERPRETER = """#!/bin/sh
case "$*" in
  *"venv --clear .venv") echo once >> installed.txt; sleep 1; mkdir -p .venv/bin; ln -sf "$0" .venv/bin/python;;
  *"pip install"*) ;;
  *) exec "{python}" "$@";;
esac
"""


def test_two_makes_at_once_install_once(tmp_path):
    for part in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / part, tmp_path)
    python = tmp_path / "python"
    python.write_text(INTERPRETER.format(python=sys.executable))
    python.chmod(0o755)
    command = ["make", "environment", f"PYTHON={python}"]
    makes = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [make.communicate(timeout=300)[1] for make in makes]
    assert [make.returncode for make in makes] == [0, 0], said
    assert (tmp_path / "installed.txt").read_text() == "once\n"
