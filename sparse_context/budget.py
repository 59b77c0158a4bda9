"""Budgets: how many tokens are kept, and which references they come from.

A budget is a prefix of one total order. All tokens of a call stand in one queue, best first, and a budget is where the
queue is cut. So a count is exact, a smaller budget keeps a subset of what a larger one keeps, and what is fair (a turn
for each reference, an even spread) is a matter of who stands where. Nothing here is random: ties break by the evenly
spread order of `selectors/order.py`, so a flat picture is sampled all over and not from its top.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard, TypeVar, cast

import numpy as np

from .selectors.order import uniform_order

MOST = 2**31 - 1  # tokens that a floor or a multiple may name

SHARES = ("joint", "equal")

Value = TypeVar("Value", str, float, float | str, str | int | None)


def rank_tokens(scores: Sequence[np.ndarray], coverage: float | Sequence[float] = 0.0, floor: int = 0) -> np.ndarray:
    """All tokens of all references, from the first kept to the last.

    `scores` has one array (rows, columns) per reference, in [0, 1]. The result is int64: flat indices into the
    references' tokens, concatenated in order, each row by row.

    Two queues are merged. In one the tokens stand by score, in the other evenly spread over the pictures. Whoever is
    n-th in the spread queue is due by place n / coverage, whoever is n-th by score by place n / (1 - coverage), and
    tokens are served by the earlier of their two dates. Serving the earliest date first misses none that can be met
    (Jackson 1955), and these can: so for every k the first k tokens hold the first floor(coverage * k) of the spread
    queue and the first floor((1 - coverage) * k) by score. `coverage` in [0, 1] is one number, or one per reference:
    the spread queue then calls a reference in proportion to its own number, and the dates use their mean over tokens.

    Before all others come the first `floor` tokens of each reference, taking turns, so that a small budget still gives
    each reference its due. (With several references the promise above then holds for the tokens after these.)
    """
    _check_scores(scores)
    check_budget(coverage=coverage, floor=floor, references=len(scores))
    sizes = [part.size for part in scores]
    reference = np.repeat(np.arange(len(sizes)), sizes)
    score = np.concatenate([part.ravel() for part in scores])
    spread = np.concatenate([uniform_order(part.shape).ravel() / part.size for part in scores])
    wanted = np.broadcast_to(np.asarray(coverage, float), len(sizes))[reference]
    mean = wanted.mean()

    order = np.lexsort((reference, spread, -score))
    if mean > 0:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # 0 or 1 closes one of the queues
            call = np.where(wanted > 0, spread / wanted, np.inf)
            by_score, by_spread = _places(order) + 1, _places(np.lexsort((reference, spread, call))) + 1
            due = np.minimum(by_score / (1 - mean), by_spread / mean)
        order = np.lexsort((by_score, due))
    return _floor_first(order, reference, floor)


def _places(order: np.ndarray) -> np.ndarray:
    """The place of each token in an order: its inverse."""
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return places


def _floor_first(
    order: np.ndarray, reference: np.ndarray, floor: int | np.ndarray, spent: np.ndarray | None = None
) -> np.ndarray:
    """`order` with the first `floor` tokens of each reference moved to its front, where the references take turns.

    floor: one number, or one for each reference. spent: of each reference, tokens that it has already; in a turn, those
    come first that have none.
    """
    turn = np.empty_like(order)  # of a token, among those of its own reference
    for tokens in (order[reference[order] == r] for r in range(reference[-1] + 1)):
        turn[tokens] = np.arange(len(tokens))
    turn, reference = turn[order], reference[order]
    most = np.max(floor)
    turn = np.where(turn < np.broadcast_to(floor, reference.max() + 1)[reference], turn, most)
    waits = 0 * turn if spent is None else (turn < most) & (spent[reference] > 0)
    return order[np.lexsort((waits, turn))]


def choose_tokens(
    scores: Sequence[np.ndarray],
    keep: float | str | Sequence[float | str],
    *,
    share: str = "equal",
    floor: int = 1,
    coverage: float | Sequence[float] = 0.0,
    multiple_of: int = 1,
    mass: float = 0.8,
    reserved: Sequence[int] | None = None,
    enough: Sequence[int | None] | None = None,
    sizes: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """The tokens to keep of each reference: for each, a sorted int64 array of flat indices into its grid.

    `scores` has one array (rows, columns) per reference, in [0, 1].

    `keep` is a ratio in (0, 1], rounded to the nearest count and at least one token; or a count from 2 up, over all
    references (1 means all, and a count above what there is keeps all); or "auto", for each reference the fewest tokens
    that hold the share `mass` of its scores' sum, or what `enough` has for it. A sequence with one of these per
    reference gives each its own budget.

    `share` says what one ratio or count for several references means: "joint", that their tokens compete in one order
    (`rank_tokens`) and the total is exact; "equal", that each keeps the same ratio of its own, or the same count as far
    as it has that many (what is left over goes to the first references).

    `floor` is the least number of tokens of each reference, as far as the budget and the reference hold that many; with
    0, a reference may end up with none. `coverage` is the share of evenly spread tokens (`rank_tokens`). The total is
    rounded up to `multiple_of` (down where there are not so many tokens, and not at all below one multiple or when all
    are kept), for compilers and context parallelism.

    `reserved` has what is spent of each reference's budget already, on its overview: so many fewer tokens are chosen,
    and the budget, its shares and its multiples count both. A floor is then one of chosen tokens, as far as the budget
    holds them beside what is spent.

    `sizes` has the number of tokens of each reference that ratios are of, and which no budget goes beyond; None: as
    many as it has scores. More scores are of a larger picture, whose tokens are chosen in place of the usual ones.

    Raises ValueError, in one sentence that names the value, also where more is spent than the budget holds.
    """
    _check_scores(scores)
    check_budget(keep, share, floor, coverage, multiple_of, mass, references=len(scores))
    if not len(scores):
        return []
    usual = np.array([part.size for part in scores] if sizes is None else sizes)
    spent = np.zeros_like(usual) if reserved is None else np.array(reserved, np.int64)
    if keeps_all(keep, usual) and not spent.any():
        return [np.arange(size) for size in usual]

    size = int(usual.sum())
    auto = [
        _auto_count(part, mass) if count is None else count
        for part, count in zip(scores, enough or [None] * len(scores), strict=True)
    ]
    if _is_joint(keep, share):
        total = _count(cast("float", keep), size)
        reference = np.repeat(np.arange(len(scores)), [part.size for part in scores])
        order = _floor_first(rank_tokens(scores, coverage), reference, floor, spent)
        order = _within(order, reference, usual - spent)
    else:
        budgets = own_budgets(keep, usual, floor, auto)
        total = int(budgets.sum())
        alike = np.ones(len(usual)) if is_count(keep) else budgets  # equal counts: one token each, turn by turn
        floors = np.minimum(floor, np.maximum(budgets - spent, 0)) if spent.any() else floor
        order = _rank_by_progress(scores, alike, coverage, floors, spent, usual)

    total = _round_to_multiple(total, multiple_of, size)
    if floor and total - spent.sum() < np.count_nonzero(spent == 0):
        taken = f", of which overviews take {spent.sum()}" if spent.any() else ""
        raise ValueError(
            f"keep is {keep!r}, which makes {total} tokens for {len(usual)} references{taken}: keep more, so that each "
            "has one, or let references end up empty with floor=0."
        )
    if total < spent.sum():
        raise ValueError(
            f"keep is {keep!r}, which makes {total} tokens, and overviews take {spent.sum()}: keep more, or take "
            "coarser overviews."
        )
    ends = np.cumsum([part.size for part in scores])
    kept = np.zeros(ends[-1], bool)
    kept[order[: total - spent.sum()]] = True
    return [np.flatnonzero(part) for part in np.split(kept, ends[:-1])]


class Pool(NamedTuple):
    """A budget: the references that have it in common, by number, and its tokens; None where "auto" says them later."""

    members: list[int]
    tokens: int | None


def pools(
    keep: float | str | Sequence[float | str], sizes: Sequence[int], share: str, floor: int, multiple_of: int
) -> list[Pool]:
    """The budgets of references with `sizes` tokens, as `choose_tokens` has them but for what a multiple adds or takes.

    Where the multiple leaves no choice but to keep all, each is all of its references' tokens.
    """
    if not len(sizes):
        return []
    everyone = list(range(len(sizes)))
    if _is_joint(keep, share):
        made = [Pool(everyone, _count(cast("float", keep), sum(sizes)))]
    else:
        own = own_budgets(keep, sizes, floor, [0] * len(sizes)).tolist()
        each = zip(everyone, spread_out(keep, len(sizes)), own, strict=True)
        made = [Pool([i], None if isinstance(ratio, str) else tokens) for i, ratio, tokens in each]
    known = [pool.tokens for pool in made if pool.tokens is not None]
    if len(known) == len(made) and _round_to_multiple(sum(known), multiple_of, sum(sizes)) == sum(sizes):
        return [Pool(pool.members, sum(sizes[i] for i in pool.members)) for pool in made]
    return made


def _is_joint(keep: float | str | Sequence[float | str], share: str) -> bool:
    """Whether the tokens of all references compete for one budget."""
    return share == "joint" and not is_per_reference(keep) and not isinstance(keep, str)


def own_budgets(
    keep: float | str | Sequence[float | str], sizes: Sequence[int] | np.ndarray, floor: int, auto: Sequence[int]
) -> np.ndarray:
    """How many tokens each reference may keep of its `sizes` where they do not compete: int64, before any multiple.

    auto: what "auto" comes to for each.
    """
    sizes = np.asarray(sizes)
    if is_count(keep):  # the same for each; what some cannot take, and what is left over, goes to the others in turn
        turns = np.concatenate([np.arange(size) for size in sizes])
        reference = np.repeat(np.arange(len(sizes)), sizes)
        served = np.argsort(turns, kind="stable")[: _count(keep, int(sizes.sum()))]
        return np.bincount(reference[served], minlength=len(sizes))
    each = zip(spread_out(keep, len(sizes)), sizes, auto, strict=True)
    counts = [count if isinstance(ratio, str) else _count(ratio, int(size)) for ratio, size, count in each]
    return np.maximum(counts, np.minimum(floor, sizes))


def _rank_by_progress(
    scores: Sequence[np.ndarray],
    budgets: np.ndarray,
    coverage: float | Sequence[float],
    floor: int | np.ndarray,
    spent: np.ndarray,
    sizes: np.ndarray,
) -> np.ndarray:
    """The one order where each reference has a budget of its own: it is served as it gets on through its budget.

    Everyone within a budget stands before everyone beyond one, so a cut at the sum of the budgets gives each its own;
    a cut elsewhere gives or takes by Webster's method (the middle of each place, divided by the budget). What a
    reference has spent of its budget stands before its tokens, and in the place of the last ones of its size.
    """
    coverages = np.broadcast_to(np.asarray(coverage, float), len(scores))
    turns = [_places(rank_tokens([part], spread)) for part, spread in zip(scores, coverages, strict=True)]
    each = zip(turns, budgets, spent, sizes, strict=True)
    progress = [
        np.where(first + turn < size, (first + turn + 0.5) / max(budget, 1e-9), np.inf)
        for turn, budget, first, size in each
    ]
    reference = np.repeat(np.arange(len(turns)), [len(turn) for turn in turns])
    return _floor_first(np.argsort(np.concatenate(progress), kind="stable"), reference, floor, spent)


def _within(order: np.ndarray, reference: np.ndarray, room: np.ndarray) -> np.ndarray:
    """An order of all tokens in which those that a reference has no room for come last."""
    own = reference[order]
    place = np.empty_like(order)
    for i in range(len(room)):
        place[own == i] = np.arange(np.count_nonzero(own == i))
    beyond = place >= room[own]
    return np.concatenate([order[~beyond], order[beyond]])


def is_per_reference(value: Value | Sequence[Value]) -> TypeGuard[Sequence[Value]]:
    """Whether this is a sequence with one value for each reference, rather than one for all."""
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def spread_out(value: Value | Sequence[Value], count: int) -> list[Value]:
    """One value for each of `count` references, or as many as a sequence has."""
    return list(value) if is_per_reference(value) else [cast("Value", value)] * count


def is_count(keep: object) -> TypeGuard[int]:
    """Whether `keep` is a number of tokens, rather than a ratio."""
    return isinstance(keep, numbers.Integral) and int(keep) > 1


def _count(keep: float, size: int) -> int:
    """A ratio or a count as a number of tokens out of `size`."""
    if is_count(keep):
        return min(int(keep), size)
    return max(1, math.floor(keep * size + 0.5 + 1e-9))  # half up, also where the product falls short of a half


def _auto_count(scores: np.ndarray, mass: float) -> int:
    """The fewest tokens that hold the share `mass` of the scores' sum; 0 if all scores are 0."""
    held = np.cumsum(np.sort(scores.ravel())[::-1], dtype=np.float64)
    return 0 if held[-1] <= 0 else int(np.searchsorted(held, mass * held[-1] * (1 - 1e-9))) + 1


