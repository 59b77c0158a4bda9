"""What weights were trained for: a part of the record that a LoRA or a checkpoint carries.

The record is JSON: under `KEY` in the metadata of a safetensors file, or in `FILE` beside a checkpoint. It says more of
the run that made the weights; what is read here decides what a pipeline does by default. Whoever loads weights notes on
the model what they were trained for, and each call looks at what of it is in effect by then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .overview import COARSEST, FINEST, LAYOUTS

KEY = "sparse_context"
FILE = f"{KEY}.json"

MEANINGS = ("edit", "global", "subject")  # of a task; "auto" is one of these by the number of references

ATTRIBUTE = "_sparse_context_trained"  # of a module whose weights these are


@dataclass(frozen=True)
class Trained:
    """What weights were trained for. Raises ValueError, with the value, for what is no such thing.

    factors: of overviews, ascending; empty where they never saw one. layout: of these. kv: whether references go
    through the model once a call. keep: least and greatest share of tokens that was kept, overviews included. These two
    are None where nobody says. tasks: of the references whose overviews were trained, "edit", "global" or "subject";
    empty: of all.
    """

    factors: tuple[int, ...] = ()
    layout: str = "spread"
    kv: bool | None = None
    keep: tuple[float, float] | None = None
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(type(factor) is int and FINEST <= factor <= COARSEST for factor in self.factors):
            raise ValueError(
                f"The overviews that were trained are by {[*self.factors]!r}: pass whole numbers from {FINEST} to "
                f"{COARSEST}."
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"The layout of overviews is {self.layout!r}: choose one of {', '.join(LAYOUTS)}.")
        if self.kv not in (None, True, False):
            raise ValueError(f"kv is {self.kv!r}: pass True or False, or None where nobody says.")
        if self.keep is not None and not 0 <= self.keep[0] <= self.keep[1] <= 1:
            raise ValueError(
                f"The share of tokens that was kept runs from {self.keep[0]!r} to {self.keep[1]!r}: pass two numbers "
                "from 0 to 1, the smaller one first."
            )
        if not set(self.tasks) <= set(MEANINGS):
            raise ValueError(f"The tasks of overviews are {[*self.tasks]!r}: choose of {', '.join(MEANINGS)}.")
        object.__setattr__(self, "factors", tuple(sorted(set(self.factors))))
        object.__setattr__(self, "tasks", tuple(sorted(set(self.tasks))))

    def shows(self, task: str) -> bool:
        """Whether a reference with this task has an overview by default."""
        return bool(self.factors) and (not self.tasks or task in self.tasks)


def read_record(record: Mapping[str, Any]) -> Trained:
    """What a record says that decides defaults: its entries "overview", "kv" and "keep", as `write_record` makes them.

    What it does not say was not trained. Raises ValueError for one that says it in another way, as a later version of
    this package might.
    """
    try:
        overview, keep = record.get("overview") or {}, record.get("keep")
        return Trained(
            factors=tuple(overview.get("factors", ())),
            layout=overview.get("layout", "spread"),
            kv=record.get("kv"),
            keep=None if keep is None else (float(keep[0]), float(keep[1])),
            tasks=tuple(overview.get("tasks", ())),
        )
    except (AttributeError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"The record {KEY!r} of these weights cannot be read ({error}): save them anew.") from error


def write_record(trained: Trained) -> dict[str, Any]:
    """The entries of a record that `read_record` reads."""
    overview: dict[str, Any] | None = None
    if trained.factors:
        overview = {"factors": list(trained.factors), "layout": trained.layout}
        overview |= {"tasks": list(trained.tasks)} if trained.tasks else {}
    return {"overview": overview, "kv": trained.kv, "keep": None if trained.keep is None else list(trained.keep)}


def read_folder(folder: Path) -> Trained | None:
    """What the checkpoint in a folder was trained for; None where no record is beside it. Raises ValueError for a
    record that cannot be read."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return read_record(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{file} says in no known way what weights were trained for: {error}") from error


