"""Which overviews a call has, and how its budget is spent on both parts."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_budget import counts, coverages, references, shares, total_size

from sparse_context import SparseContextConfig as Config
from sparse_context import select_tokens
from sparse_context.budget import choose_tokens, pools
from sparse_context.overview import factor_for, overview_grid
from sparse_context.plan import plan_selection
from sparse_context.trained import Trained

BY_2_AND_4 = Trained((2, 4), "spread", False, (0.05, 0.5))


def factors(grids, trained=None, shown=None, **settings):
    """The factor of each reference's overview, None without one."""
    plan = plan_selection(Config(selector="uniform", **settings), grids, shown, trained)
    assert all(o is None or o.grid == overview_grid(g, o.factor) for o, g in zip(plan.overviews, grids, strict=True))
    return [overview and overview.factor for overview in plan.overviews]


def notes(grids, trained=None, shown=None, **settings):
    return plan_selection(Config(selector="uniform", **settings), grids, shown, trained).notes


# Which factor


@pytest.mark.parametrize(
    ("ratio", "grid", "factor"),
    [
        (1.0, (8, 8), 2),
        (0.3, (8, 8), 2),
        (0.29, (8, 8), 4),
        (0.05, (64, 64), 4),
        (0.2, (128, 128), 8),
        (0.5, (128, 128), 2),
    ],
)
def test_a_factor_suits_the_budget(ratio, grid, factor):
    assert factor_for(ratio, grid, "global") == factor
    assert {factor_for(ratio, grid, task) for task in ("edit", "subject")} == {8 if grid == (128, 128) else 4}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep": 0.2, "overview": 4}, [4, 4]),
        ({"keep": 0.3, "overview": "auto", "task": "global"}, [2, 2]),
        ({"keep": 0.3, "overview": "auto", "task": "edit"}, [4, 4]),
        ({"keep": 0.2, "overview": "auto"}, [4, 4]),
        ({"keep": 0.05, "overview": "auto"}, [8, 8]),
        ({"keep": [0.3, 0.05], "overview": "auto", "task": "global"}, [2, 8]),
        ({"keep": 0.2, "overview": [None, 2]}, [None, 4]),
        ({"keep": 0.2, "overview": 3}, [3, 3]),
        ({"keep": 0.1, "overview": 3}, [4, 4]),
        ({"keep": 0.2, "overview": 16}, [16, 16]),
        ({"keep": "auto", "overview": "auto"}, [4, 4]),
        ({"keep": "auto", "overview": 2}, [2, 2]),
        ({"keep": 1, "overview": 4}, [None, None]),
        ({"keep": [1.0, 0.2], "overview": 4}, [None, 4]),
        ({"keep": 512, "overview": 4}, [None, None]),
        ({"keep": 32, "overview": 4}, [4, 4]),
        ({"keep": 31, "overview": 4}, [4, 8]),
        ({"keep": 31, "overview": 4, "share": "joint"}, [8, 4]),
        ({"keep": 0.2, "overview": 4, "multiple_of": 600}, [None, None]),
        ({"keep": 0.2}, [None, None]),
        ({"keep": 0.2, "overview": None}, [None, None]),
    ],
)
def test_the_first_factor_that_the_budget_holds(settings, expected):
    assert factors([(16, 16), (16, 16)], **settings) == expected


def test_a_named_factor_that_gives_way_is_reported():
    assert notes([(16, 16)], keep=0.2, overview=4) == []
    assert notes([(16, 16)], keep=0.05, overview=4) == [
        "the overview of reference 1 is by 8, because by 4 it takes 16 tokens"
    ]


@pytest.mark.parametrize(
    ("grids", "settings", "smallest"),
    [
        ([(64, 64)], {"keep": 0.003}, 0.0038),
        ([(64, 64), (8, 8)], {"keep": [0.003, 0.5]}, [0.0038, 0.5]),
        ([(64, 64)], {"keep": 15}, 16),
        ([(64, 64), (64, 64)], {"keep": 31}, 32),
        ([(64, 64), (64, 64)], {"keep": [15, 40]}, [16, 40]),
        ([(64, 64), (32, 32)], {"keep": 19, "share": "joint"}, 20),
        ([(64, 64), (32, 32)], {"keep": 0.003, "share": "joint"}, 0.0039),
    ],
)
def test_a_budget_below_the_coarsest_overview_is_refused_with_the_smallest_that_does(grids, settings, smallest):
    number = smallest[0] if isinstance(smallest, list) else smallest
    with pytest.raises(ValueError, match=f"takes [0-9]+: pass keep={number} or more, or overview=None"):
        factors(grids, overview=4, **settings)
    assert None not in factors(grids, overview=4, **settings | {"keep": smallest})
    less = number - (1 if number > 1 else 0.0002)
    with pytest.raises(ValueError, match="pass keep="):
        factors(grids, overview=4, **settings | {"keep": [less, *smallest[1:]] if number != smallest else less})


