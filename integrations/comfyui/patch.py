"""What is put on a model of ComfyUI: three places where it lets others in.

- Around a run of the sampler (`run`): what is told of a run is told once.
- Around a forward (`forward`): there are the reference latents, so tokens are chosen and overviews join them, as
  further references. What was chosen goes on with the forward's own options, so no forward can see another one's.
- After the input layers (`__call__`): the tokens are there, of the output and then of the references in order, with
  their position ids. There, and nowhere else, tokens are dropped.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparse_context import ReferenceTokens, Selection
from sparse_context.overview import Overview
from sparse_context.selectors.cells import Grid

from .families import Family, place_overviews
from .latents import average, detail, is_still, token_grid
from .report import Forward, Run

KEY = "sparse_context"  # of our wrappers, and of what goes on with a forward
COUNTS = "reference_image_num_tokens"  # where ComfyUI has the number of tokens of each reference
KV_PATCH = "KV_Attn_Input"  # the class of what FluxKVCache puts on attention

NO_REFERENCES = (
    "The model got no reference, so nothing was dropped: connect a reference to the prompt, with the node Set "
    "Reference Latent."
)


@dataclass(frozen=True, eq=False)
class Chosen:
    """What was chosen for one forward."""

    selection: Selection
    grids: Sequence[Grid]

    @property
    def overviews(self) -> list[Overview | None]:
        return [kept.overview for kept in self.selection.references]

    @property
    def counts(self) -> list[int]:
        """The tokens of each reference, and then of each overview, before any is dropped."""
        return [rows * columns for rows, columns in self.grids] + [each.tokens for each in self.overviews if each]


Choose = Callable[[Sequence[Grid], Sequence[np.ndarray] | None, bool], Selection]
"""(token grids, details of the latents if asked for, whether the model reuses keys and values) -> what to keep. Raises
ValueError, in one sentence, where nothing can be chosen."""


class SparsePatch:
    """Drops reference tokens of one model.

    choose: as above. needs_details: whether it asks for the latents' details. family: of the model. patch: how many
    places of its latents a token has a side. coarse: latents of overviews that a VAE made, by the number of the
    reference. tell: says a sentence to the user.
    """

    def __init__(
        self,
        choose: Choose,
        family: Family,
        patch: int,
        tell: Callable[[str], None] = logging.warning,
        needs_details: bool = False,
    ) -> None:
        self.choose, self.family, self.patch, self.tell, self.needs_details = choose, family, patch, tell, needs_details
        self.coarse: dict[int, torch.Tensor] = {}
        self.last = Run()
        self._chosen: dict[tuple[Any, ...], Selection] = {}

    def run(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the sampler."""
        self.last = Run()
        if self.needs_details:  # each choice has its latents' details beside it
            self._chosen.clear()
        result = executor(*args, **kwargs)
        if not self.last.forwards and not self.last.problems:
            self._say(NO_REFERENCES)
        return result

    def forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a forward of the model."""
        args, kwargs = self._prepare(executor.original, args, kwargs)
        return executor(*args, **kwargs)

    @torch.compiler.disable
    def _prepare(self, original: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a forward, with what was chosen and with overviews. (torch.compile would turn numpy's
        functions into its own, which break ties another way.)"""
        bound = inspect.signature(original).bind(*args, **kwargs)
        latents = bound.arguments.get("ref_latents")
        if not latents:
            return args, kwargs
        options = bound.arguments.get("transformer_options", {})
        try:
            chosen = self._choose(latents, reuses(options) is not None)
        except (ValueError, ImportError) as error:
            self._say(f"{error} Nothing was dropped.")
            return args, kwargs
        bound.arguments["ref_latents"] = [*latents, *self._coarse(latents, chosen.overviews)]
        bound.arguments["transformer_options"] = {**options, KEY: chosen}
        return bound.args, bound.kwargs

    @torch.compiler.disable
    def __call__(self, args: dict[str, Any]) -> dict[str, Any]:
        """After the input layers: `args` with the tokens and position ids of what is kept."""
        options = args["transformer_options"]
        chosen, counts = options.get(KEY), options.get(COUNTS, [])
        if chosen is None:
            return args
        if list(counts) != chosen.counts:
            self._say(
                f"The model made {list(counts)} tokens of its references and {chosen.counts} were expected: report "
                "this with the name of the model. Nothing was dropped."
            )
            return args
        selection, image, ids = chosen.selection, args["img"], args["img_ids"]
        target = ids.shape[1] - sum(counts)
        tokens = args["txt"].shape[1], target, selection.total, selection.kept
        self.last.add(Forward(image.shape[-1], *tokens, bool(reuses(options))), selection)
        if len(selection.index) == sum(counts):
            return args
        references = place_overviews(ids[:, target:], chosen.grids, chosen.overviews, self.family)
        coarse = np.arange(sum(counts[len(chosen.grids) :])) + sum(counts[: len(chosen.grids)])
        index = np.concatenate([selection.index, coarse])
        # With FluxKVCache, later steps have no reference tokens, but their position ids
        is_whole = image.shape[1] == ids.shape[1]
        kept = ReferenceTokens(image[:, target:] if is_whole else references, references).keep(index)
        if is_whole:
            args["img"] = torch.cat([image[:, :target], kept.latents], dim=1)
        args["img_ids"] = torch.cat([ids[:, :target].float(), kept.ids], dim=1)
        options[COUNTS] = [len(each.index) for each in selection.references]
        options[COUNTS] += [each.tokens for each in chosen.overviews if each]
        return args

    def _choose(self, latents: Sequence[torch.Tensor], kv: bool) -> Chosen:
        if not all(map(is_still, latents)):
            raise ValueError("A reference is a video, and this node takes still images.")
        grids = [token_grid((each.shape[-2], each.shape[-1]), self.patch) for each in latents]
        details = None
        if self.needs_details:  # nothing else tells whether these are the latents of the last forward
            details = [detail(each, self.patch, self.family.packed) for each in latents]
        key = (*grids, kv, *(each.tobytes() for each in details or ()))
        if key not in self._chosen:
            self._chosen[key] = self.choose(grids, details, kv)
            for note in self._chosen[key].notes:
                logging.info("Sparse Context: %s", note)
        return Chosen(self._chosen[key], grids)

    def _coarse(self, latents: Sequence[torch.Tensor], overviews: Sequence[Overview | None]) -> list[torch.Tensor]:
        """The latents of overviews: those of the VAE where they fit, else averages."""
        made = []
        for i, (own, each) in enumerate(zip(latents, overviews, strict=True)):
            if each is None:
                continue
            coarse = self.coarse.get(i)
            if coarse is None or token_grid((coarse.shape[-2], coarse.shape[-1]), self.patch) != each.grid:
                coarse = average(own, self.patch, self.family.packed, each.factor)
            coarse = coarse.to(own.device, own.dtype)
            repeats = torch.arange(len(own), device=own.device) % len(coarse)
            made.append(coarse.reshape(len(coarse), *own.shape[1:-2], *coarse.shape[-2:])[repeats])
        return made

    def _say(self, sentence: str) -> None:
        if sentence not in self.last.problems:
            self.last.problems.append(sentence)
            self.tell(sentence)


