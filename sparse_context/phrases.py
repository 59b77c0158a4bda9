"""What the phrases of a config mean for the references of a call: which selector reads them, and what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from .budget import is_per_reference
from .config import SparseContextConfig, meaning_of, per_reference
from .selectors.registry import SelectorLike, find_text, resolve
from .selectors.text import IGNORED, INSIDE, OUTSIDE, Place, Text

ROLES = {"subject": INSIDE, "edit": OUTSIDE, "global": IGNORED}
"""What a task makes of a phrase."""


def is_text(selector: SelectorLike | None) -> bool:
    """Whether a selector is `text` alone, which stands for the rule that the task has for a phrase."""
    return isinstance(selector, Text) or selector == "text"


def plan_phrases(
    config: SparseContextConfig, tasks: Sequence[str], selectors: Sequence[SelectorLike | None], place: Place
) -> list[Text | None]:
    """The selector by the phrase of each reference, whatever its task; None where there is no phrase."""
    count = len(tasks)
    phrases = cast("list[str | None]", per_reference("phrases", config.phrases, count))
    texts = list[Text | None]()
    for i, (selector, phrase, task) in enumerate(zip(selectors, phrases, tasks, strict=True)):
        text = Text() if selector is None else find_text(selector)
        if text is not None and text.phrases is not None:
            phrase = cast("list[str | None]", per_reference("text", text.phrases, count))[i]
        elif text is not None and selector is not None and config.phrases is None:
            raise ValueError(
                f"The selector of reference {i + 1} looks for what a phrase names, and there is none: pass phrases, "
                "such as 'the red car'."
            )
        elif text is None and phrase is not None and is_per_reference(config.phrases):
            raise ValueError(
                f"There is the phrase {phrase!r} for reference {i + 1}, but its selector is "
                f"{resolve(cast('SelectorLike', selector))[0]!r}, which reads none: name text there, or leave one of "
                "the two out."
            )
        if text is None or phrase is None:
            texts.append(None)
            continue
        role = ROLES[meaning_of(task, count)]
        texts.append(replace(text, phrases=phrase, model=text.model or config.text_model, role=role, place=place))
    return texts


def say_of_phrase(i: int, task: str, count: int, text: Text | None) -> list[str]:
    """What the report says of the phrase of reference `i`, where the user may have meant something else."""
    if text is not None and text.role == IGNORED:
        return [f"an edit of the whole picture ignores the phrase {text.phrases!r} of reference {i + 1}"]
    if text is not None and text.role == OUTSIDE and task == "auto":
        return [
            f"reference {i + 1} is taken for the source of an edit, so what is outside {text.phrases!r} is kept: pass "
            f"task='subject' to keep {text.phrases!r} itself"
        ]
    return []
