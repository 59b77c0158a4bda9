import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparse_context.budget import check_budget, choose_tokens, keeps_all, rank_tokens
from sparse_context.merge import merge_rest
from sparse_context.selectors.order import uniform_order

grid = st.tuples(st.integers(1, 9), st.integers(1, 9))
# A few score levels make ties common; the levels are exact in float32.
levels = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def references(draw, least=1, most=4):
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    grids = draw(st.lists(grid, min_size=least, max_size=most))
    ties = draw(st.booleans())
    make = (lambda g: rng.choice([0, 0.25, 0.5, 1.0], g)) if ties else rng.random
    return [make(g).astype(np.float32) for g in grids]


coverages = st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.7, 0.9, 1.0]) | st.floats(0, 1)
shares = st.sampled_from(["joint", "equal"])


def total_size(scores):
    return sum(part.size for part in scores)


def joint(chosen, scores):
    starts = np.cumsum([0] + [part.size for part in scores])
    return {int(i) + int(start) for index, start in zip(chosen, starts, strict=False) for i in index}


def counts(chosen):
    return [len(index) for index in chosen]


# The order


@given(references(), coverages, st.integers(0, 3))
def test_the_order_names_every_token_once(scores, coverage, floor):
    order = rank_tokens(scores, coverage, floor)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(total_size(scores)))


@given(references(), st.integers(1, 4))
def test_the_floor_comes_first_and_takes_turns(scores, floor):
    sizes = [part.size for part in scores]
    reference = np.repeat(np.arange(len(sizes)), sizes)[rank_tokens(scores, 0.1, floor)]
    for turn in range(1, floor + 1):
        due = [min(turn, size) for size in sizes]
        assert np.bincount(reference[: sum(due)], minlength=len(sizes)).tolist() == due


@given(references(most=1), coverages)
def test_coverage_promises_both_queues_their_share_at_every_count(scores, coverage):
    (part,) = scores
    order = rank_tokens(scores, coverage, floor=1)
    spread = np.argsort(uniform_order(part.shape), axis=None)
    by_score = np.lexsort((uniform_order(part.shape).ravel(), -part.ravel()))
    for k in range(1, part.size + 1):
        first = set(order[:k])
        assert first >= set(spread[: math.floor(coverage * k)])
        assert first >= set(by_score[: math.floor((1 - coverage) * k)])


@given(references(), coverages)
def test_coverage_promises_the_joint_spread_queue_its_share(scores, coverage):
    order = rank_tokens(scores, coverage)
    place = np.concatenate([uniform_order(part.shape).ravel() / part.size for part in scores])
    spread = np.argsort(place, kind="stable")
    for k in range(1, len(order) + 1):
        assert set(order[:k]) >= set(spread[: math.floor(coverage * k)])


def test_coverage_of_its_own_favours_its_reference():
    scores = [np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32), np.ones((8, 4), np.float32)]
    order = rank_tokens(scores, [0.4, 0.8, 0.0])
    first = set(order[:20])  # the mean over tokens is 0.3, so 6 of 20 by the spread queue, 2 and 4 of them
    spread = np.argsort(uniform_order((4, 4)), axis=None)
    assert first == set(spread[:2]) | set(spread[:4] + 16) | set(np.argsort(uniform_order((8, 4)), axis=None)[:14] + 32)


def test_without_coverage_the_order_is_the_scores():
    scores = [np.array([[0.1, 0.9]], np.float32), np.array([[0.5, 0.3, 0.95]], np.float32)]
    assert rank_tokens(scores).tolist() == [4, 1, 2, 3, 0]


@given(grid, st.integers(1, 81))
def test_ties_break_by_the_uniform_order(shape, k):
    assume(2 <= k <= shape[0] * shape[1])
    (chosen,) = choose_tokens([np.full(shape, 0.5, np.float32)], k)
    assert np.array_equal(chosen, np.flatnonzero(uniform_order(shape) < k))


