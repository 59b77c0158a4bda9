"""What to keep of the references: the settings, and what each task decides where the user does not."""

from __future__ import annotations

import numbers
from collections.abc import Sequence, Sized
from dataclasses import dataclass, fields
from typing import cast

import numpy as np

from .budget import Value, check_budget, spread_out
from .overview import COARSEST, FINEST, LAYOUTS
from .selectors.registry import SelectorLike, SelectorsLike, each_selector, reads_phrases, resolve
from .selectors.text import check_phrases
from .trained import MEANINGS, Trained

TASKS = ("auto", *MEANINGS)


def meaning_of(task: str, references: int) -> str:
    """What "auto" comes to, by the number of references: "edit" for one, "subject" for several; other tasks are
    themselves."""
    return task if task != "auto" else "edit" if references == 1 else "subject"


def task_defaults(
    task: str, references: int, overview: bool = False, phrase: bool = False
) -> tuple[str | dict[str, float], float]:
    """The rule by which a task decides (selector, coverage) where the user did not.

    overview: whether there is one beside the sharp tokens, so that no region is blind without them. phrase: whether a
    phrase says what is meant in the reference (`selectors.text`).

    - "edit", an edit that keeps the picture's layout: edges and saliency, half each, with a tenth of the tokens spread
      evenly, because flat regions are blind otherwise. (The paper, arXiv 2606.23682, takes edges alone, and names that
      limitation. Whatever the edit spares is looked at closest where it is salient.)
    - "global", an edit of the whole picture, such as a colour tone or a style: tokens spread evenly, since every region
      is asked for. No selector knows better, and the embedded model breaks such an edit with the first tokens that it
      goes without (docs/benchmarks/quality.md): keep="auto" keeps all.
    - "subject", a subject put into a new scene: the selector of that name, saliency with the subject's outline and rim,
      and nothing for the background.
    - "auto": one reference is taken for an edit, several for subjects. (The shape of the output cannot tell: by default
      it is the first reference's.)

    Beside an overview, edits of either kind take sharp tokens where the overview is wrong ("residual"), and none that
    are spread, for no region is blind then. An edit that keeps the layout gives "subject" the other half: whatever it
    spares is looked at closest there (chosen on the embedded model's scenes, docs/benchmarks/notebook.md). A subject
    takes the same as without.

    A phrase takes the place of saliency for a subject. The source of an edit keeps what is outside of it: at half of
    the weight, all of that goes before all that is inside, and the rule without a phrase decides among equals. Inside,
    the overview or the tokens that are spread show what was there. An edit of the whole picture ignores a phrase.
    """
    meaning = meaning_of(task, references)
    if meaning == "subject":
        return "text" if phrase else "subject", 0.0
    if overview:
        if meaning == "global":
            return "residual", 0.0
        return {"text": 0.5, "residual": 0.5} if phrase else {"residual": 0.5, "subject": 0.5}, 0.0
    if meaning == "global":
        return "uniform", 0.0
    if phrase:
        return {"text": 0.5, "edges": 0.25, "saliency": 0.25}, 0.1
    return {"edges": 0.5, "saliency": 0.5}, 0.1


