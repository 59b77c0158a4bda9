"""Random and structured dropping: its distribution, its seeds, one index for the batch."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import picture

from sparse_context.selectors.order import uniform_order
from sparse_context.training.dropping import DROPS, MIX, Dropping, draw_selection

GRID = (16, 16)
PICTURE = np.asarray(picture(128, 128))


def pieces(kept, connectivity):
    """How many connected pieces a bool mask has; neighbours share a side (4) or also a corner (8)."""
    return cv2.connectedComponents(kept.astype(np.uint8), connectivity=connectivity)[0] - 1


def draws(count=600, grids=(GRID,), pictures=(PICTURE,), **settings):
    dropping = Dropping(**{"mix": {"random": 1.0}, **settings})
    return [draw_selection(dropping, pictures, grids, [7, number, 0]) for number in range(count)]


def test_ratios_are_log_uniform_between_their_bounds_and_a_tenth_is_dense():
    kept = np.array([s.kept / s.total for s in draws(1500)])
    dense = kept == 1
    assert abs(dense.mean() - 0.1) < 3 * np.sqrt(0.1 * 0.9 / 1500) + 0.005  # ratios above 255.5 / 256 round to all
    assert kept.min() >= np.round(0.05 * 256) / 256
    # Kolmogorov and Smirnov: their distance to the log-uniform law stays below 1.63 / sqrt(n) 99 times out of 100
    sparse = np.sort(kept[~dense])
    law = (np.log(sparse) - np.log(0.05)) / -np.log(0.05)
    steps = np.arange(1, len(sparse) + 1) / len(sparse)
    assert np.abs(law - steps).max() < 1.63 / np.sqrt(len(sparse)) + 0.02  # counts are whole


def test_each_reference_draws_its_own_ratio():
    ratios = np.array(
        [
            [len(k.index) / k.scores.size for k in s.references]
            for s in draws(300, [GRID, (8, 12)], [PICTURE, np.asarray(picture(96, 64))], dense=0.0)
        ]
    )
    assert abs(np.corrcoef(np.log(ratios.T))[0, 1]) < 0.2
    assert (ratios > 0).all()


def test_equal_seeds_draw_equal_sets_and_others_do_not():
    dropping = Dropping(mix={"random": 1.0}, dense=0.0, keep_max=0.5)
    index = {
        seed: draw_selection(dropping, [PICTURE], [GRID], seed).index.tolist()
        for seed in [(0, 5, 0), (0, 5, 1), (0, 6, 0), (1, 5, 0)]
    }
    assert len({tuple(i) for i in index.values()}) == 4
    assert draw_selection(dropping, [PICTURE], [GRID], (0, 5, 0)).index.tolist() == index[0, 5, 0]


def test_a_batch_draws_one_of_the_shares_of_averages_and_nothing_else_moves():
    setting = {"dense": 0.0, "keep_max": 0.6}
    plain, mixed = draws(400, **setting), draws(400, merge=(0.0, 0.5), **setting)
    merged = [s for s in mixed if s.into is not None]
    assert abs(len(merged) / 400 - 0.5) < 3 * np.sqrt(0.25 / 400)
    assert all(0 < len(s.references[0].averages) for s in merged)
    assert [s.kept for s in mixed] == [s.kept for s in plain]
    assert all(
        np.array_equal(a.references[0].scores, b.references[0].scores) for a, b in zip(plain, mixed, strict=True)
    )


def test_a_batch_draws_one_of_the_shares_of_evenly_spread_tokens_and_nothing_else_moves():
    setting = {"dense": 0.0, "keep_max": 0.6, "mix": {"blobs": 1, "bands": 1}}
    # Two shares here too: of a single one nothing is drawn
    plain, mixed = draws(400, coverage=(0.0, 0.0), **setting), draws(400, coverage=(0.0, 0.5), **setting)
    assert {s.coverage for s in plain} == {(0.0,)} and {s.coverage for s in mixed} == {(0.0,), (0.5,)}
    assert abs(sum(s.coverage == (0.5,) for s in mixed) / 400 - 0.5) < 3 * np.sqrt(0.25 / 400)
    spread = np.argsort(uniform_order(GRID), axis=None)
    for a, b in zip(plain, mixed, strict=True):
        assert (a.kept, a.references[0].selector) == (b.kept, b.references[0].selector)
        assert np.array_equal(a.references[0].scores, b.references[0].scores)
        assert np.array_equal(a.index, b.index) == (b.coverage == (0.0,))
        assert b.coverage == (0.0,) or np.isin(spread[: b.kept // 2], b.index).all()


@pytest.mark.parametrize("kind", ["random", "uniform"])
def test_what_is_spread_anyway_takes_no_share_of_evenly_spread_tokens(kind):
    setting = {"dense": 0.0, "keep_max": 0.6, "mix": {kind: 1, "blobs": 1}}
    plain, mixed = draws(200, coverage=(0.0,), **setting), draws(200, coverage=(0.5,), **setting)
    assert {(s.references[0].selector, s.coverage) for s in mixed} == {(kind, (0.0,)), ("blobs", (0.5,))}
    for a, b in zip(plain, mixed, strict=True):
        assert np.array_equal(a.index, b.index) == (a.references[0].selector == kind)


def test_kinds_come_in_the_shares_of_the_mix():
    selections = draws(1000, dense=0.0, keep_max=0.6, mix={"random": 3, "edges": 1, "blobs": 0})
    labels = [s.references[0].selector for s in selections]
    assert set(labels) == {"random", "edges"}
    assert abs(labels.count("random") / 1000 - 0.75) < 3 * np.sqrt(0.75 * 0.25 / 1000)


def test_a_batch_shares_the_set_of_one_of_its_samples():
    left, right = (np.dstack([PICTURE, np.zeros(PICTURE.shape[:2], np.uint8)]) for _ in range(2))
    left[:, :64, 3], right[:, 64:, 3] = 255, 255
    fixed = {"mix": {"inside": 1.0}, "dense": 0.0, "keep_min": 0.5, "keep_max": 0.5, "coverage": (0.0,)}
    (alone,) = draws(1, pictures=[left], **fixed)
    assert alone.references[0].mask[:, :8].all() and not alone.references[0].mask[:, 8:].any()
    halves = [s.references[0].mask[0] for s in draws(40, [GRID] * 2, [[left, right], [left, right]], **fixed)]
    lefts = sum(mask[:8].all() and not mask[8:].any() for mask in halves)
    assert lefts + sum(mask[8:].all() and not mask[:8].any() for mask in halves) == 40 and 8 < lefts < 32
    for both in draws(10, [GRID] * 2, [[left, right], [left, right]], **fixed):  # of the same sample, all references
        assert np.array_equal(both.references[0].index, both.references[1].index)


def test_outside_is_the_complement_of_the_object():
    masked = np.dstack([PICTURE, np.zeros(PICTURE.shape[:2], np.uint8)])
    masked[32:96, 32:96, 3] = 255
    rng = np.random.default_rng(0)
    assert np.array_equal(DROPS["outside"](masked, GRID, rng), 1 - DROPS["inside"](masked, GRID, rng))
    fixed = {"dense": 0.0, "keep_min": 0.75, "keep_max": 0.75, "coverage": (0.0,)}
    (selection,) = draws(1, pictures=[masked], mix={"outside": 1.0}, **fixed)
    assert not selection.references[0].mask[4:12, 4:12].any()


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 14), columns=st.integers(1, 14), share=st.floats(0.05, 1))
@settings(max_examples=60)
def test_blobs_are_connected_at_every_budget(seed, rows, columns, share):
    scores = DROPS["blobs"](None, (rows, columns), np.random.default_rng(seed))
    assert len(np.unique(scores)) == scores.size  # a total order: a budget cuts it anywhere
    count = max(1, round(share * scores.size))
    kept = scores >= np.sort(scores.ravel())[-count]
    assert pieces(kept, 4) <= 3


@pytest.mark.parametrize("kind", DROPS)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 12), columns=st.integers(1, 12))
@settings(max_examples=12)
def test_every_kind_scores_as_a_selector_does(kind, seed, rows, columns):
    scores = DROPS[kind](
        np.asarray(picture(columns * 8, rows * 8)) if kind != "mask" else None,
        (rows, columns),
        np.random.default_rng(seed),
    )
    assert scores.shape == (rows, columns) and scores.dtype == np.float32
    assert scores.min() >= 0 and scores.max() <= 1


def test_bands_are_one_piece():
    for seed in range(30):
        scores = DROPS["bands"](None, GRID, np.random.default_rng(seed))
        kept = scores >= np.sort(scores.ravel())[-80]
        assert pieces(kept, 8) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_min": 0.0}, "from 0.0 to 1.0"),
        ({"keep_min": 0.5, "keep_max": 0.2}, "from 0.5 to 0.2"),
        ({"keep_max": 1.2}, "to 1.2"),
        ({"dense": -0.1}, "dense is -0.1"),
        ({"mix": {"rndom": 1}}, "no kind of dropping 'rndom'"),
        ({"mix": {"random": -1}}, "share of 'random' in the drop mix is -1"),
        ({"mix": {"random": 0}}, "no share above 0"),
        ({"mix": {}}, "no share above 0"),
        ({"coverage": ()}, "coverage is"),
        ({"coverage": (2,)}, r"coverage is \[2\]"),
        ({"merge": ()}, r"merge is \[\]: pass at least one share"),
        ({"merge": (0, -1)}, r"merge is \[0, -1\]"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Dropping(**changes)


def test_the_default_mix_is_known_and_sums_to_one():
    assert set(MIX) <= set(DROPS) and sum(MIX.values()) == pytest.approx(1)