def test_a_flat_picture_is_sampled_evenly_and_not_from_its_top():
    (chosen,) = choose_tokens([np.zeros((16, 16), np.float32)], 0.25)
    mask = np.zeros(256, bool)
    mask[chosen] = True
    assert (mask.reshape(8, 2, 8, 2).sum(axis=(1, 3)) == 1).all()


def test_ties_of_several_references_share_by_size():
    chosen = choose_tokens([np.zeros((8, 8)), np.zeros((16, 8)), np.zeros((8, 8))], 0.25, share="joint")
    assert counts(chosen) == [16, 32, 16]


# Counts


@given(references(), st.integers(2, 400), shares, coverages)
def test_a_count_is_exact(scores, count, share, coverage):
    assume(count >= len(scores))
    chosen = choose_tokens(scores, count, share=share, coverage=coverage)
    assert sum(counts(chosen)) == min(count, total_size(scores))
    for index, part in zip(chosen, scores, strict=True):
        assert index.dtype == np.int64 and (np.diff(index) > 0).all()
        assert len(index) and 0 <= index[0] and index[-1] < part.size


def round_half_up(ratio, size):
    return max(1, math.floor(ratio * size + 0.5 + 1e-9))


@given(references(), st.floats(0.001, 1), coverages)
def test_a_ratio_is_exact_jointly_and_equally(scores, ratio, coverage):
    each = [round_half_up(ratio, part.size) for part in scores]
    assert counts(choose_tokens(scores, ratio, share="equal", coverage=coverage)) == each
    total = round_half_up(ratio, total_size(scores))
    chosen = choose_tokens(scores, ratio, share="joint", floor=0, coverage=coverage)
    assert sum(counts(chosen)) == total


@pytest.mark.parametrize(
    ("keep", "count"), [(0.15, 2), (0.14, 1), (0.25, 3), (0.01, 1), (0.95, 10), (1, 10), (1.0, 10), (2, 2), (99, 10)]
)
def test_ratios_round_half_up_and_counts_start_at_two(keep, count):
    (chosen,) = choose_tokens([np.zeros((2, 5))], keep)
    assert len(chosen) == count


def test_a_ratio_rounds_half_up_where_floats_fall_short():
    assert 0.29 * 50 < 14.5
    assert counts(choose_tokens([np.zeros((5, 10))], 0.29)) == [15]


@given(references(), st.integers(2, 300), st.integers(2, 300), shares, coverages, st.integers(0, 3))
def test_a_smaller_count_keeps_a_subset(scores, a, b, share, coverage, floor):
    a, b = sorted((max(a, len(scores)), max(b, len(scores))))
    fewer = choose_tokens(scores, a, share=share, coverage=coverage, floor=floor)
    more = choose_tokens(scores, b, share=share, coverage=coverage, floor=floor)
    assert joint(fewer, scores) <= joint(more, scores)


@given(references(), st.floats(0.01, 1), st.floats(0.01, 1), shares, coverages, st.integers(1, 8))
def test_a_smaller_ratio_keeps_a_subset(scores, a, b, share, coverage, multiple_of):
    a, b = sorted((a, b))
    floor = 1 if share == "equal" and multiple_of == 1 else 0
    setting = {"share": share, "coverage": coverage, "floor": floor}
    if share == "joint":
        setting["multiple_of"] = multiple_of
    fewer, more = choose_tokens(scores, a, **setting), choose_tokens(scores, b, **setting)
    assert joint(fewer, scores) <= joint(more, scores)


@given(references(), st.integers(2, 300), st.integers(1, 4), coverages, shares)
def test_each_reference_has_its_floor(scores, count, floor, coverage, share):
    assume(count >= floor * len(scores))
    chosen = choose_tokens(scores, count, floor=floor, coverage=coverage, share=share)
    assert all(len(index) >= min(floor, part.size) for index, part in zip(chosen, scores, strict=True))


def test_without_a_floor_a_reference_may_end_empty():
    scores = [np.zeros((4, 4), np.float32), np.ones((4, 4), np.float32)]
    assert counts(choose_tokens(scores, 8)) == [4, 4]
    assert counts(choose_tokens(scores, 8, share="joint")) == [1, 7]
    assert counts(choose_tokens(scores, 8, share="joint", floor=0)) == [0, 8]