@dataclass(frozen=True)
class SparseContextConfig:
    """What to keep of the references. `keep` is the dial; all else has a default that serves.

    The important ones:

    - `keep`: a ratio in (0, 1], a count of at least 2 tokens over all references, or "auto" (for each reference the
      fewest tokens that hold the share `mass` of its scores; all for a global edit; with an overview, the fewest sharp
      tokens with which it shows the picture to `psnr` dB). One value, or one per reference. 1 keeps all.
    - `selector`: what makes a token matter: a name of `selectors.SELECTORS`, a mapping of names to weights (a blend), a
      function (image, grid, generator) -> scores, `mask([...])`, `text("the red car")` or `matting(...)`. One, or a
      list with one per reference. None: the task decides.
    - `task`: "edit", "global", "subject" or "auto", one or one per reference: see `task_defaults`.
    - `overview`: a small copy of each reference, which counts towards `keep` and is kept whole, so that no region is
      blind: the factor by which it is smaller a side (2 to 16), "auto" (a factor that suits the budget), None (no
      overview), or "trained", what the loaded weights were trained for: none, unless they say so. One value, or one per
      reference. A factor that takes more than the budget gives way to a coarser one.
    - `phrases`: what you mean in each reference, such as "the red car", which a model finds. A subject keeps it, the
      source of an edit keeps all else, an edit of the whole picture ignores it: `task_defaults` has the rules, unless
      you name a selector that reads phrases, "text" or a blend with it. One for all references, or one per reference,
      None for one without.

    To tinker with:

    - `text_model`: the model that finds phrases: a folder or a hub id, as `text` takes it. None: CLIPSeg, if it is in
      the hub's cache.
    - `overview_layout`: where the tokens of an overview lie, of `overview.LAYOUTS`: "spread" over their reference, for
      weights that were trained for it; or as one more "reference" after all others. None: what the weights were trained
      for, else the latter.
    - `reference_max_pixels`: take sharp tokens from references of up to so many pixels, where the host scales them
      down, at the same budget: of so many tokens as the host makes of its own size, which the overview shows. None: the
      host's own size. Not without an overview.
    - `coverage`: the share of kept tokens, in [0, 1], that is spread evenly over the pictures. None: the task decides;
      but a selector that you name under the task "auto" is taken at its word, with no coverage.
    - `share`: "equal" (each reference keeps the same ratio) or "joint" (tokens of all references compete: for scores
      that may be compared, such as those of one selector; else one reference starves the others).
    - `floor`: the least number of tokens of each reference; with 0, one may end up with none.
    - `multiple_of`: round the total up to a multiple, for compilers and context parallelism.
    - `merge`: the share of the budget, in [0, 1], that goes to averages of the rest, each over a block of tokens: as
      many tokens in all, fewer of them sharp, and no region is lost. 0, or a share under half a token: what is not kept
      is dropped. Not beside an overview.
    - `mass`: in (0, 1], for keep="auto". `psnr`: in dB, for the same with an overview.
    - `seed`: of the selectors' own random numbers, which the image's noise never shares.

    Raises ValueError that names the field and its value. `budget.choose_tokens` has the details of the budget.
    """

    keep: float | str | Sequence[float | str] = 0.2
    selector: SelectorsLike = None
    task: str | Sequence[str] = "auto"
    overview: str | int | None | Sequence[str | int | None] = "trained"
    phrases: str | None | Sequence[str | None] = None

    text_model: str | None = None
    overview_layout: str | None = None
    reference_max_pixels: int | None = None
    coverage: float | None = None
    share: str = "equal"
    floor: int = 1
    multiple_of: int = 1
    merge: float = 0.0
    mass: float = 0.8
    psnr: float = 32.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):  # arrays cannot be compared, and one without a dimension is a number
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                object.__setattr__(self, field.name, tuple(value.tolist()) if value.ndim else value.item())
        if self.coverage is not None and np.ndim(self.coverage):
            raise ValueError(f"coverage is {self.coverage!r}: pass one share from 0 to 1, or None.")
        coverage = 0.0 if self.coverage is None else self.coverage
        check_budget(self.keep, self.share, self.floor, coverage, self.multiple_of, self.mass, self.merge)
        for name, value in (("task", self.task), ("selector", self.selector), ("overview", self.overview)):
            if isinstance(value, (list, tuple)) and not value:
                raise ValueError(f"{name} is {value!r}: pass one value, or one per reference.")
        for task in spread_out(self.task, 1):
            if task not in TASKS:
                raise ValueError(f"task is {task!r}: choose one of {', '.join(TASKS)}.")
        for selector in each_selector(self.selector, 1):
            if selector is not None:
                resolve(selector)
        self._check_overview()
        self._check_phrases()
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)) or self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}: pass a whole number, 0 or more.")

    def _check_overview(self) -> None:
        for choice in spread_out(self.overview, 1):
            if not (choice in (None, "auto", "trained") or _is_factor(choice)):
                raise ValueError(
                    f"overview is {choice!r}: pass a factor from {FINEST} to {COARSEST}, 'auto', 'trained' or None."
                )
        if self.overview_layout is not None and self.overview_layout not in LAYOUTS:
            raise ValueError(
                f"overview_layout is {self.overview_layout!r}: choose one of {', '.join(LAYOUTS)}, or None."
            )
        if self.names_overview and self.merge:
            raise ValueError(
                f"merge is {self.merge!r} and overview {self.overview!r}: leave one of the two out, for either "
                "shows what is not kept."
            )
        pixels = self.reference_max_pixels
        if pixels is not None:
            if isinstance(pixels, bool) or not isinstance(pixels, numbers.Integral) or pixels < 1:
                raise ValueError(
                    f"reference_max_pixels is {pixels!r}: pass a number of pixels such as 4194304, or None."
                )
            if all(choice is None for choice in spread_out(self.overview, 1)):
                raise ValueError(needs_overview(pixels))
        if not isinstance(self.psnr, numbers.Real) or isinstance(self.psnr, bool) or not 0 < self.psnr <= 1000:
            raise ValueError(f"psnr is {self.psnr!r}: pass a number of dB above 0 and up to 1000, such as 32.")

    def _check_phrases(self) -> None:
        check_phrases("phrases", self.phrases)
        selectors = each_selector(self.selector, 1)
        if any(spread_out(self.phrases, 1)) and not any(map(reads_phrases, selectors)):
            label, _ = resolve(cast("SelectorLike", selectors[0]))
            raise ValueError(
                f"phrases is {self.phrases!r}, but selector is {label!r}, which reads none: name text there, or leave "
                "one of the two out."
            )
        if self.text_model is not None and not (isinstance(self.text_model, str) and self.text_model.strip()):
            raise ValueError(f"text_model is {self.text_model!r}: pass a folder or a hub id, or None.")

    @property
    def names_overview(self) -> bool:
        """Whether an overview of any reference is asked for, whatever the weights were trained for."""
        return any(choice not in (None, "trained") for choice in spread_out(self.overview, 1))

    def keeps_all(self, trained: Trained | None = None) -> bool:
        """Whether all tokens of any references are kept: by a ratio of 1, or by "auto" where the task is "global" and
        there is no overview. trained: what the weights were trained for; None: for no overviews."""
        none = (None,) if trained is not None and trained.shows("global") else (None, "trained")
        lengths = len(spread_out(self.keep, 1)), len(spread_out(self.task, 1)), len(spread_out(self.overview, 1))
        count = max(lengths)
        keep, task = per_reference("keep", self.keep, count), per_reference("task", self.task, count)
        overview = per_reference("overview", self.overview, count)
        return all(
            how == "global" and shown in none if ratio == "auto" else ratio == 1
            for ratio, how, shown in zip(keep, task, overview, strict=True)
        )


def needs_overview(pixels: int, merges: bool = False) -> str:
    """Why a config with `reference_max_pixels` cannot be. merges: whether it asks for averages, too."""
    advice = "leave merge out" if merges else "pass overview='auto' too"
    return (
        f"reference_max_pixels is {pixels}, and only an overview shows what sharp tokens of a large picture leave out: "
        f"{advice}, or leave it out."
    )


def _is_factor(choice: object) -> bool:
    is_whole = isinstance(choice, numbers.Integral) and not isinstance(choice, bool)
    return is_whole and FINEST <= int(choice) <= COARSEST  # type: ignore[call-overload]


def per_reference(name: str, value: Value | Sequence[Value], count: int) -> list[Value]:
    """One value for each reference, from one for all or one for each. Raises ValueError as `check_length` does."""
    values = spread_out(value, count)
    check_length(name, values, count)
    return values


def check_length(name: str, values: Sized, count: int) -> None:
    """Raise ValueError unless the setting `name` has `count` values."""
    if len(values) != count:
        raise ValueError(
            f"{name} has {len(values)} values for {count} references: pass one value, or one per reference."
        )