def reuses(options: dict[str, Any]) -> bool | None:
    """Whether the references' keys and values are there from an earlier step; None: FluxKVCache is not in use."""
    patches = options.get("patches", {}).get("attn1_patch", [])
    caches = [each.cache for each in patches if type(each).__name__ == KV_PATCH]
    return any(caches) if caches else None


def install(model: Any, patch: SparsePatch, outer_sample: str, diffusion_model: str) -> Any:
    """A clone of a ModelPatcher with `patch` on it, in the place of an earlier one. The model itself stays as it is.

    The last two are ComfyUI's names of the places.
    """
    clone = model.clone()
    patches = clone.model_options["transformer_options"].get("patches", {})
    if "post_input" in patches:
        patches["post_input"] = [each for each in patches["post_input"] if not isinstance(each, SparsePatch)]
    for place, wrapper in ((outer_sample, patch.run), (diffusion_model, patch.forward)):
        clone.remove_wrappers_with_key(place, KEY)
        clone.add_wrapper_with_key(place, KEY, wrapper)
    clone.set_model_post_input_patch(patch)
    return clone


def installed(model: Any) -> SparsePatch | None:
    """The patch on a ModelPatcher, or None."""
    patches = model.model_options["transformer_options"].get("patches", {}).get("post_input", [])
    return next((each for each in patches if isinstance(each, SparsePatch)), None)
