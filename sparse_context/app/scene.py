"""A scene: what is on the screen, as plain records, and what it comes to as a config and a request.

Nothing here knows of a browser.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ..budget import is_count
from ..config import SparseContextConfig, meaning_of, task_defaults
from ..pipelines.spec import ModelSpec, Request
from ..selectors.masks import mask
from ..selectors.registry import SelectorLike, beside_painted
from ..trained import Trained

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Reference:
    """One reference, and what is asked of it.

    name: of the user's file. picture: RGB or RGBA. keep: a ratio, a count or "auto". task: of `config.TASKS`. selector:
    a name, a blend, or None: the task decides. phrase: what is meant in it, if anything. painted: uint8 (H, W) of the
    picture's size, with `KEEP`, `NEITHER` or `DROP` of `selectors.masks` for each pixel; None where nothing is.
    """

    name: str
    picture: Image.Image
    keep: float | str = 0.2
    task: str = "auto"
    selector: str | Mapping[str, float] | None = None
    phrase: str = ""
    painted: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """References, a prompt, a model, and how to call it.

    keep: one budget for all references; None: each has its own. config: further fields of `SparseContextConfig`, such
    as coverage. call: further fields of `Request`, such as seed. What is left out there has its default. trained: what
    the model's weights were trained for, if anybody knows: it says which references have an overview by default.
    """

    references: Sequence[Reference] = ()
    prompt: str = ""
    spec: ModelSpec = field(default_factory=ModelSpec)
    keep: float | str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    trained: Trained | None = None

    def selection_config(self) -> SparseContextConfig:
        """What to keep of the references. Raises ValueError that names what does not fit."""
        settings = dict(self.config)
        if not self.references:
            return SparseContextConfig(**settings | ({} if self.keep is None else {"keep": self.keep}))
        if any(each.painted is not None for each in self.references):
            settings.setdefault("coverage", 0.0)  # tokens that are spread evenly would lie where nothing is to be kept
        selectors = [self._selector(each) for each in self.references]
        if any(self.phrases):
            settings["phrases"] = one_or_all(self.phrases)
        return SparseContextConfig(
            keep=self.own_keeps if self.keep is None else self.keep,
            task=one_or_all([each.task for each in self.references]),
            selector=one_or_all(selectors),
            **settings,
        )

    @property
    def phrases(self) -> list[str | None]:
        """What is meant in each reference. Beside a mask, a global edit has no selector that would read it."""
        count = len(self.references)
        unread = [meaning_of(each.task, count) == "global" and each.painted is not None for each in self.references]
        return [
            None if ignored else each.phrase.strip() or None
            for each, ignored in zip(self.references, unread, strict=True)
        ]

    @property
    def own_keeps(self) -> Any:
        """The keeps of the references; one where all have the same ratio, but a single count would be one for all."""
        keeps = [each.keep for each in self.references]
        return keeps if any(is_count(keep) for keep in keeps) else one_or_all(keeps)

    def request(self) -> Request:
        """The request. Raises ValueError that names what does not fit."""
        pictures = [each.picture for each in self.references]
        return Request(self.prompt, pictures, self.selection_config(), **self.call)

    def _selector(self, reference: Reference) -> SelectorLike | None:
        if reference.painted is None:
            return reference.selector
        return {
            mask([part]) if part is reference.painted else part: weight for part, weight in self.blend_of(reference)
        }

    def blend_of(self, reference: Reference) -> list[tuple[Any, float]]:
        """The parts of the selector of a painted reference, and their weights; the mask stands for itself."""
        selector: Any = reference.selector
        if selector == "mask":
            return [(reference.painted, 1.0)]
        if selector is None:
            phrase = bool(reference.phrase.strip())
            selector, _ = task_defaults(reference.task, len(self.references), self._has_overview(reference), phrase)
        return beside_painted(reference.painted, selector)

    def _has_overview(self, reference: Reference) -> bool:
        choice = self.config.get("overview", "trained")
        if choice != "trained":
            return choice is not None
        return self.trained is not None and self.trained.shows(meaning_of(reference.task, len(self.references)))


def one_or_all(values: Sequence[Value]) -> Value | list[Value]:
    """One value where all are the same, else all of them."""
    return values[0] if all(each is values[0] or each == values[0] for each in values) else list(values)
