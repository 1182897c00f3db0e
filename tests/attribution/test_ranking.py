import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetrace.artifacts import UserError
from forgetrace.attribution.ranking import rank

SCORES = st.dictionaries(st.text("abcxyz", min_size=1, max_size=4), st.sampled_from([-1.5, 0.0, 2.0, 3.25]), min_size=1)


def test_by_hand():
    table = rank(["b", "c", "a", "d"], np.array([1.0, 2.0, 1.0, -3.0]))
    assert table["image_id"].tolist() == ["c", "a", "b", "d"]
    assert table["score"].tolist() == [2, 1, 1, -3]
    assert table["rank"].tolist() == [1, 2, 3, 4]
    assert list(table.columns) == ["image_id", "score", "rank"]


@given(SCORES, st.randoms(use_true_random=False))
def test_the_order_of_the_images_does_not_matter(scores, random):
    ids = list(scores)
    random.shuffle(ids)
    table = rank(ids, np.array([scores[image] for image in ids]))
    assert table["image_id"].tolist() == sorted(scores, key=lambda image: (-scores[image], image))
    assert table["score"].tolist() == [scores[image] for image in table["image_id"]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_names_its_image(bad):
    with pytest.raises(UserError, match="The score of image b is not finite"):
        rank(["a", "b"], np.array([1.0, bad]))