def note_trained(model: Any, trained: Trained, adapter: str | None = None) -> None:
    """Note what the weights of a model were trained for, or those of a LoRA that was loaded into it by this name.

    The note is on the very weights that it is about: it goes where they go, and is gone when they are unloaded.
    """
    holders = [_plain(model)] if adapter is None else [layer.lora_A[adapter] for layer in _layers_with(model, adapter)]
    for holder in holders:
        vars(holder)[ATTRIBUTE] = trained


def note_checkpoint(model: Any) -> None:
    """Note what a model was trained for that diffusers read from a folder with a record beside its weights, unless
    something was noted. Raises ValueError for a record that cannot be read."""
    own = _plain(model)
    config = getattr(own, "config", None)
    place = config.get("_name_or_path") if isinstance(config, Mapping) else None
    if not place or ATTRIBUTE in vars(own):
        return
    for folder in (Path(place), Path(place, "transformer")):  # the latter where it was read as a pipeline's subfolder
        if os.path.isfile(folder / FILE):
            note_trained(own, cast("Trained", read_folder(folder)))
            return


def trained_for(model: Any, kv: bool = False) -> Trained | None:
    """What the weights of a model that are in effect were trained for, or None where nothing was noted.

    A LoRA counts while it is active or merged, with a scale other than 0; once it is merged and then unloaded, nobody
    can tell. kv: the mode that the model runs in. Several weights count as `combine` says.
    """
    own, adapters = _notes(model)
    return combine(adapters, kv, own)


def combine(notes: Iterable[Trained], kv: bool = False, base: Trained | None = None) -> Trained | None:
    """What several weights that are in effect together were trained for; None where there are none.

    The factors and the tasks that all of them know count, if their layouts are one. base: what those under LoRAs were
    trained for; a LoRA may teach overviews to a base that knows none. kv: the mode that the model runs in; weights that
    were trained for the other one do not count.
    """
    loras = {trained for trained in notes if trained.kv in (None, kv)}
    noted = loras | ({base} if base is not None and base.kv in (None, kv) else set())
    if not noted:
        return None
    showing = [trained for trained in noted if trained.factors]
    agree = len({trained.layout for trained in showing}) == 1 and loras <= {*showing}
    factors = set.intersection(*(set(trained.factors) for trained in showing)) if agree else set()
    named = [set(trained.tasks) for trained in showing if trained.tasks]
    tasks = set.intersection(*named) if named else set()
    if named and not tasks:
        factors = set()
    ranges = [trained.keep for trained in noted if trained.keep is not None]
    least = max((least for least, _ in ranges), default=0.0)
    most = min((most for _, most in ranges), default=1.0)
    return Trained(
        factors=tuple(factors),
        layout=showing[0].layout if factors else "spread",
        kv=kv,
        keep=(least, most) if ranges and least <= most else None,
        tasks=tuple(tasks) if factors else (),
    )


def _notes(model: Any) -> tuple[Trained | None, list[Trained]]:
    """What was noted on a model's own weights, and on those of its LoRAs that are in effect."""
    if model is None:
        return None, []
    adapters = []
    for layer in _layers_with(model):
        active = () if layer.disable_adapters else layer.active_adapters
        for name in {*active, *layer.merged_adapters} & layer.lora_A.keys():
            if ATTRIBUTE in vars(layer.lora_A[name]) and layer.scaling[name] != 0:
                adapters.append(vars(layer.lora_A[name])[ATTRIBUTE])
    return vars(_plain(model)).get(ATTRIBUTE), adapters


def _plain(model: Any) -> Any:
    """The model itself where `torch.compile` has put a module of its own around it."""
    return getattr(model, "_orig_mod", model)


def _layers_with(model: Any, adapter: str | None = None) -> Iterator[Any]:
    """peft's layers of LoRAs in a model: all, or those of one by its name. (Known by what they have, without peft.)"""
    for layer in model.modules():
        if hasattr(layer, "merged_adapters") and hasattr(layer, "lora_A") and adapter in (None, *layer.lora_A):
            yield layer
