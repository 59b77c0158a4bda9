"""What weights were trained for: a part of the record that a LoRA or a checkpoint carries.

The record is JSON, under `KEY` in the metadata of a safetensors file, or in a file of that name beside a checkpoint. It
says more than this, of the run that made the weights; what is read here decides what a pipeline does by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .overview import COARSEST, FINEST, LAYOUTS

KEY = "sparse_context"


@dataclass(frozen=True)
class Trained:
    """What weights were trained for.

    factors: of overviews, ascending; empty where they never saw one. layout: of these. kv: whether references go
    through the model once a call. keep: least and greatest share of tokens, both parts; None where nobody says.
    """

    factors: tuple[int, ...] = ()
    layout: str = "spread"
    kv: bool = False
    keep: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        factors = tuple(sorted(set(self.factors)))
        if not all(type(factor) is int and FINEST <= factor <= COARSEST for factor in factors):
            raise ValueError(
                f"The overviews that weights were trained for are by {self.factors!r}: pass whole numbers from "
                f"{FINEST} to {COARSEST}."
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is {self.layout!r}: choose one of {', '.join(LAYOUTS)}.")
        object.__setattr__(self, "factors", factors)


def read_record(record: Mapping[str, Any]) -> Trained:
    """What a record says of overviews, KV and keep ratios; whatever it lacks was not trained.

    Raises ValueError for one that says it in another way, as a later version of this package might.
    """
    overview = record.get("overview") or {}
    keep = record.get("keep")
    try:
        return Trained(
            factors=tuple(overview.get("factors", ())),
            layout=overview.get("layout", "spread"),
            kv=bool(record.get("kv", False)),
            keep=None if keep is None else (float(keep[0]), float(keep[1])),
        )
    except (AttributeError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"The record {KEY} of these weights cannot be read ({error}): save them anew.") from error


def write_record(trained: Trained) -> dict[str, Any]:
    """The entries of a record that `read_record` reads."""
    overview = {"factors": list(trained.factors), "layout": trained.layout} if trained.factors else None
    return {
        "overview": overview,
        "kv": trained.kv,
        "keep": None if trained.keep is None else list(trained.keep),
    }