# What weights were trained for


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep": 0.3, "task": "global"}, [2, 2]),
        ({"keep": 0.3}, [4, 4]),
        ({"keep": 0.2}, [4, 4]),
        ({"keep": [0.5, 0.2], "task": "global"}, [2, 4]),
        ({"keep": 0.05}, [None, None]),  # never by a factor that the weights do not know
        ({"keep": 1.0}, [None, None]),
        ({"keep": 0.2, "overview": None}, [None, None]),
        ({"keep": 0.2, "overview": ["trained", None]}, [4, None]),
        ({"keep": 0.2, "merge": 0.5}, [None, None]),
        ({"keep": "auto"}, [4, 4]),
    ],
)
def test_weights_have_overviews_that_they_were_trained_for(settings, expected):
    grids = [(16, 16), (16, 16)]
    assert factors(grids, BY_2_AND_4, **settings) == expected
    assert factors(grids, None, **settings) == factors(grids, Trained(), **settings) == [None, None]


def test_weights_have_overviews_of_the_tasks_that_they_were_trained_for():
    edits, grids = Trained((4,), tasks=("edit", "global")), [(16, 16), (16, 16)]
    assert factors(grids, edits, keep=0.2) == [None, None]  # several references are subjects
    assert factors(grids[:1], edits, keep=0.2) == [4]  # one is an edit
    assert factors(grids, edits, keep=0.2, task=["subject", "edit"]) == [None, 4]
    assert factors(grids, edits, keep=0.2, overview=4) == [4, 4]  # as the user says
    plan = plan_selection(Config(keep=0.2, task="subject", selector="uniform"), grids[:1], None, edits)
    assert plan.notes == ["reference 1 has no overview, because the weights learned them of task edit or global alone"]
    assert Config(keep="auto", task="global").keeps_all(Trained((4,), tasks=("edit",)))
    assert not Config(keep="auto", task="global").keeps_all(edits)


def test_the_finest_is_the_last_resort_of_weights_that_know_no_coarser_one():
    assert factors([(16, 16)], Trained((2,)), keep=0.26) == [2]
    assert factors([(16, 16)], Trained((2,)), keep=0.2) == [None]


@pytest.mark.parametrize(
    ("known", "keep", "factor"), [((4,), 0.3, 4), ((2, 4), 0.3, 2), ((2, 4), 0.2, 4), ((8,), 0.5, 8), ((2,), 0.2, 4)]
)
def test_auto_takes_what_the_weights_know(known, keep, factor):
    assert factors([(16, 16)], Trained(known), keep=keep, overview="auto", task="global") == [factor]


def test_the_report_says_which_overviews_the_weights_did_not_learn():
    spread = "overviews are laid out as 'spread', because the weights learned them so"
    assert notes([(16, 16)], BY_2_AND_4, keep=0.2, overview=4) == [spread]
    assert notes([(16, 16)], BY_2_AND_4, keep=0.2, overview=4, overview_layout="spread") == []
    assert notes([(16, 16)] * 2, BY_2_AND_4, keep=0.2, overview=[4, 8]) == [
        spread,
        "the overview of reference 2 is by 8, and the weights learned overviews by 2 or 4",
    ]
    edits = Trained((4,), tasks=("edit",))
    assert notes([(16, 16)] * 2, edits, keep=0.2, overview=4, task=["edit", "subject"])[1:] == [
        "the overview of reference 2 is of task subject, and the weights learned those of task edit"
    ]
    assert notes([(16, 16)], BY_2_AND_4, keep=0.2, overview=4, overview_layout="reference") == [
        "overviews are laid out as 'reference', and the weights learned 'spread'"
    ]
    assert notes([(16, 16)], keep=0.2, overview=8) == []  # weights that know none


