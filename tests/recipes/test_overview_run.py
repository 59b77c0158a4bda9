"""What runs/overview.py compares, and how it chooses: the names of ways, their settings, and the choice by group."""

import json
from types import SimpleNamespace

import numpy as np
import overview
import pytest
from overview_ways import (
    CHOSEN,
    DEFAULT,
    MASKED,
    RULES,
    TRUE_MASK,
    WITHOUT,
    by_group,
    choose,
    config_of,
    selector_of,
    ways_at,
    with_masks,
)

from recipes.mini.samples import scene_samples
from sparse_context import SparseContextConfig
from sparse_context.evaluation.grid import DENSE, Cell
from sparse_context.selection import select_tokens
from sparse_context.selectors.residual import Residual


def test_a_keep_has_the_overviews_that_it_holds():
    assert ways_at(0.3, [2, 4], ["residual"]) == ["overview 2, residual", "overview 4, residual"]
    assert ways_at(0.25, [2, 4], ["residual"]) == ["overview 2 alone", "overview 4, residual"]
    assert ways_at(0.0625, [2, 4], RULES) == ["overview 4 alone"]
    assert ways_at(0.05, [2, 4], RULES) == []


def test_a_way_is_its_settings():
    dropping, merged, random = (config_of(way, 0.2) for way in ("dropping", "merged", "random"))
    assert dropping == SparseContextConfig(keep=0.2, overview=None)
    assert merged == SparseContextConfig(keep=0.2, overview=None, merge=1.0)
    assert random == SparseContextConfig(keep=0.2, overview=None, selector="random")
    assert config_of(MASKED, 0.2) == SparseContextConfig(keep=0.2, overview=None, selector="mask")
    assert config_of(DEFAULT, 0.2) == SparseContextConfig(keep=0.2)
    alone = config_of("overview 2 alone", 0.25, "spread")
    assert alone == SparseContextConfig(keep=0.25, overview=2, overview_layout="spread")
    sharp = config_of("overview 4, edges", 0.1)
    assert sharp == SparseContextConfig(keep=0.1, overview=4, selector="edges")


def test_every_way_spends_the_same_tokens(assets):
    """Scaled down pictures apart, which spend nearly as many."""
    (sample,), scenes = scene_samples(assets, 1, 0, ["edit_object"])
    pictures, grids = [*scenes[sample.name][0].references], [(16, 16)]
    for keep in (0.3, 0.25, 0.1):
        ways = [way for way in WITHOUT if way != "downscaled"] + ways_at(keep, [2, 4], RULES)
        for way in ways:
            selection = select_tokens(pictures, grids, config_of(way, keep))
            assert selection.kept == round(256 * keep), way
            assert bool(selection.overviews) == way.startswith("overview")


def test_a_rule_weighs_the_residual_of_its_factor():
    rng = np.random.default_rng(0)
    picture, grid = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8), (16, 16)
    mask = np.zeros((128, 128), np.uint8)
    mask[:64] = 255
    inside = selector_of(TRUE_MASK, 2, mask)(picture, grid, rng)
    plain = Residual(2)(picture, grid, rng)
    np.testing.assert_allclose(inside[:8], plain[:8], rtol=1e-6)
    np.testing.assert_allclose(inside[8:], plain[8:] / 11, rtol=1e-6)
    assert selector_of("edges", 2) == "edges"
    assert selector_of("residual + subject", 2) == {"residual": 0.5, "subject": 0.5}
    assert selector_of("residual x saliency", 4).__name__ == "residual x saliency"  # by which a cell is told apart


def test_true_masks_are_those_of_the_sample(assets):
    (sample,), scenes = scene_samples(assets, 1, 3, ["edit_object"])
    scene = scenes[sample.name][0]
    seen = []
    make = with_masks(lambda sample, config, seed: seen.append(config))
    make(sample, config_of(f"overview 4, {TRUE_MASK}", 0.1), 5)
    (config,) = seen
    chosen = select_tokens([*scene.references], [(16, 16)], config).references[0]
    covered = scene.reference_masks[0].reshape(16, 8, 16, 8).mean((1, 3)).ravel()
    assert config.coverage == 0 and covered[chosen.index].min() > covered.mean()


