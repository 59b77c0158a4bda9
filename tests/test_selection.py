import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparse_context.budget import rank_tokens
from sparse_context.config import SparseContextConfig, task_defaults
from sparse_context.merge import merge_rest
from sparse_context.selection import score_tokens, select_tokens
from sparse_context.selectors import saliency
from sparse_context.selectors.masks import mask
from sparse_context.selectors.order import uniform_order
from sparse_context.selectors.registry import SELECTORS, blend

Config = SparseContextConfig
GRID = (8, 8)


def noise(seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (64, 64, channels), np.uint8)


def flat():
    return np.full((64, 64, 3), 120, np.uint8)


def refuse(image, grid, generator):
    raise AssertionError("this reference needed no scores")


# The task


@pytest.mark.parametrize(
    ("task", "references", "expected"),
    [
        ("edit", 1, ({"edges": 0.5, "saliency": 0.5}, 0.1)),
        ("edit", 3, ({"edges": 0.5, "saliency": 0.5}, 0.1)),
        ("global", 1, ("uniform", 0.0)),
        ("subject", 1, ("subject", 0.0)),
        ("subject", 3, ("subject", 0.0)),
        ("auto", 1, ({"edges": 0.5, "saliency": 0.5}, 0.1)),
        ("auto", 2, ("subject", 0.0)),
    ],
)
def test_the_task_decides_selector_and_coverage(task, references, expected):
    assert task_defaults(task, references) == expected


@pytest.mark.parametrize(
    ("setting", "references", "labels", "coverage"),
    [
        ({}, 1, ["0.5 edges + 0.5 saliency"], [0.1]),
        ({}, 2, ["subject"] * 2, [0.0] * 2),
        ({"task": "edit"}, 2, ["0.5 edges + 0.5 saliency"] * 2, [0.1] * 2),
        ({"task": ["edit", "subject"]}, 2, ["0.5 edges + 0.5 saliency", "subject"], [0.1, 0.0]),
        ({"task": "global"}, 1, ["uniform"], [0.0]),
        ({"selector": "random"}, 1, ["random"], [0.0]),
        ({"selector": "random", "task": "edit"}, 1, ["random"], [0.1]),
        ({"selector": "random", "task": "edit", "coverage": 0.3}, 1, ["random"], [0.3]),
        ({"coverage": 0}, 1, ["0.5 edges + 0.5 saliency"], [0.0]),
        ({"selector": ["detail", None]}, 2, ["detail", "subject"], [0.0, 0.0]),
    ],
)
def test_what_the_user_names_wins_over_the_task(setting, references, labels, coverage):
    images = [noise(i) for i in range(references)]
    selection = select_tokens(images, [GRID] * references, Config(**setting))
    assert [kept.selector for kept in selection.references] == labels
    assert selection.coverage == tuple(coverage)
    task = setting.get("task", "auto")
    assert selection.task == (task if isinstance(task, str) else ", ".join(task))


def test_an_edit_of_the_whole_picture_keeps_all_by_itself_and_says_so_where_it_may_not():
    images, grids = [noise(0), noise(1)], [GRID, GRID]
    assert select_tokens(images[:1], grids[:1], Config(keep="auto", task="global")).kept == 64
    mixed = select_tokens(images, grids, Config(keep="auto", task=["global", "subject"]))
    alone = select_tokens(images, grids, Config(keep="auto", task="subject"))
    assert [kept.selector for kept in mixed.references] == ["all", "subject"]
    assert len(mixed.references[0].index) == 64
    assert np.array_equal(mixed.references[1].index, alone.references[1].index)
    few = select_tokens(images, grids, Config(keep=[0.25, "auto"], task=["global", "subject"]))
    assert len(few.references[0].index) == 16 and few.references[0].selector == "uniform"
    advice = "a global edit loses quality with every dropped token: keep all, or use keep='auto'"
    assert str(few).splitlines()[-1] == advice
    assert (
        advice not in str(alone)
        and advice not in str(mixed)
        and advice not in str(select_tokens(images, grids, Config(keep=1, task="global")))
    )