def test_a_layout_is_what_the_user_says_then_what_was_trained_then_a_reference():
    def layout(trained=None, **settings):
        return plan_selection(Config(selector="uniform", **settings), [(8, 8)], None, trained).overviews[0].layout

    assert layout(overview=4) == "reference"
    assert layout(BY_2_AND_4) == layout(BY_2_AND_4, overview=8) == "spread"
    assert layout(Trained((4,), "reference")) == "reference"
    assert layout(BY_2_AND_4, overview_layout="reference") == "reference"
    assert layout(overview=4, overview_layout="spread") == "spread"
    assert layout(Trained(()), overview=4) == "reference"


def test_the_report_says_why_there_is_none():
    grids = [(16, 16), (16, 16)]
    said = "the weights were trained for overviews by 2 or 4, laid out as 'spread'"
    assert notes(grids, BY_2_AND_4, keep=0.2) == [said]
    assert notes(grids, BY_2_AND_4, [True, False], keep=0.2) == [
        "reference 2 has no overview, because it was passed as latents",
        said,
    ]
    assert notes(grids[:1], BY_2_AND_4, keep=0.05) == [
        "reference 1 has no overview, because by 4 it takes 16 tokens and the budget is 13"
    ]
    assert notes(grids[:1], BY_2_AND_4, keep=0.2, merge=0.5) == [
        "reference 1 has no overview, because merge asks for averages"
    ]
    assert notes(grids, BY_2_AND_4, keep=0.2, overview=None) == notes(grids, BY_2_AND_4, keep=1.0) == []


def test_latents_have_no_overview_that_is_named():
    with pytest.raises(ValueError, match="Reference 2 was passed as latents, and an overview is made from pixels"):
        factors([(8, 8), (8, 8)], shown=[True, False], overview=4)
    assert factors([(8, 8), (8, 8)], shown=[True, False], overview=[4, None]) == [4, None]
    assert factors([(8, 8), (8, 8)], shown=[False, False], overview=4, keep=1.0) == [None, None]


# Who scores


@pytest.mark.parametrize(
    ("task", "count", "label"),
    [
        ("edit", 1, "0.5 residual + 0.5 subject"),
        ("global", 1, "residual"),
        ("auto", 1, "0.5 residual + 0.5 subject"),
        ("auto", 2, "subject"),
    ],
)
def test_beside_an_overview_a_task_has_a_rule_of_its_own(task, count, label):
    plan = plan_selection(Config(task=task, overview=4), [(8, 8)] * count)
    assert plan.labels == [label] * count and plan.coverages == [0.0] * count
    assert "residual" not in plan_selection(Config(task=task), [(8, 8)]).labels[0]


def test_auto_takes_sharp_tokens_where_the_overview_is_wrong_whatever_the_task():
    """It aims at decibels of the whole picture, so that another order would take more tokens."""
    for task in ("edit", "global", "subject"):
        plan = plan_selection(Config(task=task, overview=4, keep=["auto", 0.3]), [(8, 8)] * 2)
        assert plan.labels[0] == "residual" and plan.coverages[0] == 0.0
    assert plan.labels[1] == "subject"
    assert plan_selection(Config(selector="edges", overview=4, keep="auto"), [(8, 8)]).labels == ["edges"]


def test_a_pool_of_references_holds_a_token_for_each_that_has_no_overview():
    """Else a default would have a call fail that works without it."""
    joint = {"share": "joint"}
    assert factors([(16, 16)] * 2, Trained((4,)), shown=[True, False], keep=0.03125, **joint) == [None, None]
    assert factors([(16, 16)] * 2, Trained((4,)), shown=[True, False], keep=17, **joint) == [4, None]
    assert factors([(16, 16)] * 2, keep=8, overview=[4, None], **joint) == [8, None]
    assert factors([(16, 16)] * 2, keep=16, overview=[4, None], floor=0, **joint) == [4, None]
    says = "of reference 1 takes 1, beside one for each other reference: pass keep=0.0118 or more"
    with pytest.raises(ValueError, match=says):
        factors([(8, 8)] * 2, keep=0.008, overview=[4, None], **joint)
    assert factors([(8, 8)] * 2, keep=0.0118, overview=[4, None], **joint) == [8, None]


