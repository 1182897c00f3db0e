from pathlib import Path

import jsonschema
import pytest
import yaml

from forgetrace.artifacts import UserError
from forgetrace.schema import (
    README_FILE,
    SCHEMA_FILE,
    config_schema,
    readme_text,
    schema_text,
    write_generated,
)

ROOT = Path(__file__).parents[1]


def test_the_committed_schema_is_the_generated_one():
    assert (ROOT / SCHEMA_FILE).read_text(encoding="utf-8") == schema_text(), "run `forgetrace schema --write`"


def test_the_key_tables_of_the_readme_are_the_generated_ones():
    committed = (ROOT / README_FILE).read_text(encoding="utf-8")
    assert committed == readme_text(committed), "run `forgetrace schema --write`"


def test_every_key_is_described():
    for name, section in config_schema()["$defs"].items():
        assert section["description"], name
        for key, value in section["properties"].items():
            assert "description" in value or "$ref" in value, f"{name}.{key}"


@pytest.mark.parametrize("experiment", sorted((ROOT / "config").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_schema_accepts_the_experiments(experiment):
    jsonschema.validate(yaml.safe_load(experiment.read_text(encoding="utf-8")), config_schema())


def test_the_schema_refuses_an_unknown_key():
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"score": {"methods": {"random": {}}}, "scann": {}}, config_schema())


def test_writing_keeps_the_text_around_the_tables(tmp_path):
    (tmp_path / "config").mkdir()
    text = (ROOT / README_FILE).read_text(encoding="utf-8")
    (tmp_path / README_FILE).write_text(f"{text}\nmy own words\n", encoding="utf-8")
    write_generated(tmp_path)
    assert (tmp_path / README_FILE).read_text(encoding="utf-8") == f"{text}\nmy own words\n"


def test_a_readme_without_markers_is_refused():
    with pytest.raises(UserError, match="lacks"):
        readme_text("nothing here")
