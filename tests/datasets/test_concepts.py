import numpy as np
import pytest
from pydantic import ValidationError

from forgetrace.artifacts import UserError
from forgetrace.config import Counts, Customize
from forgetrace.datasets.concepts import GLYPHS, STYLES, concept, glyph, names, of_concept, query_manners
from forgetrace.datasets.digits import BACKGROUNDS, INKS

PROMPTS = {
    "object": {"exemplar": "a V* on a {background} background", "free": ["a V*"]},
    "style": {"exemplar": "a {digit} in V* style", "free": ["a V*"]},
}


def settings(**keys) -> Customize:
    return Customize(**({"prompts": PROMPTS, "objects": {"test": 4, "validation": 3, "train": 5}} | keys))


def test_parts_are_disjoint_and_grow_without_changing_each_other():
    few = names(settings(styles={"test": 2}), 0)
    assert [len(few[part]) for part in ("test", "validation", "train")] == [6, 3, 5]
    assert len({name for part in few.values() for name in part}) == 14
    more = names(settings(styles={"test": 2}, objects={"test": 4, "validation": 3, "train": 30}), 0)
    assert (more["test"], more["validation"]) == (few["test"], few["validation"])
    assert more["train"][:5] == few["train"]
    assert names(settings(), 1) != names(settings(), 0)


def test_controls_stand_behind_all_other_prompts():
    prompts = PROMPTS | {"object": {"exemplar": "V*", "free": ["V* one", "two V*"], "plain": ["a zero"]}}
    manners = query_manners(settings(prompts=prompts), "object-king")
    assert manners == {"object-king-00": "free", "object-king-01": "free", "object-king-02": "plain"}
    assert of_concept(manners) == ["object-king-00", "object-king-01"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"free": ["V*"], "plain": ["a V*"]}, r"'a V\*' holds the new token V\*"),
        ({"free": ["a zero"]}, r"'a zero' lacks the new token V\*"),
        ({"plain": ["a zero"]}, r"give prompts with V\*"),
    ],
)
def test_prompts_hold_the_new_token_and_controls_do_without(own, message):
    with pytest.raises(ValidationError, match=message):
        settings(prompts=PROMPTS | {"object": {"exemplar": "V*"} | own})


def test_without_controls_a_finished_model_stays_as_it_is():
    assert "plain" not in settings().model_dump()["prompts"]["object"]


def test_all_concepts_there_are_can_be_asked_for_and_no_more():
    count = len(GLYPHS)
    assert len(names(settings(objects=Counts(test=count)), 0)["test"]) == count
    with pytest.raises(UserError, match=f"customize.objects asks for {count + 1} concepts, there are only {count}"):
        names(settings(objects=Counts(test=count, train=1)), 0)


def test_every_glyph_is_in_its_font():
    drawn = {name: glyph(*own, 16) for name, own in GLYPHS.items()}
    missing = [glyph("\U0010ffff", font, 16) for font in {font for _, font in GLYPHS.values()}]
    assert all(0.03 < own.mean() < 0.7 for own in drawn.values())
    pictures = {own.tobytes() for own in [*drawn.values(), *missing]}
    assert len(pictures) == len(drawn) + len({own.tobytes() for own in missing})


def test_a_glyph_is_centred_and_of_the_asked_size():
    for size in (16, 32):
        own = glyph("T", GLYPHS["letter-t"][1], size)
        rows, columns = np.nonzero(own > 0.1)
        assert own.shape == (size, size)
        assert abs(rows.min() + rows.max() - (size - 1)) <= 1
        assert abs(columns.min() + columns.max() - (size - 1)) <= 1


def test_an_object_is_one_image_in_colours_of_the_base_set_that_its_caption_tells():
    own = concept("object-king", settings(), 0, 16)
    (exemplar,) = own.exemplars
    background = next(name for name in BACKGROUNDS if name in exemplar.caption)
    assert tuple(exemplar.image[0, 0]) == BACKGROUNDS[background]
    pixels = {tuple(pixel) for pixel in exemplar.image.reshape(-1, 3).tolist()}
    assert len(pixels & set(INKS.values())) == 1  # others are mixed with the background
    again = concept("object-king", settings(), 0, 16)
    np.testing.assert_array_equal(again.exemplars[0].image, exemplar.image)


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_several_different_digits_that_share_their_colours(style):
    own = concept(f"style-{style}", settings(exemplars=4), 0, 16)
    assert len({exemplar.image.tobytes() for exemplar in own.exemplars}) == 4
    assert len({exemplar.caption for exemplar in own.exemplars}) == 4
    assert all(exemplar.image.shape == (16, 16, 3) and exemplar.image.dtype == np.uint8 for exemplar in own.exemplars)
    corner = own.exemplars[0].image[0, 0].astype(int)
    assert all(np.abs(exemplar.image[0, 0] - corner).max() <= 2 for exemplar in own.exemplars)


def test_no_two_styles_paint_alike():
    digit = glyph("7", "DejaVuSans-Bold.ttf", 16)
    assert len({style(digit).tobytes() for style in STYLES.values()}) == len(STYLES)


def test_a_place_in_a_caption_that_cannot_be_filled_is_named():
    prompts = PROMPTS | {"object": {"exemplar": "a V* of {size}", "free": ["V*"]}}
    with pytest.raises(UserError, match=r"'a V\* of \{size\}' has a place that cannot be filled; there are ink, back"):
        concept("object-king", settings(prompts=prompts), 0, 16)