def test_a_floor_beyond_the_budget_takes_turns():
    scores = [np.ones((4, 4), np.float32), np.zeros((4, 4), np.float32), np.zeros((1, 1), np.float32)]
    for share in ("joint", "equal"):
        assert counts(choose_tokens(scores, 8, floor=6, share=share)) == [4, 3, 1]


def test_equal_counts_pass_on_what_a_small_reference_cannot_take():
    scores = [np.ones((4, 4)), np.zeros((1, 2)), np.zeros((4, 4))]
    assert counts(choose_tokens(scores, 6, share="equal")) == [2, 2, 2]
    assert counts(choose_tokens(scores, 8, share="equal")) == [3, 2, 3]
    assert counts(choose_tokens(scores, 7, share="equal")) == [3, 2, 2]
    assert counts(choose_tokens(scores, 33, share="equal")) == [16, 2, 15]


def test_one_budget_per_reference():
    scores = [np.ones((4, 5)), np.zeros((4, 5)), np.zeros((4, 5)), np.eye(5, dtype=np.float32)]
    chosen = choose_tokens(scores, [0.25, 7, 1, "auto"], mass=0.8)
    assert counts(chosen) == [5, 7, 20, 4]
    assert counts(choose_tokens(scores, np.array([2, 3, 4, 500]), share="equal")) == [2, 3, 4, 25]


@given(references(), st.sampled_from([0.3, 0.8, 1.0]), st.integers(0, 2))
def test_auto_is_the_smallest_count_that_holds_the_mass(scores, mass, floor):
    for part, index in zip(scores, choose_tokens(scores, "auto", mass=mass, floor=floor), strict=True):
        wanted = mass * part.sum(dtype=np.float64) * (1 - 1e-9)
        smaller = np.sort(part.ravel())[::-1][: max(len(index) - 1, 0)].sum(dtype=np.float64)
        assert part.ravel()[index].sum(dtype=np.float64) >= wanted
        assert smaller < wanted or len(index) <= min(floor, part.size)


def test_auto_keeps_only_the_floor_where_nothing_scores():
    scores = [np.zeros((4, 4)), np.ones((2, 5))]
    assert counts(choose_tokens(scores, "auto")) == [1, 8]
    assert counts(choose_tokens(scores, "auto", floor=0)) == [0, 8]
    assert counts(choose_tokens(scores, "auto", floor=3)) == [3, 8]


# Multiples


@given(references(), st.integers(1, 40), st.floats(0.01, 1), st.sampled_from(["joint", "equal", "own", "auto"]))
def test_the_total_is_a_multiple(scores, multiple_of, ratio, way):
    keep = {"own": [ratio] * len(scores), "auto": "auto"}.get(way, ratio)
    share = "equal" if way == "equal" else "joint"
    size = total_size(scores)
    plain = sum(counts(choose_tokens(scores, keep, share=share, floor=0, mass=0.5)))
    total = sum(counts(choose_tokens(scores, keep, share=share, floor=0, mass=0.5, multiple_of=multiple_of)))
    if plain == size or size < multiple_of:
        assert total == size
    else:
        assert total % multiple_of == 0
        assert plain <= total < plain + multiple_of or (total < plain and total + multiple_of > size)


def test_multiples_round_up_and_down_where_there_are_no_more():
    scores = [np.zeros((10, 10))]
    for keep, total in [(0.5, 64), (64, 64), (81, 96), (97, 96), (98, 96), (100, 100), (1, 100)]:
        assert counts(choose_tokens(scores, keep, multiple_of=16)) == [total]
    assert counts(choose_tokens(scores, 0.5, multiple_of=128)) == [100]


def test_a_multiple_of_own_budgets_is_shared_by_their_sizes():
    scores = [np.zeros((10, 10)), np.zeros((10, 10))]
    assert counts(choose_tokens(scores, [30, 10], multiple_of=64)) == [48, 16]
    # 27, 1, 1 and 1 of 31 tokens cannot reach 32, and at 16 every reference still has one
    small = [np.zeros((4, 7)), *[np.zeros((1, 1))] * 3]
    assert counts(choose_tokens(small, [27, 1, 1, 1], multiple_of=16)) == [13, 1, 1, 1]


