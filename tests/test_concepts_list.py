"""Lists of concepts of one's own (customize.given)."""

import json
import os

import pytest

from forgetrace.artifacts import UserError
from forgetrace.config import Customize, read_concepts
from forgetrace.datasets.concepts import (
    check_concepts,
    check_learnable,
    exemplar_count,
    given_files,
    names,
    query_names,
    shaping,
)

from .customized import customised

ENTRY = {
    "name": "fish",
    "kind": "style",
    "exemplars": [{"image": "a.png", "prompt": "V* one"}, {"image": "b.png", "prompt": "V* two"}],
    "queries": [{"prompt": "my V*"}],
}


def write(folder, *entries) -> str:
    (folder / "concepts.json").write_text(json.dumps(entries))
    return (folder / "concepts.json").as_posix()


def test_parts_names_and_files(tmp_path):
    other = ENTRY | {"name": "bird", "part": "validation", "weights": "../w", "token": "t"}
    settings = Customize(given=write(tmp_path, ENTRY, other))
    assert names(settings, 0) == {"test": ["style-fish"], "validation": ["style-bird"], "train": []}
    assert query_names(settings, "style-fish") == ["style-fish-00"]
    assert exemplar_count(settings, "style-bird") == 2
    assert given_files(settings, "style-bird")[2:] == [f"{tmp_path.as_posix()}/../w", f"{tmp_path.as_posix()}/t"]
    # Where the list lies shapes nothing, nor do the other concepts.
    again = tmp_path / "again"
    again.mkdir()
    assert shaping(Customize(given=write(again, ENTRY)), "style-fish") == shaping(settings, "style-fish")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([ENTRY, ENTRY], "each of another kind and name"),
        ([], "each of another kind and name"),
        ([ENTRY | {"part": "train"}], "no concept of the part test"),
        ([ENTRY | {"kind": "thing"}], r"0\.kind"),
        ([ENTRY | {"name": "../up"}], r"0\.name"),
        ([ENTRY | {"weights": "w"}], "weights and token go together"),
        ([ENTRY | {"queries": [{"prompt": "V*", "image": "a.png"}]}], "need the weights of the model"),
        ([ENTRY | {"queries": [{"prompt": "no token"}]}], r"'no token' lacks the new token V\*"),
        ([ENTRY | {"queries": [{"prompt": "V*", "manner": "plain"}]}], r"'V\*' holds the new token V\*"),
        ([ENTRY | {"queries": [{"prompt": "one", "manner": "plain"}]}], r"give prompts with V\*"),
        ([ENTRY | {"exemplars": []}], r"0\.exemplars"),
    ],
)
def test_a_list_that_cannot_be_is_refused(tmp_path, entries, message):
    with pytest.raises(UserError, match=message):
        read_concepts(write(tmp_path, *entries))


def test_a_missing_or_broken_list_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"there is no nowhere\.json"):
        read_concepts("nowhere.json")
    with pytest.raises(UserError, match=r"cannot be read .*docs/customized\.md"):
        read_concepts(tmp_path.as_posix())
    (tmp_path / "object.json").write_text("{}")
    with pytest.raises(UserError, match=r"object\.json: Input should be a valid list; docs"):
        read_concepts((tmp_path / "object.json").as_posix())
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(UserError, match="is no JSON file"):
        read_concepts((tmp_path / "broken.json").as_posix())


def test_an_edited_list_is_read_again(tmp_path):
    path = write(tmp_path, ENTRY)
    assert list(read_concepts(path)) == ["style-fish"]
    write(tmp_path, ENTRY | {"name": "bird"})
    os.utime(path, (1, 1))
    assert list(read_concepts(path)) == ["style-bird"]


def test_features_cannot_be_learned_from_a_list_of_test_models(tmp_path):
    settings = Customize(given=write(tmp_path, ENTRY))
    with pytest.raises(UserError, match=r"needs two validation models at least, of the kinds style, and has 0"):
        check_learnable(settings, 0, ["style"])


def test_files_that_are_not_there_are_counted_before_anything_runs(tmp_path):
    settings = Customize(given=write(tmp_path, ENTRY))
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match=r"names 1 files that are not there, such as .*b\.png"):
        check_concepts(settings, 0, [16, 16, 3])


def test_what_would_have_no_effect_beside_it_is_refused():
    with pytest.raises(UserError, match="exemplars has no effect with given"):
        customised(customize={"given": "list.json"})