# What is kept


def test_no_keep_at_all_is_refused_before_there_are_references():
    with pytest.raises(ValueError, match=r"keep is \[\]: pass one value, or one per reference"):
        Config(keep=[])


def test_a_mask_that_marks_nothing_is_said():
    marked = np.zeros((64, 64), np.uint8)
    marked[:8, :8] = 255
    pictures = [np.dstack([noise(i), one]) for i, one in enumerate((marked, np.zeros_like(marked)))]
    lines = str(select_tokens(pictures, [GRID, GRID], Config(selector="mask"))).splitlines()
    assert lines[3:] == ["the mask of reference 2 marks nothing, so its tokens are spread evenly"]


@pytest.mark.parametrize(
    ("keep", "task", "everything"),
    [
        (1.0, "auto", True),
        ([1, 1.0], "subject", True),
        ("auto", "global", True),
        (["auto", 1.0], ["global", "edit"], True),
        ("auto", "edit", False),
        ("auto", ["global", "edit"], False),
        ([1.0, 0.9], "global", False),
        (64, "global", False),
    ],
)
def test_a_config_says_whether_it_keeps_all_of_any_references(keep, task, everything):
    config = Config(keep=keep, task=task)
    assert config.keeps_all() is everything
    selection = select_tokens([noise(0), noise(1)], [GRID, GRID], config)
    assert (selection.kept == selection.total) is everything


def test_a_selection_reports_what_it_kept():
    selection = select_tokens([noise(), noise(1)[:, :32]], [GRID, (8, 4)], Config(keep=0.25, selector="detail"))
    first, second = selection.references
    assert (selection.kept, selection.total) == (24, 96)
    assert first.grid == (8, 8) and second.grid == (8, 4)
    assert np.array_equal(np.flatnonzero(first.mask), first.index) and second.mask.shape == (8, 4)
    assert np.array_equal(selection.index, np.concatenate([first.index, second.index + 64]))
    assert selection.index.dtype == np.int64
    assert np.array_equal(first.scores, SELECTORS["detail"](noise(), GRID, None))
    assert first.scores[first.mask].min() >= first.scores[~first.mask].max()

    report = json.loads(json.dumps(selection.to_dict()))
    assert report["kept"] == 24 and report["total"] == 96 and report["task"] == "auto" and report["seconds"] > 0
    assert report["references"][1] == {
        "grid": [8, 4],
        "kept": len(second.index),
        "total": 32,
        "selector": "detail",
        "coverage": 0.0,
        "averages": 0,
        "overview": None,
    }


def test_merging_spends_a_share_of_the_budget_on_averages_of_the_rest():
    images, grids = [noise(), noise(1)[:, :32]], [GRID, (8, 4)]
    plain = select_tokens(images, grids, Config(keep=0.5, selector="detail"))
    merged = select_tokens(images, grids, Config(keep=0.5, selector="detail", merge=0.25))
    assert plain.into is None and all(len(kept.averages) == 0 for kept in plain.references)
    assert np.array_equal(plain.references[0].stands_for, np.where(plain.references[0].mask.ravel(), np.arange(64), -1))
    assert [len(kept.index) for kept in merged.references] == [len(kept.index) for kept in plain.references] == [32, 16]
    for before, after in zip(plain.references, merged.references, strict=True):
        assert np.array_equal(after.into, merge_rest(after.scores, len(after.index), 0.25))
        assert np.array_equal(after.index, np.unique(after.into))
        assert 0 < len(after.averages) < len(after.index)
        assert np.isin(rank_tokens([after.scores])[:8], after.index).all() and not np.array_equal(
            after.index, before.index
        )
    assert np.array_equal(merged.into, np.concatenate([merged.references[0].into, merged.references[1].into + 64]))
    assert np.array_equal(np.unique(merged.into), merged.index)
    first = str(merged).splitlines()[0]
    averages = len(merged.references[0].averages)
    assert first == f"reference 1: 32 of 64 tokens (50 %) by detail, {averages} of them averages of the rest"
    assert merged.to_dict()["references"][0]["averages"] == averages