# Everything, nothing, and what is refused


@given(references(), shares)
def test_keeping_all_keeps_all(scores, share):
    for keep in (1, 1.0, [1] * len(scores), total_size(scores) + 5):
        assert keeps_all(keep, [part.size for part in scores])
        chosen = choose_tokens(scores, keep, share=share, multiple_of=7)
        assert counts(chosen) == [part.size for part in scores]
    assert not keeps_all("auto", [4]) and not keeps_all([1, 0.5], [4, 4])


def test_no_references_keep_nothing():
    assert choose_tokens([], 0.2) == []


@settings(max_examples=20)
@given(references(), coverages)
def test_the_same_scores_give_the_same_tokens(scores, coverage):
    setting = {"coverage": coverage, "floor": 0}
    first = choose_tokens(scores, 0.4, **setting)
    np.random.seed(1)
    again = choose_tokens([part.copy() for part in scores], 0.4, **setting)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([], "keep has 0 values for 2 references"),
        (0, "keep is 0: pass a ratio above 0 and up to 1, a count of at least 2 tokens, or 'auto'"),
        (0.0, "keep is 0.0: pass a ratio"),
        (1.2, "keep is 1.2: pass a ratio"),
        (-0.1, "keep is -0.1"),
        (-3, "keep is -3"),
        (True, "keep is True"),
        (float("nan"), "keep is nan"),
        (float("inf"), "keep is inf"),
        ("lots", "keep is 'lots'"),
        (None, "keep is None"),
        ([0.2, 1.5], "keep is 1.5"),
        ([0.2], "keep has 1 values for 2 references: pass one value, or one per reference"),
        ([0.2] * 3, "keep has 3 values for 2 references"),
    ],
)
def test_a_keep_that_cannot_be_is_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        choose_tokens([np.zeros((4, 4))] * 2, keep)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"share": "fair"}, "share is 'fair': choose 'joint' or 'equal'"),
        ({"floor": -1}, "floor is -1"),
        ({"floor": 1.5}, "floor is 1.5"),
        ({"coverage": 1.1}, "coverage is 1.1: pass a share from 0 to 1"),
        ({"coverage": [0.1]}, "coverage has 1 values for 2 references"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"multiple_of": True}, "multiple_of is True"),
        ({"mass": 0}, "mass is 0: pass a share above 0"),
        ({"mass": "all"}, "mass is 'all'"),
        ({"merge": -0.1}, "merge is -0.1: pass the share of the budget for averages, from 0 to 1"),
        ({"merge": 1.5}, "merge is 1.5"),
        ({"merge": "half"}, "merge is 'half'"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        check_budget(0.5, **setting, references=2)
    if "merge" not in setting:
        with pytest.raises(ValueError, match=message):
            choose_tokens([np.zeros((4, 4))] * 2, 0.5, **setting)


def test_a_budget_below_one_token_each_is_refused():
    scores = [np.zeros((4, 4))] * 3
    for share in ("joint", "equal"):
        with pytest.raises(ValueError, match="keep is 2, which makes 2 tokens for 3 references: .* floor=0"):
            choose_tokens(scores, 2, share=share)
        assert sum(counts(choose_tokens(scores, 2, share=share, floor=0))) == 2


def test_a_budget_that_overviews_take_whole_says_so():
    with pytest.raises(ValueError, match="makes 16 tokens for 2 references, of which overviews take 16: keep more"):
        choose_tokens([np.zeros((64, 64))] * 2, 16, share="joint", reserved=[16, 0])


def test_scores_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"scores of reference 2 have shape \(4,\)"):
        choose_tokens([np.zeros((4, 4)), np.zeros(4)], 0.5)
    with pytest.raises(ValueError, match="reference 1 .* pass finite"):
        rank_tokens([np.full((4, 4), np.nan)])


