"""What a config means for the references of one call, before anybody looks at them.

Who scores each reference, how its budget is spent, and whether it has an overview: what the user said; where nothing,
what the loaded weights were trained for; else what the task says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .budget import Pool, check_budget, is_count, is_per_reference, keeps_all, pools
from .config import SparseContextConfig, check_length, meaning_of, needs_overview, per_reference, task_defaults
from .overview import COARSEST, Overview, coarser, factor_for, overview_grid
from .phrases import is_text, plan_phrases, say_of_phrase
from .selectors.cells import Grid
from .selectors.registry import (
    SelectorLike,
    SelectorsLike,
    beside_overview,
    each_selector,
    find_masks,
    find_text,
    put_text,
    resolve,
    user_mask,
)
from .selectors.text import CPU, IGNORED, Place
from .trained import Trained

UNTRAINED = Trained()


@dataclass(frozen=True)
class Plan:
    """One value for each reference.

    grids: (rows, columns) of the tokens to choose from. usual: as the host has it, where `grids` is that of a larger
    picture (`enlarge_plan`). tasks: by name. keep: as `choose_tokens` takes it. selectors: None where every token is
    kept, so that nothing has to be scored. labels: of the selectors. coverages: shares of evenly spread tokens.
    overviews: None where there is none. notes: what the report says of overviews that the user did not ask for so, and
    of phrases.
    """

    grids: list[Grid]
    usual: list[Grid]
    tasks: list[str]
    keep: float | str | Sequence[float | str]
    selectors: list[SelectorLike | None]
    labels: list[str]
    coverages: list[float]
    overviews: list[Overview | None]
    notes: list[str]

    @property
    def sizes(self) -> list[int]:
        """How many tokens each reference has as its host makes it: what a ratio is of."""
        return [rows * columns for rows, columns in self.usual]


def plan_selection(
    config: SparseContextConfig,
    grids: Sequence[Grid],
    shown: Sequence[bool] | None = None,
    trained: Trained | None = None,
    place: Place = CPU,
) -> Plan:
    """The plan for references with these token grids.

    shown: whether there are pixels of each, which an overview is made from; None: of all. trained: what the loaded
    weights were trained for. place: where a model that finds phrases runs. Raises ValueError where the config holds
    more or fewer values than there are references, and for an overview that cannot be.
    """
    count = len(grids)
    check_budget(config.keep, references=count)
    _check_masks(config.selector, count)
    grids = [(int(rows), int(columns)) for rows, columns in grids]
    sizes = [rows * columns for rows, columns in grids]
    tasks = per_reference("task", config.task, count)
    meanings = [meaning_of(task, count) for task in tasks]
    overviews, notes = _plan_overviews(config, grids, shown or [True] * count, trained or UNTRAINED, meanings)
    keep, ratios = config.keep, per_reference("keep", config.keep, count)
    all_of_it = [
        ratio == "auto" and task == "global" and overview is None
        for ratio, task, overview in zip(ratios, tasks, overviews, strict=True)
    ]
    if any(all_of_it):
        keep = ratios = [1.0 if whole else ratio for whole, ratio in zip(all_of_it, ratios, strict=True)]
    all_whole = keeps_all(keep, sizes)
    budgets_apart = is_per_reference(keep) and config.multiple_of == 1
    selectors: list[SelectorLike | None] = []
    labels, coverages = [], []
    chosen = each_selector(config.selector, count)
    check_length("selector", chosen, count)
    texts = plan_phrases(config, tasks, chosen, place)
    for i, (choice, task, ratio, size, overview, text) in enumerate(
        zip(chosen, tasks, ratios, sizes, overviews, texts, strict=True)
    ):
        selector: SelectorLike | None
        reads = text if text is not None and text.role != IGNORED else None
        usual = task_defaults(task, count, overview is not None, reads is not None)
        if ratio == "auto" and overview is not None and reads is None:
            usual = "residual", 0.0  # "auto" aims at decibels of the whole picture, whatever the task looks at
        selector, coverage = usual
        if choice is not None and not is_text(choice):
            selector, coverage = choice, 0.0 if task == "auto" else coverage
        if find_text(selector) is not None:
            selector = put_text(selector, reads) or usual[0]
        if overview is not None:
            selector = beside_overview(selector, overview.factor)
        whole = all_whole or (budgets_apart and keeps_all(ratio, [size]))
        notes += [] if whole else say_of_phrase(i, task, count, text)
        selectors.append(None if whole else selector)
        labels.append("all" if whole else resolve(selector)[0])
        coverages.append(coverage if config.coverage is None else float(config.coverage))
    return Plan(grids, grids, tasks, keep, selectors, labels, coverages, overviews, notes)


def enlarge_plan(plan: Plan, grids: Mapping[int, Grid], pixels: int, merges: bool = False) -> Plan:
    """`plan` where the references in `grids`, by number, have these larger ones.

    pixels: the config's `reference_max_pixels`. merges: whether it asks for averages, which no overview has. Raises
    ValueError where no reference has the overview that it needs.
    """
    if not any(plan.overviews) and not keeps_all(plan.keep, plan.sizes):
        raise ValueError(needs_overview(pixels, merges))
    larger, selectors, notes = list(plan.grids), list(plan.selectors), list(plan.notes)
    for i, overview in enumerate(plan.overviews):
        grid = grids.get(i)
        if overview is not None and grid is not None:
            larger[i] = grid
            selector = selectors[i]
            if selector is not None:
                selectors[i] = beside_overview(selector, overview.cells(plan.usual[i], grid))
        else:
            why = "it has no overview"
            if overview is not None:
                why = f"it is no larger PIL picture, or reference_max_pixels={pixels} allows no more"
            notes.append(f"reference {i + 1} has its usual size, because {why}")
    return replace(plan, grids=larger, selectors=selectors, notes=notes)


def _check_masks(selectors: SelectorsLike, count: int) -> None:
    for i in range(count):
        user_mask(selectors, i)  # raises where there are too few
    mask = find_masks(selectors)
    if mask is not None and len(mask.masks) > count:
        raise ValueError(
            f"The selector holds {len(mask.masks)} masks for {count} references: pass one mask per reference "
            "(None for its own alpha channel)."
        )


# Overviews ------------------------------------------------------------------------------------------------------------


def _plan_overviews(
    config: SparseContextConfig, grids: Sequence[Grid], shown: Sequence[bool], trained: Trained, tasks: Sequence[str]
) -> tuple[list[Overview | None], list[str]]:
    """The overview of each reference, and what the report says of them. tasks: none of them "auto"."""
    choices = per_reference("overview", config.overview, len(grids))
    sizes = [rows * columns for rows, columns in grids]
    factors: dict[int, int] = {}
    notes: list[str] = []
    for pool in pools(config.keep, sizes, config.share, config.floor, config.multiple_of):
        size = sum(sizes[i] for i in pool.members)
        if pool.tokens == size:  # nothing is dropped that an overview could show
            continue
        candidates: dict[int, list[int]] = {}
        for i in pool.members:
            ratio = _ratio_of(config.keep, i, pool, size)
            candidates[i] = _candidates(choices[i], factor_for(ratio, grids[i], tasks[i]), trained)
            if choices[i] == "trained" and trained.factors and not trained.shows(tasks[i]):
                candidates[i] = []
                known = " or ".join(trained.tasks)
                notes.append(
                    f"reference {i + 1} has no overview, because the weights learned them of task {known} alone"
                )
            if candidates[i] and not shown[i] and choices[i] != "trained":
                raise ValueError(
                    f"Reference {i + 1} was passed as latents, and an overview is made from pixels: pass the picture, "
                    "or overview=None for this reference."
                )
            reason = "merge asks for averages" if config.merge else None if shown[i] else "it was passed as latents"
            if candidates[i] and reason:
                candidates[i] = []
                notes.append(f"reference {i + 1} has no overview, because {reason}")
        factors |= _fit(config, grids, choices, pool, candidates, notes)
    if any(choices[i] == "trained" for i in factors):
        by = " or ".join(map(str, trained.factors))
        notes.append(f"the weights were trained for overviews by {by}, laid out as {trained.layout!r}")
    elif factors and trained.factors and config.overview_layout is None:
        notes.append(f"overviews are laid out as {trained.layout!r}, because the weights learned them so")
    layout = config.overview_layout or (trained.layout if trained.factors else "reference")
    if factors and trained.factors:
        notes += _unlearnt(factors, layout, trained, tasks)
    overviews = [
        Overview(factors[i], layout, overview_grid(grid, factors[i])) if i in factors else None
        for i, grid in enumerate(grids)
    ]
    return overviews, notes


def _unlearnt(factors: Mapping[int, int], layout: str, trained: Trained, tasks: Sequence[str]) -> list[str]:
    """What the report says of overviews that the weights did not learn so, though they learned others."""
    by = " or ".join(map(str, trained.factors))
    notes = [
        f"the overview of reference {i + 1} is by {factor}, and the weights learned overviews by {by}"
        for i, factor in sorted(factors.items())
        if factor not in trained.factors
    ]
    notes += [
        f"the overview of reference {i + 1} is of task {tasks[i]}, and the weights learned those of task "
        f"{' or '.join(trained.tasks)}"
        for i in sorted(factors)
        if not trained.shows(tasks[i])
    ]
    if layout != trained.layout:
        notes.append(f"overviews are laid out as {layout!r}, and the weights learned {trained.layout!r}")
    return notes


def _ratio_of(keep: float | str | Sequence[float | str], i: int, pool: Pool, size: int) -> float:
    """The share of its tokens that reference `i` may keep; 0 where "auto" says it later."""
    own = keep[i] if is_per_reference(keep) else keep
    if isinstance(own, str) or pool.tokens is None:
        return 0.0
    return pool.tokens / size if is_count(own) else float(own)  # type: ignore[arg-type]


def _candidates(choice: str | int | None, suitable: int, trained: Trained) -> list[int]:
    """The factors that a setting allows, the first choice first, then coarser ones. suitable: what "auto" takes, of
    what the weights were trained for."""
    if choice is None:
        return []
    factors = [factor for factor in trained.factors if factor >= suitable] or [*trained.factors[-1:]]
    if choice == "trained":
        return factors
    if choice != "auto" or not factors:
        factors = [suitable if choice == "auto" else int(choice)]
    while (above := coarser(factors[-1])) is not None:
        factors.append(above)
    return factors


def _fit(
    config: SparseContextConfig,
    grids: Sequence[Grid],
    choices: Sequence[str | int | None],
    pool: Pool,
    candidates: dict[int, list[int]],
    notes: list[str],
) -> dict[int, int]:
    """The finest factors of the references in a pool whose overviews its budget holds: those of the first choice, and
    while these take too much, a coarser one for the reference whose overview takes the largest share of its tokens.

    Where the coarsest take too much, a reference goes without if the weights alone asked for its overview. Raises
    ValueError for another one.
    """
    left = {i: list(factors) for i, factors in candidates.items() if factors}

    def tokens(i: int) -> int:
        rows, columns = overview_grid(grids[i], left[i][0])
        return rows * columns

    def needed() -> int:
        """With a token for each reference that would be left without any."""
        return sum(map(tokens, left)) + (len(pool.members) - len(left) if config.floor and left else 0)

    while pool.tokens is not None and needed() > pool.tokens:
        movable = [i for i in left if len(left[i]) > 1]
        by_default = [i for i in left if choices[i] == "trained"]
        if movable:
            finest = max(movable, key=lambda i: tokens(i) / (grids[i][0] * grids[i][1]))
            left[finest].pop(0)
        elif by_default:
            i = by_default[-1]
            notes.append(
                f"reference {i + 1} has no overview, because by {left[i][0]} it takes {tokens(i)} tokens and the "
                f"budget is {pool.tokens}"
            )
            del left[i]
        else:
            raise ValueError(_smallest_keep(config, grids, pool, {i: tokens(i) for i in left}, needed()))
    for i, factors in left.items():
        if not isinstance(choices[i], str) and factors[0] != choices[i]:
            rows, columns = overview_grid(grids[i], int(choices[i]))  # type: ignore[arg-type]
            notes.append(
                f"the overview of reference {i + 1} is by {factors[0]}, because by {choices[i]} it takes "
                f"{rows * columns} tokens"
            )
    return {i: factors[0] for i, factors in left.items()}


def _smallest_keep(
    config: SparseContextConfig, grids: Sequence[Grid], pool: Pool, tokens: dict[int, int], needed: int
) -> str:
    """Why the coarsest overviews of a pool do not fit, and the smallest keep that holds them: `needed` tokens."""
    taken, size = sum(tokens.values()), sum(grids[i][0] * grids[i][1] for i in pool.members)
    own = config.keep[pool.members[0]] if is_per_reference(config.keep) else config.keep
    if not is_count(own):
        keep: float = math.ceil(1e4 * (needed - 0.5) / size) / 1e4
    else:
        keep = needed if is_per_reference(config.keep) or len(pool.members) > 1 else needed * len(grids)
    which = " and ".join(str(i + 1) for i in tokens)
    others = ", beside one for each other reference" if needed > taken else ""
    return (
        f"keep is {own!r}, which is {pool.tokens} of {size} tokens, and the coarsest overview (by {COARSEST}) of "
        f"reference {which} takes {taken}{others}: pass keep={keep:g} or more, or overview=None."
    )