def test_merging_leaves_whole_references_and_padding_alone():
    shown = [None, np.arange(64).reshape(8, 8) % 8 < 5]
    selection = select_tokens([noise()] * 2, [GRID] * 2, Config(keep=[1.0, 0.25], merge=0.5), shown)
    whole, padded = selection.references
    assert whole.into is None and np.array_equal(whole.index, np.arange(64))
    assert (padded.into[~shown[1].ravel()] == -1).all() and (padded.into[shown[1].ravel()] >= 0).all()
    assert np.array_equal(
        selection.into, np.concatenate([np.arange(64), np.where(padded.into < 0, -1, padded.into + 64)])
    )
    empty = select_tokens([noise(), flat()], [GRID] * 2, Config(keep=4, share="joint", floor=0, merge=0.5))
    assert len(empty.references[1].index) == 0 and (empty.into[64:] == -1).all() and len(empty.index) == 4
    few = select_tokens([noise()], [GRID], Config(keep=3, merge=0.1))  # a share of less than half a token
    assert few.into is None and len(few.index) == 3
    some = np.arange(64).reshape(8, 8) < 10
    all_shown = select_tokens([noise()], [GRID], Config(keep=0.5, multiple_of=16, merge=0.3), [some])
    assert all_shown.into is None and all_shown.kept == 32


def test_a_selection_prints_as_a_short_table():
    selection = select_tokens([noise(), noise(1)], [GRID] * 2, Config(keep=[16, 1], task="edit"))
    first, second, total = str(selection).splitlines()
    assert first == "reference 1: 16 of 64 tokens (25 %) by 0.5 edges + 0.5 saliency, 10 % of them spread evenly"
    assert second == "reference 2: 64 of 64 tokens (100 %)"
    assert total.startswith("total: 80 of 128 tokens (62 %), task edit, in ") and total.endswith(" ms")


def test_a_flat_reference_leaves_the_scores_of_the_first_as_they_are():
    for selector in ("edges", "detail", "saliency"):
        alone = select_tokens([noise()], [GRID], Config(selector=selector))
        both = select_tokens([noise(), flat()], [GRID] * 2, Config(selector=selector, share="joint"))
        assert np.array_equal(alone.references[0].scores, both.references[0].scores)
        assert not both.references[1].scores.any()
        assert len(both.references[1].index) == 1  # its floor


def test_a_flat_picture_is_sampled_in_the_uniform_order():
    for setting in ({}, {"task": "edit"}, {"selector": "detail"}):
        selection = select_tokens([flat()], [GRID], Config(keep=16, **setting))
        assert np.array_equal(selection.references[0].mask, uniform_order(GRID) < 16)


def test_keeping_all_scores_nothing():
    selection = select_tokens([noise(), None], [GRID] * 2, Config(keep=1, selector=refuse))
    assert selection.kept == selection.total == 128
    assert np.array_equal(selection.index, np.arange(128))
    assert all((kept.scores == 1).all() and kept.selector == "all" for kept in selection.references)
    apart = select_tokens([None, noise()], [GRID] * 2, Config(keep=[1, 0.5], selector=[refuse, "edges"]))
    assert [len(kept.index) for kept in apart.references] == [64, 32]


def test_a_batch_of_pictures_shares_one_index_by_its_mean_scores():
    batch = [noise(), flat()]
    (kept,) = select_tokens([batch], [GRID], Config(selector="detail")).references
    alone = [select_tokens([image], [GRID], Config(selector="detail")).references[0] for image in batch]
    assert np.array_equal(kept.scores, (alone[0].scores + alone[1].scores) / 2)
    assert kept.picture is batch[0] and alone[1].picture is batch[1]
    assert select_tokens([None], [GRID], Config(selector="uniform")).references[0].picture is None


