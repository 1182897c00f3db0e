import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from forgetrace.artifacts import UserError, read_image, read_table, write_table
from forgetrace.evaluation.tables import evaluate
from forgetrace.figures import delta
from forgetrace.figures.catalogue import draw, names
from forgetrace.figures.page import LETTER, Page, lines
from forgetrace.figures.style import DPI, colour_of, look, marker_of
from forgetrace.layout import Layout

from ..evaluation import synthetic


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> tuple[Path, Layout]:
    """An evaluated experiment with a user's image among its queries."""
    folder = tmp_path_factory.mktemp("figures")
    layout = synthetic.experiment(own_image=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        synthetic.write_results(layout)
        evaluate(layout, synthetic.flat_encoder)
    return folder, layout


@pytest.fixture
def layout(folder, monkeypatch) -> Layout:
    monkeypatch.chdir(folder[0])
    return folder[1]


def test_names_cover_every_query_and_do_not_load_matplotlib(layout):
    kinds = ("attribution", "counterfactual")
    grids = [f"{kind}-{query}" for kind in kinds for query in layout.config.queries()]
    assert names(layout) == ["training", *grids, "delta"]
    program = "import sys, forgetrace.figures.catalogue; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"import json; {program}"], capture_output=True, text=True)
    assert not {"matplotlib", "torch"} & set(json.loads(done.stdout))


@pytest.mark.parametrize("name", ["training", "attribution-report-00", "counterfactual-report-00", "delta"])
def test_figures_are_drawn_and_repeat_byte_for_byte(layout, name):
    files = [Path(layout.figure(name, suffix)) for suffix in ("png", "pdf")]
    draw(layout, name)
    first = [file.read_bytes() for file in files]
    draw(layout, name)
    assert [file.read_bytes() for file in files] == first
    assert first[1].startswith(b"%PDF")
    pixels = read_image(files[0])
    assert pixels.shape[1] > 600
    assert len(set(map(tuple, pixels.reshape(-1, 3)[::7]))) > 10  # not a blank page


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> tuple[Path, Layout]:
    """An evaluated experiment of 20 methods, halves and pools."""
    folder = tmp_path_factory.mktemp("many")
    layout = synthetic.experiment(more=17, subsets=9, subset_seeds=2, pools=2, pooled_k=[2, 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        synthetic.write_results(layout)
        evaluate(layout, synthetic.flat_encoder)
    return folder, layout


@pytest.mark.parametrize("name", ["lds", "delta", "attribution-report-00", "counterfactual-report-00"])
def test_figures_hold_many_methods(many, monkeypatch, name):
    monkeypatch.chdir(many[0])
    assert len(many[1].config.score.methods) == 20
    draw(many[1], name)
    pixels = read_image(many[1].figure(name))
    assert max(pixels.shape) < 8000
    assert len(set(map(tuple, pixels.reshape(-1, 3)[::7]))) > 10
    first = Path(many[1].figure(name, "pdf")).read_bytes()
    draw(many[1], name)
    assert Path(many[1].figure(name, "pdf")).read_bytes() == first


def test_no_two_of_many_methods_look_alike(many):
    layout = many[1]
    methods = [method for method in layout.config.score.methods if method != "random"]
    assert len({(colour_of(layout, method), marker_of(layout, method)) for method in methods}) == 19


def test_the_score_of_halves_without_pools_and_repetitions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = synthetic.experiment(subsets=3)
    assert names(layout)[-1] == "lds"
    synthetic.write_results(layout)
    evaluate(layout, synthetic.flat_encoder)
    draw(layout, "lds")
    assert Path(layout.figure("lds", "pdf")).stat().st_size > 1000
    write_table(layout.table("lds"), read_table(layout.table("lds")).head(0))
    with pytest.raises(UserError, match=r"lds.csv has no rows: train a half"):
        draw(layout, "lds")


def test_tiles_show_the_pixels_of_the_images(layout):
    picture = read_image(layout.query("report-00")["image"])
    with look():
        page = Page(3.0, 2.0)
        page.image(0.5, 0.25, 0.8, picture)
        page.figure.savefig("page.png", dpi=DPI)
    tile = read_image("page.png")[40:168, 80:208]  # 160 pixels to the inch
    assert np.array_equal(tile, picture.repeat(8, axis=0).repeat(8, axis=1))


def test_a_users_image_is_not_drawn_again(layout):
    draw(layout, "counterfactual-mine")
    page = read_image(layout.figure("counterfactual-mine"))
    assert (page == 222).all(axis=2).sum() > 10 * 128**2  # grey squares instead


def test_an_unknown_figure_is_one_sentence(layout):
    with pytest.raises(UserError, match="no figure 'attribution-nobody'"):
        draw(layout, "attribution-nobody")


def test_an_image_the_index_lacks_names_the_score_table(layout):
    path = layout.score("unlearn", "report-01")
    table = read_table(path)
    table.loc[0, "image_id"] = "digit-9999"
    write_table(path, table)
    with pytest.raises(UserError, match=path):
        draw(layout, "attribution-report-01")


def test_a_missing_row_asks_to_evaluate_again(layout):
    path = layout.table("per_query")
    before = Path(path).read_bytes()
    table = read_table(path)
    write_table(path, table[(table["query"] != "report-01") | (table["method"] != "unlearn")])
    with pytest.raises(UserError, match="run `evaluate` again"):
        draw(layout, "counterfactual-report-01")
    Path(path).write_bytes(before)


def test_figures_do_without_seeds_and_with_one_query(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = synthetic.experiment(seeds=0, random_draws=1, k=[2])
    content = layout.config.model_dump(mode="json")
    content["synthesize"]["queries"] = [{"pool": "report", "count": 1}]
    layout = Layout("synthetic", synthetic.parse_config(content, "x.yaml"))
    synthetic.write_results(layout)
    evaluate(layout, synthetic.flat_encoder)
    draw(layout, "delta")
    assert Path(layout.figure("delta", "pdf")).stat().st_size > 1000


def test_methods_that_a_partial_evaluation_lacks_are_not_shown(layout, monkeypatch):
    shown, legend = {}, delta._legend
    monkeypatch.setattr(delta, "_legend", lambda *given: shown.setdefault("handles", legend(*given)))
    path = layout.table("counterfactual")
    before, table = Path(path).read_bytes(), read_table(path)
    write_table(path, table[table["method"] != "pixel-l2"])
    draw(layout, "delta")
    Path(path).write_bytes(before)
    labels = [handle.get_label() for handle in shown["handles"]]
    assert "unlearn" in labels
    assert "pixel-l2" not in labels


def test_a_long_text_is_broken_to_fit_and_ends_in_an_ellipsis():
    text = "a man riding a wave on top of a surfboard while people watch him"
    assert " ".join(lines(text, 2, 12)) == text
    assert all(len(line) * 12 * LETTER / 72 <= 2 for line in lines(text, 2, 12))
    assert lines(text, 2, 12, most=2) == [lines(text, 2, 12)[0], "wave on top of a …"]
    assert lines("short", 2, 12, most=2) == ["short"]
    wide = "\u4e00" * 40  # an em each
    assert "".join(lines(wide, 2, 12)) == wide
    assert all(len(line) * 12 / 72 <= 2 for line in lines(wide, 2, 12))


def test_a_border_is_around_the_image_and_not_over_it(tmp_path):
    page = Page(1.0, 1.0)
    page.border(0.25, 0.25, 0.5, "#00815E")
    page.image(0.25, 0.25, 0.5, np.full((4, 4, 3), [200, 10, 10], dtype=np.uint8))
    page.figure.savefig(tmp_path / "page.png")
    drawn = read_image(tmp_path / "page.png")
    middle = len(drawn) // 2
    assert drawn[middle, middle].tolist() == [200, 10, 10]
    assert [0x00, 0x81, 0x5E] in drawn[middle].tolist()