def test_a_residual_is_that_of_the_overview():
    plan = plan_selection(Config(overview=[2, 4, None], keep=0.3, selector="residual"), [(8, 8)] * 3)
    assert [getattr(selector, "factor", selector) for selector in plan.selectors] == [2, 4, "residual"]
    blend = plan_selection(Config(overview=2, keep=0.3, selector={"residual": 0.5, "edges": 0.5}), [(8, 8)])
    assert [getattr(part, "factor", part) for part in blend.selectors[0]] == [2, "edges"]
    assert blend.labels == ["0.5 residual + 0.5 edges"]


# Both parts of a budget


@st.composite
def spent_budgets(draw):
    """References, and a budget that holds what is spent of it."""
    scores = draw(references())
    share = draw(shares)
    keep = draw(st.floats(0.05, 0.99) | st.integers(2, 200) | st.lists(st.floats(0.05, 0.99), min_size=4, max_size=4))
    keep = keep[: len(scores)] if isinstance(keep, list) else keep
    sizes = [part.size for part in scores]
    spent = [0] * len(scores)
    for pool in pools(keep, sizes, share, 0, 1):
        left = pool.tokens
        for i in pool.members:
            spent[i] = draw(st.integers(0, min(left, sizes[i])))
            left -= spent[i]
    return scores, keep, share, spent


@given(spent_budgets(), coverages)
def test_a_budget_counts_both_parts(given_budget, coverage):
    scores, keep, share, spent = given_budget
    setting = {"share": share, "coverage": coverage, "floor": 0}
    plain, chosen = choose_tokens(scores, keep, **setting), choose_tokens(scores, keep, reserved=spent, **setting)
    assert sum(counts(chosen)) + sum(spent) == sum(counts(plain))
    if share == "equal" or isinstance(keep, list):
        assert [n + s for n, s in zip(counts(chosen), spent, strict=True)] == counts(plain)


@given(spent_budgets(), coverages, st.integers(1, 4))
def test_a_floor_is_one_of_sharp_tokens_as_far_as_the_budget_holds_them(given_budget, coverage, floor):
    scores, keep, share, spent = given_budget
    assume(isinstance(keep, list) or keep >= floor * len(scores) or share == "joint")
    plain = [pool for pool in pools(keep, [part.size for part in scores], share, floor, 1)]
    assume(sum(pool.tokens for pool in plain) - sum(spent) >= sum(s == 0 for s in spent))
    chosen = counts(choose_tokens(scores, keep, share=share, coverage=coverage, floor=floor, reserved=spent))
    for pool in plain:
        left = pool.tokens - sum(spent[i] for i in pool.members)
        due = {i: min(floor, scores[i].size - spent[i]) for i in pool.members}
        if len(pool.members) == 1:
            assert chosen[pool.members[0]] == min(left, scores[pool.members[0]].size)
        elif left >= sum(due.values()):
            assert all(chosen[i] >= due[i] for i in pool.members)
        else:
            assert all(chosen[i] for i in pool.members if not spent[i])


@given(spent_budgets(), st.integers(1, 20))
def test_a_multiple_counts_both_parts(given_budget, multiple_of):
    scores, keep, share, spent = given_budget
    setting = {"share": share, "floor": 0, "multiple_of": multiple_of}
    total = sum(counts(choose_tokens(scores, keep, **setting)))
    assume(total >= sum(spent))
    chosen = choose_tokens(scores, keep, reserved=spent, **setting)
    assert sum(counts(chosen)) + sum(spent) == total


def test_a_multiple_that_leaves_less_than_is_spent_is_refused():
    with pytest.raises(ValueError, match="makes 64 tokens, and overviews take 70: keep more, or take coarser"):
        choose_tokens([np.zeros((10, 10))], 0.7, multiple_of=64, reserved=[70], floor=0)