@pytest.mark.parametrize("selector", ["saliency", {"edges": 1, "subject": 1}, blend({"saliency": 1}), "edges"])
def test_the_time_of_choosing_is_without_what_is_read_once(selector, monkeypatch):
    now, load_net = [0.0], saliency.load_net

    def slow():
        now[0] += 100 * (not loaded)
        loaded.append(selector)
        return load_net()

    loaded = []
    monkeypatch.setattr(saliency, "load_net", slow)
    monkeypatch.setattr("sparse_context.selection.time.perf_counter", lambda: now[0])
    assert select_tokens([noise()], [GRID], Config(selector=selector)).seconds == 0
    assert bool(loaded) == (selector != "edges")


def test_no_references_give_an_empty_selection():
    selection = select_tokens([], [], Config())
    assert selection.references == () and selection.index.shape == (0,) and selection.index.dtype == np.int64
    assert str(selection).startswith("total: 0 of 0 tokens")


@settings(max_examples=20)
@given(st.integers(2, 200), st.sampled_from(["joint", "equal"]), st.integers(1, 16))
def test_the_total_is_what_was_asked(keep, share, multiple_of):
    config = Config(keep=keep, share=share, multiple_of=multiple_of, selector="random")
    selection = select_tokens([None, None], [GRID, (5, 7)], config)
    total = min(keep, 99)
    up = -(-total // multiple_of) * multiple_of
    assert selection.kept == (total if total == 99 else up if up <= 99 else up - multiple_of)


# Chance


def test_selection_is_deterministic_by_seed_and_leaves_other_generators_alone():
    config = Config(selector="random", keep=20)

    def select():
        return select_tokens([None, None], [GRID] * 2, config)

    np.random.seed(0)
    torch.manual_seed(0)
    first = select()
    drawn = np.random.random(), torch.rand(1).item()
    again = select()
    np.random.seed(0)
    torch.manual_seed(0)
    assert (np.random.random(), torch.rand(1).item()) == drawn  # selecting drew nothing from them
    assert np.array_equal(first.index, again.index)
    other = select_tokens([None, None], [GRID] * 2, Config(selector="random", keep=20, seed=1))
    assert not np.array_equal(first.index, other.index)


def test_each_reference_has_random_numbers_of_its_own():
    scores = [
        kept.scores for kept in select_tokens([None] * 3, [GRID] * 3, Config(selector="random", seed=5)).references
    ]
    for i, part in enumerate(scores):
        assert np.array_equal(part, np.random.default_rng([5, i]).random(GRID, dtype=np.float32))
    assert not np.array_equal(scores[0], scores[1])


# Masks


def test_a_mask_keeps_what_it_covers():
    image = noise(channels=4)
    image[..., 3] = 0
    image[16:32, 32:64, 3] = 255
    selection = select_tokens([image], [GRID], Config(keep=8, selector="mask"))
    assert np.argwhere(selection.references[0].mask).tolist() == [[r, c] for r in (2, 3) for c in range(4, 8)]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (mask([np.ones((64, 64))]), "There is a reference 2, but only 1 masks"),
        (mask([None] * 3), "holds 3 masks for 2 references"),
        (["edges", mask([None, None])], "selector of reference 2 holds 2 masks"),
    ],
)
def test_masks_that_do_not_match_the_references_are_refused(selector, message):
    with pytest.raises(ValueError, match=message):
        select_tokens([noise(channels=4)] * 2, [GRID] * 2, Config(selector=selector))