def test_check_budget_judges_no_length_without_references():
    check_budget([0.1, 2, "auto"])
    with pytest.raises(ValueError, match="for 2 references"):
        check_budget([0.1, 2, "auto"], references=2)


# The rest, averaged


@given(references(most=1), st.floats(0, 1), st.floats(0, 1), coverages, st.data())
def test_merging_keeps_as_many_tokens_and_names_one_for_each(scores, share, merge, coverage, data):
    (part,) = scores
    count = round(share * part.size)
    padding = data.draw(st.lists(st.integers(0, part.size - 1), max_size=part.size, unique=True))
    part.ravel()[padding] = -1
    into = merge_rest(part, count, merge, coverage)
    named = np.unique(into[into >= 0])
    assert into.dtype == np.int64 and into.shape == (part.size,)
    assert len(named) == min(count, part.size - len(padding))
    assert np.array_equal(into[named], named)  # which stand for themselves
    assert (into[padding] == -1).all()
    if count:
        assert (np.delete(into, padding) >= 0).all()


@given(st.integers(16, 64), st.integers(0, 99), coverages, st.booleans())
def test_tokens_are_kept_in_their_order_until_the_budget_is_full(count, seed, coverage, ties):
    """8 x 8 tokens in 16 blocks of 2 x 2, one token after the other kept as it is, by hand."""
    rng = np.random.default_rng(seed)
    scores = (rng.choice([0, 0.5, 1.0], (8, 8)) if ties else rng.random((8, 8))).astype(np.float32)
    block = np.arange(64) // 16 * 4 + np.arange(64) % 8 // 2
    order = rank_tokens([scores], coverage).tolist()
    sharp = []
    while order and len(sharp) + 1 + len({block[token] for token in order[1:]}) <= count:
        sharp.append(order.pop(0))
    into = merge_rest(scores, count, 16 / count, coverage)
    assert all(into[token] == token for token in sharp)
    for b in range(16):
        rest = [token for token in order if block[token] == b]
        assert len({into[token] for token in rest}) == bool(rest)
        middle = np.mean([divmod(token, 8) for token in rest], axis=0) if rest else None
        away = {token: np.sum((np.array(divmod(token, 8)) - middle) ** 2) for token in rest}
        assert all(away[into[token]] <= min(away.values()) + 1e-9 for token in rest)


@pytest.mark.parametrize("grid", [(1, 100), (2, 100), (100, 2), (4, 256), (24, 24), (8, 128), (64, 48)])
@pytest.mark.parametrize("merge", [0.1, 0.3, 0.5])
def test_about_the_share_asked_for_are_averages_on_every_grid(grid, merge):
    scores = np.random.default_rng(0).random(grid).astype(np.float32)
    count = round(0.2 * scores.size)
    into = merge_rest(scores, count, merge)
    tokens, members = np.unique(into, return_counts=True)
    averages = tokens[members > 1]
    assert abs(len(averages) - merge * count) <= max(1, 0.1 * merge * count)
    for token in averages:  # each over one compact part of the picture
        row, column = np.divmod(np.flatnonzero(into == token), grid[1])
        extent = (np.ptp(row) + 1) * (np.ptp(column) + 1)
        assert extent <= 2 * scores.size / (merge * count) + max(grid) / min(grid)


def test_one_reference_is_merged_like_this():
    """Two tokens stand out of a 4 x 4 grid; of the budget of 6, two thirds are blocks of 2 x 2."""
    scores = np.zeros((4, 4), np.float32)
    scores[0, 0], scores[3, 2] = 1, 0.5
    assert merge_rest(scores, 6, 2 / 3).reshape(4, 4).tolist() == [
        [0, 5, 2, 2],
        [5, 5, 2, 2],
        [8, 8, 11, 11],
        [8, 8, 14, 11],
    ]
    assert merge_rest(scores, 0, 0.5).tolist() == [-1] * 16
    assert merge_rest(scores, 1, 0.5).tolist() == [5] * 16  # 5, 6, 9 and 10 are as near to the middle
    assert np.array_equal(merge_rest(scores, 16, 0.5), np.arange(16))