@given(references(), st.floats(0.05, 0.9), coverages)
def test_a_smaller_budget_beside_the_same_overview_keeps_a_subset(scores, ratio, coverage):
    spent = [max(1, part.size // 16) for part in scores]
    assume(all(math.floor(ratio * part.size + 0.5) >= s for part, s in zip(scores, spent, strict=True)))
    fewer, more = (
        choose_tokens(scores, keep, coverage=coverage, reserved=spent, floor=0) for keep in (ratio, min(ratio * 1.1, 1))
    )
    assert all(set(a) <= set(b) for a, b in zip(fewer, more, strict=True))


def test_one_that_has_nothing_comes_before_one_that_has_an_overview():
    scores = [np.ones((4, 4), np.float32), np.zeros((4, 4), np.float32)]
    assert counts(choose_tokens(scores, 5, share="joint", reserved=[4, 0])) == [0, 1]
    assert counts(choose_tokens(scores, 6, share="joint", reserved=[4, 0])) == [1, 1]
    assert counts(choose_tokens(scores, 8, share="joint", reserved=[4, 0])) == [3, 1]
    assert counts(choose_tokens(scores, 8, reserved=[4, 0])) == [0, 4]
    assert total_size(scores) == 32


# auto


def noise(level, size=128):
    """A smooth picture with noise of some grey levels on its left half."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    pixels = np.stack([x, y, (x + y) / 2], -1) * 200.0 / size + 20
    pixels[:, : size // 2] += rng.normal(0, level, (size, size // 2, 3))
    return np.clip(pixels, 0, 255).round().astype(np.uint8)


def shown(picture, kept):
    """The picture that both parts hold, and its dB."""
    rows, columns = kept.grid
    factor, side = kept.overview.factor, picture.shape[0] // rows
    small = picture.astype(float).reshape(picture.shape[0] // factor, factor, -1, factor, 3).mean((1, 3))
    import cv2

    large = cv2.resize(small.astype(np.float32), picture.shape[1::-1], interpolation=cv2.INTER_CUBIC).clip(0, 255)
    sharp = np.kron(kept.mask, np.ones((side, side), bool))
    held = np.where(sharp[..., None], picture, large)
    return 10 * np.log10(255**2 / ((held - picture) ** 2).mean())


@pytest.mark.parametrize("selector", ["residual", "uniform", "detail"])
@pytest.mark.parametrize("psnr", [28.0, 32.0, 36.0])
def test_auto_is_the_fewest_sharp_tokens_that_reach_the_level(selector, psnr):
    picture = noise(20)
    config = Config(keep="auto", overview=4, selector=selector, psnr=psnr, floor=0)
    (kept,) = select_tokens([picture], [(16, 16)], config).references
    assert 0 < len(kept.index) < 256 - 16 and kept.count == len(kept.index) + 16
    assert kept.psnr >= psnr and kept.psnr == pytest.approx(shown(picture, kept), abs=0.01)
    if selector != "uniform":  # whose order is all that it knows
        fewer = Config(keep=kept.count - 1, overview=4, selector=selector, floor=0)
        (less,) = select_tokens([picture], [(16, 16)], fewer).references
        assert shown(picture, less) < psnr


def test_a_higher_level_takes_more_and_a_level_that_the_overview_reaches_takes_none():
    def kept(psnr, level=20):
        config = Config(keep="auto", overview=4, selector="residual", psnr=psnr)
        return select_tokens([noise(level)], [(16, 16)], config).references[0]

    took = [len(kept(psnr).index) for psnr in (26, 30, 34)]
    assert took == sorted(set(took))
    assert len(kept(20).index) == 0 and kept(20).count == 16
    assert len(kept(30, level=0).index) == 0


def test_where_both_parts_would_be_all_tokens_these_are_kept_alone():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    selection = select_tokens([picture], [(8, 8)], Config(keep="auto", overview=2, psnr=60))
    assert selection.kept == 64 and selection.overviews == {} and len(selection.index) == 64
    assert "reference 1 has no overview, because 60 dB take all of its tokens" in selection.to_dict()["remarks"]


def test_auto_of_a_batch_is_for_its_worst_picture_and_padding_does_not_count():
    def kept(pictures, inside=None):
        config = Config(keep="auto", overview=4, selector="residual", floor=0)
        return select_tokens([pictures], [(16, 16)], config, inside).references[0]

    alone, both = kept(noise(20)), kept([noise(0), noise(20)])
    assert both.psnr >= 32 and len(both.index) >= len(alone.index) > 0
    right = np.zeros((16, 16), bool)
    right[:, 9:] = True  # where there is no noise
    assert len(kept(noise(20), [right]).index) == 0


def test_auto_without_an_overview_stays_what_it_was():
    pictures = [noise(20), noise(5)]
    plain = select_tokens(pictures, [(16, 16)] * 2, Config(keep="auto", selector="detail"))
    other = select_tokens(pictures, [(16, 16)] * 2, Config(keep="auto", selector="detail", psnr=40))
    one = select_tokens(pictures, [(16, 16)] * 2, Config(keep="auto", selector="detail", overview=[4, None]))
    assert np.array_equal(plain.index, other.index)
    assert np.array_equal(plain.references[1].index, one.references[1].index)
    assert one.references[1].psnr is None and one.references[0].psnr >= 32


def test_auto_of_a_global_edit_keeps_all_where_there_is_no_overview():
    def selected(trained=None, **settings):
        config = Config(keep="auto", task="global", **settings)
        selection = select_tokens([noise(20)], [(16, 16)], config, trained=trained)
        assert config.keeps_all(trained) is (selection.kept == 256)
        return selection

    assert selected().kept == selected(Trained()).kept == selected(BY_2_AND_4, overview=None).kept == 256
    assert selected(BY_2_AND_4).kept < 256 and selected(overview=4).kept < 256
    assert not Config(keep="auto", task="global").keeps_all(BY_2_AND_4)


# The config and the report


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"overview": 1}, "overview is 1: pass a factor from 2 to 16, 'auto', 'trained' or None"),
        ({"overview": 17}, "overview is 17"),
        ({"overview": 4.0}, "overview is 4.0"),
        ({"overview": True}, "overview is True"),
        ({"overview": "4"}, "overview is '4'"),
        ({"overview": [4, "none"]}, "overview is 'none'"),
        ({"overview": []}, "overview is \\[\\]: pass one value, or one per reference"),
        ({"overview_layout": "over"}, "overview_layout is 'over': choose one of spread, reference, or None"),
        ({"psnr": 0}, "psnr is 0: pass a number of dB above 0"),
        ({"psnr": float("inf")}, "psnr is inf"),
        ({"psnr": "high"}, "psnr is 'high'"),
        ({"overview": 4, "merge": 0.5}, "merge is 0.5 and overview 4: leave one of the two out"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, says):
    with pytest.raises(ValueError, match=says):
        Config(**setting)


def test_a_number_of_values_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="overview has 3 values for 2 references"):
        factors([(8, 8)] * 2, overview=[4, 4, 4])
    assert factors([(8, 8)] * 2, overview=np.array([2, 4]), keep=0.3) == [2, 4]
    assert factors([(8, 8)] * 2, overview=np.int64(4), keep=0.3) == [4, 4]


def test_the_report_names_both_parts():
    config = Config(keep=[0.2, 0.0625], overview=4, selector="detail", coverage=0.1, floor=0)
    selection = select_tokens([noise(20)] * 2, [(16, 16)] * 2, config)
    lines = str(selection).splitlines()
    assert lines[0] == (
        "reference 1: 51 of 256 tokens (20 %): 16 of an overview by 4, 35 sharp by detail, 10 % of them spread evenly"
    )
    assert lines[1] == "reference 2: 16 of 256 tokens (6 %): 16 of an overview by 4"
    assert lines[2].startswith("total: 67 of 512 tokens (13 %), task auto")
    record = selection.to_dict()
    assert record["kept"] == 67
    assert [reference["kept"] for reference in record["references"]] == [51, 16]
    assert record["references"][0]["overview"] == {
        "factor": 4,
        "layout": "reference",
        "grid": [4, 4],
        "kept": 16,
        "psnr": None,
    }
    assert len(selection.index) == 35 and selection.kept == 67 and selection.total == 512


def test_the_report_of_auto_names_the_level():
    config = Config(keep="auto", overview=4, selector="residual")
    selection = select_tokens([noise(20)], [(16, 16)], config)
    (kept,) = selection.references
    assert str(selection).splitlines()[0].endswith(f"{len(kept.index)} sharp by residual, together {kept.psnr:.1f} dB")
    assert selection.to_dict()["references"][0]["overview"]["psnr"] == kept.psnr


def test_the_report_says_where_a_budget_is_below_what_was_trained():
    few = select_tokens([noise(20)], [(16, 16)], Config(keep=0.04), trained=BY_2_AND_4)
    assert "the weights were trained with 5 % of the tokens and more" in str(few).splitlines()
    for keep in (0.05, 0.2):
        enough = select_tokens([noise(20)], [(16, 16)], Config(keep=keep), trained=BY_2_AND_4)
        assert "and more" not in str(enough)


def test_a_global_edit_that_drops_is_warned_of_only_without_an_overview():
    advice = "a global edit loses quality"
    assert advice in str(select_tokens([noise(20)], [(16, 16)], Config(task="global")))
    assert advice not in str(select_tokens([noise(20)], [(16, 16)], Config(task="global", overview=4)))