# What is refused


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"keep": 0}, "keep is 0: pass a ratio"),
        ({"keep": 1.2}, "keep is 1.2"),
        ({"keep": [0.2, "lots"]}, "keep is 'lots'"),
        ({"selector": "edge"}, "no selector 'edge'"),
        ({"selector": ["edges", "salience"]}, "no selector 'salience'.*Did you mean 'saliency'"),
        ({"selector": {"edges": -1}}, "weight of 'edges' in the blend is -1"),
        ({"task": "style"}, "task is 'style': choose one of auto, edit, global, subject"),
        ({"task": ["edit", 3]}, "task is 3"),
        ({"coverage": 1.5}, "coverage is 1.5"),
        ({"coverage": [0.1, 0.2]}, r"coverage is \[0.1, 0.2\]: pass one share"),
        ({"share": "fair"}, "share is 'fair'"),
        ({"floor": -1}, "floor is -1"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"mass": 1.5}, "mass is 1.5"),
        ({"seed": -1}, "seed is -1: pass a whole number"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"selector": []}, r"selector is \[\]: pass one value, or one per reference"),
        ({"task": ()}, r"task is \(\): pass one value, or one per reference"),
    ],
)
def test_a_config_names_the_bad_field_and_value(setting, message):
    with pytest.raises(ValueError, match=message):
        Config(**setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"keep": [0.2]}, "keep has 1 values for 2 references"),
        ({"selector": ["edges"] * 3}, "selector has 3 values for 2 references"),
        ({"task": ["edit"] * 3}, "task has 3 values for 2 references"),
        ({"keep": 0.001, "share": "joint"}, "makes 1 tokens for 2 references"),
    ],
)
def test_values_that_do_not_match_the_references_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        select_tokens([noise()] * 2, [GRID] * 2, Config(**setting))


def test_what_is_no_array_of_pixels_and_a_grid_without_tokens_are_named():
    picture = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="Reference 2 is <PIL.Image.*: pass its pixels, a uint8 array"):
        select_tokens([picture, Image.fromarray(picture)], [(2, 2)] * 2, SparseContextConfig())
    for keep in (0.5, 1.0):
        with pytest.raises(ValueError, match=r"The token grid of reference 1 is \(0, 8\): a reference has"):
            select_tokens([picture], [(0, 8)], SparseContextConfig(keep=keep))


def test_arrays_in_a_config_are_numbers_and_tuples():
    config = SparseContextConfig(keep=np.array([0.1, 0.2]), task=np.array(["edit", "subject"]), coverage=np.array(0.1))
    assert config == SparseContextConfig(keep=(0.1, 0.2), task=("edit", "subject"), coverage=0.1)
    assert SparseContextConfig(keep=np.array(0.2)).keep == 0.2


def test_pictures_and_grids_come_in_pairs():
    with pytest.raises(ValueError, match="1 pictures for 2 token grids"):
        select_tokens([noise()], [GRID] * 2, Config())


def test_latents_without_pixels_are_refused_by_name():
    with pytest.raises(ValueError, match="'edges' needs the picture's pixels"):
        select_tokens([None], [GRID], Config(task="edit"))
    assert select_tokens([None], [GRID], Config(selector="uniform", keep=0.25)).kept == 16


def test_selecting_loads_neither_torch_nor_diffusers():
    code = "import sys, sparse_context.selection; print({'torch', 'diffusers', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_padding_is_kept_last():
    flat = np.full((64, 64, 3), 128, np.uint8)
    shown = np.zeros((8, 8), bool)
    shown[2:6, 2:6] = True
    config = SparseContextConfig(keep=16, selector="edges", coverage=0)
    (kept,) = select_tokens([flat], [(8, 8)], config, [shown]).references
    assert np.array_equal(kept.mask, shown)
    (kept,) = select_tokens([flat], [(8, 8)], config, [None]).references
    assert not np.array_equal(kept.mask, shown)


def test_references_are_scored_side_by_side_and_a_user_s_own_function_in_turns():
    """Threads change nothing of what is kept; a function of the user's own is never asked by two at once."""
    picture = noise()
    pictures, grids = [picture, picture[::-1].copy(), picture[:, ::-1].copy()], [(8, 8)] * 3
    threads = set()

    def own(image, grid, generator):
        threads.add(threading.get_ident())
        return SELECTORS["random"](image, grid, generator)

    together = select_tokens(pictures, grids, SparseContextConfig(selector="random", seed=3))
    in_turns = select_tokens(pictures, grids, SparseContextConfig(selector=own, seed=3))
    assert np.array_equal(together.index, in_turns.index) and threads == {threading.get_ident()}
    seen = set()

    def score(selector, *rest):
        seen.add(threading.get_ident())
        return score_tokens(selector, *rest)

    select_tokens(pictures, grids, SparseContextConfig(selector="edges"), score=score)
    assert threading.get_ident() not in seen