def cell(way, keep):
    return Cell(SparseContextConfig(keep=keep), about={"way": way})


def figures(**differences):
    """Of one setting, by the score of its group."""
    return {"scores": {name: {"difference": value} for name, value in differences.items()}}


def test_the_best_overview_of_a_group_is_chosen_by_the_group_s_score_and_never_by_true_masks():
    ways = ("dropping", "overview 2, edges", "overview 4, residual", f"overview 4, {TRUE_MASK}")
    cells = {f"{way} 0.3": cell(way, 0.3) for way in ways} | {DENSE: Cell(SparseContextConfig(keep=1.0))}
    of = {
        "subjects": [-1.0, -3.0, -2.0, -0.5],
        "global edits": [-9.0, -1.0, -2.0, -0.1],
    }
    groups = {
        group: {
            f"{way} 0.3": figures(psnr=loss, psnr_in_mask=loss if group == "subjects" else -loss)
            for way, loss in zip(ways, losses, strict=True)
        }
        for group, losses in of.items()
    }
    assert choose(groups, cells) == {
        "subjects": {"0.3": "overview 4, residual"},
        "global edits": {"0.3": "overview 2, edges"},
    }
    asked = []
    make = by_group(lambda sample, config, seed: asked.append((config, seed)), choose(groups, cells), "reference")
    for task in of:
        make(SimpleNamespace(task=task), SparseContextConfig(keep=0.3, seed=7), 7)
    found = [(config.overview, config.selector, config.overview_layout, config.seed, seed) for config, seed in asked]
    assert found == [(4, "residual", "reference", 7, 7), (2, "edges", "reference", 7, 7)]


def row(name, psnr, task="edits"):
    return {"name": name, "task": task, "kept": 1, "total": 4, "seconds": 0.1, "scores": {"psnr": psnr}}


def test_differences_are_those_of_the_same_scene():
    rows = {
        DENSE: [row("a", 30.0), row("b", 20.0)],
        "dropping 0.2": [row("a", 20.0), row("b", 19.0)],
        "random 0.2": [row("a", 18.0), row("b", 18.0)],
        f"{CHOSEN} 0.2": [row("a", 26.0), row("b", 19.0)],
    }
    found = overview.compare(rows, [0.2])
    assert found["against_dropping"]["0.2"]["edits"]["random"]["scores"]["psnr"]["difference"] == -1.5
    won = found["chosen_over"]["0.2"]
    assert {way: of["edits"][CHOSEN]["scores"]["psnr"]["difference"] for way, of in won.items()} == {
        "dropping": 3.0,
        "random": 4.5,
    }


@pytest.mark.parametrize("kv", [False, True])
def test_the_test_split_takes_what_validation_chose(tmp_path, monkeypatch, kv):
    monkeypatch.setattr("sys.argv", ["overview", "--split", "test", *(["--kv"] if kv else [])])
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    end = "_kv.json" if kv else ".json"
    arguments = overview.parse()
    assert (arguments.output.name, arguments.rules) == (f"overview_test{end}", [])
    with pytest.raises(SystemExit, match="nothing was chosen on validation at keep 0.0625, 0.1, 0.2, 0.3"):
        overview.read_rules(arguments)
    for name, keep, way in (("", "0.2", "overview 4, edges"), ("_two", "0.3", "overview 2, edges")):
        for mode in (".json", "_kv.json"):  # that of the other mode does not count
            said = way if mode == end else "of the other mode"
            chosen = {"figures": {"chosen": {"edits": {keep: said}}}}
            (tmp_path / f"overview_validation{name}{mode}").write_text(json.dumps(chosen))
    arguments = overview.parse()
    assert [file.name for file in arguments.rules] == [f"overview_validation{end}", f"overview_validation_two{end}"]
    arguments.keeps = [0.2, 0.3]
    assert overview.read_rules(arguments) == {"edits": {"0.2": "overview 4, edges", "0.3": "overview 2, edges"}}
    arguments.rules = [tmp_path / "gone.json"]
    with pytest.raises(SystemExit, match="gone.json is missing: choose on the validation split first"):
        overview.read_rules(arguments)