def _round_to_multiple(total: int, multiple_of: int, size: int) -> int:
    """`total` rounded up to a multiple, or down where `size` tokens do not reach; `size` below one multiple."""
    if total == size or size < multiple_of:
        return size
    rounded_up = -(-total // multiple_of) * multiple_of
    return rounded_up if rounded_up <= size else rounded_up - multiple_of


def keeps_all(keep: float | str | Sequence[float | str], sizes: Sequence[int] | np.ndarray) -> bool:
    """Whether `keep` keeps every token of references with `sizes` tokens, so that nobody needs their scores."""
    if is_per_reference(keep):  # of another length, it is refused where tokens are chosen
        return len(keep) == len(sizes) and all(
            keeps_all(*pair) for pair in zip(keep, ([n] for n in sizes), strict=True)
        )
    return not isinstance(keep, str) and _count(cast("float", keep), int(sum(sizes))) == sum(sizes)


def check_budget(
    keep: float | str | Sequence[float | str] = 1.0,
    share: str = "equal",
    floor: int = 0,
    coverage: float | Sequence[float] = 0.0,
    multiple_of: int = 1,
    mass: float = 1.0,
    merge: float = 0.0,
    *,
    references: int | None = None,
) -> None:
    """Raise ValueError, naming the argument and its value, unless these make a budget (`choose_tokens`, `merge_rest`).

    With `references`, a sequence must have one value for each; without, its length is not judged.
    """
    for name, values in (("keep", keep), ("coverage", coverage)):
        if references is not None and is_per_reference(values) and len(values) != references:
            raise ValueError(
                f"{name} has {len(values)} values for {references} references: pass one value, or one per reference."
            )
    if is_per_reference(keep) and not len(keep):
        raise ValueError(f"keep is {keep!r}: pass one value, or one per reference.")
    for ratio in spread_out(keep, 1):
        is_auto = isinstance(ratio, str) and ratio == "auto"
        if not (is_auto or _is_within(ratio, 0, 1, above=True) or _is_count_at(ratio, 2)):
            raise ValueError(
                f"keep is {ratio!r}: pass a ratio above 0 and up to 1, a count of at least 2 tokens, or 'auto'."
            )
    if share not in SHARES:
        raise ValueError(f"share is {share!r}: choose 'joint' or 'equal'.")
    if not _is_count_at(floor, 0) or floor > MOST:
        raise ValueError(f"floor is {floor!r}: pass the least number of tokens per reference, from 0 to {MOST}.")
    for spread in spread_out(coverage, 1):
        if not _is_within(spread, 0, 1):
            raise ValueError(f"coverage is {spread!r}: pass a share from 0 to 1.")
    if not _is_count_at(multiple_of, 1) or multiple_of > MOST:
        raise ValueError(f"multiple_of is {multiple_of!r}: pass a whole number of tokens, from 1 to {MOST}.")
    if not _is_within(mass, 0, 1, above=True):
        raise ValueError(f"mass is {mass!r}: pass a share above 0 and up to 1.")
    if not _is_within(merge, 0, 1):
        raise ValueError(f"merge is {merge!r}: pass the share of the budget for averages, from 0 to 1.")


def _is_within(value: Any, low: float, high: float, above: bool = False) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and bool(low <= value <= high) and not (above and value == low)


def _is_count_at(value: object, least: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def _check_scores(scores: Sequence[np.ndarray]) -> None:
    for i, part in enumerate(scores):
        if not isinstance(part, np.ndarray) or part.ndim != 2 or part.size == 0:
            shape = f"have shape {part.shape}" if hasattr(part, "shape") else f"are {type(part).__name__!r}"
            raise ValueError(f"The scores of reference {i + 1} {shape}: pass an array (rows, columns).")
        if not np.isfinite(part).all():
            raise ValueError(f"The scores of reference {i + 1} are not all numbers: pass finite ones, in [0, 1].")
