"""An engine: one loaded pipeline, and the lock that makes it safe for many threads."""

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from ..cache import ReferenceCache
from ..config import SparseContextConfig
from ..context import place_of
from ..families import Family, family_of
from ..families.call import find_decode, find_fit
from ..preview import label, select_pictures, side_by_side
from ..selection import Score, Selection, score_tokens
from ..selectors.cells import Grid
from ..sparsify import apply_sparse_context, last_selection
from ..trained import Trained, trained_for
from .arguments import call_of, guided, progress_bar
from .embedded import ADAPTERS, OVERVIEW, read_trained
from .errors import Cancelled, GenerationError
from .hub import one_line
from .load import load
from .lora_file import NO_LORA, OVERVIEW_LORA
from .memory import Peak, free_memory, is_out_of_memory
from .predict import ROOM, Prediction, Predictor, grid_of, kept_of, offload_of, parts_of
from .settings import call_settings
from .spec import ModelSpec, Request
from .steps import Cancel, Preview, Progress, Stop, stepwise, turn
from .timing import Times, timed

WARM_UP_STEPS = 2
"""Denoise steps of a warm-up: in KV mode the second is of another kind than the first."""


@dataclass(frozen=True)
class Generation:
    """One call: the image, what was kept of the references (None without any), and where the time went.

    memory: the most bytes that it took at once beyond what was held before (`memory.Peak`). None where nobody asked, or
    where it cannot be told.
    """

    image: Image.Image
    selection: Selection | None
    times: Times
    memory: int | None = None

    def to_dict(self) -> dict:
        """The report, for JSON: size, what was kept, seconds of each phase, and bytes where they were asked for."""
        kept = None if self.selection is None else self.selection.to_dict()
        memory = {} if self.memory is None else {"memory": self.memory}
        return {"size": list(self.image.size), "selection": kept, "seconds": asdict(self.times), **memory}


@dataclass(frozen=True)
class Comparison:
    """One request, answered with the tokens that it keeps and with all tokens, from the same noise."""

    sparse: Generation
    dense: Generation

    @property
    def speedup(self) -> float:
        """How many times faster the sparse call was."""
        return self.dense.times.total / self.sparse.times.total

    def draw(self) -> Image.Image:
        """Both images side by side, dense first, each with its tokens and its time below it."""
        selection = self.sparse.selection
        kept = "no references" if selection is None else f"{selection.kept} of {selection.total} tokens"
        return side_by_side(
            [
                label(self.dense.image, f"all tokens, {self.dense.times.total:.2f} s"),
                label(self.sparse.image, f"{kept}, {self.sparse.times.total:.2f} s"),
            ]
        )


class Engine:
    """One pipeline and the lock it needs: applying a config and calling the pipeline are one act.

        engine = Engine(ModelSpec("black-forest-labs/FLUX.2-klein-4B"))
        generation = engine(Request("the cat on the sofa", [cat, sofa], SparseContextConfig(keep=0.2)))

    Any number of threads may call it; what one pipeline answers is answered one after the other, each request with its
    own config.
    Engines around the same pipeline object share its lock. Whoever calls that pipeline directly meanwhile, or another
    one with the same scheduler, disturbs it.

    The pipeline is loaded by the first call that needs it, or by `warm_up`. The embedded model's own adapter is for
    dropped tokens, so requests that keep all of them are answered by a second pipeline, without it; and those that name
    an overview by a third one, with the weights for that.
    """

    def __init__(
        self,
        spec: ModelSpec | None = None,
        *,
        pipe: Any = None,
        bar: bool = True,
        cache: ReferenceCache | None = None,
    ) -> None:
        """An engine that loads what `spec` says (None: the embedded model), or one around a pipeline that is there.

        bar: whether the pipeline's own progress bar of the steps is shown. cache: remembers references that come again
        (`apply_sparse_context`). Raises TypeError where both a spec and a pipeline are passed, and for a pipeline that
        is not supported.
        """
        if spec is not None and pipe is not None:
            raise TypeError("An Engine takes a ModelSpec or a pipeline, not both.")
        if pipe is not None:
            family_of(pipe)
        self.spec = spec or ModelSpec()
        self.cache = cache
        self._pipes: dict[ModelSpec, Any] = {}
        self._wrapped = pipe
        self._bar = {} if bar else {"disable": True}
        self._loading = threading.Lock()
        self._predictors: WeakKeyDictionary[Any, Predictor] = WeakKeyDictionary()

    def pipe(self, config: SparseContextConfig | None = None) -> Any:
        """The pipeline that answers requests with this config (None: one that drops tokens), loaded if need be.

        Raises what `load` raises.
        """
        if self._wrapped is not None:
            return self._wrapped
        spec = self.spec
        if self.has_own_weights and config is not None:
            shows = OVERVIEW.is_file() and (spec.lora == OVERVIEW_LORA or _asks_for_overviews(config))
            if config.keeps_all() and config.keeps_all(read_trained(OVERVIEW if shows else ADAPTERS["plain"])):
                spec = replace(spec, lora=NO_LORA, lora_scale=1.0)
            elif shows:
                spec = replace(spec, lora=OVERVIEW_LORA)
        with self._loading:
            if spec not in self._pipes:
                self._pipes[spec] = load(spec)
            return self._pipes[spec]

    def load(self) -> None:
        """Load all pipelines that requests may need: of the embedded model there are several. Raises what `load`
        raises."""
        self.pipe()
        if self.has_own_weights:
            self.pipe(SparseContextConfig(keep=1.0))
            if OVERVIEW.is_file() and self.spec.lora_scale == 1 and self.spec.quantization is None:
                self.pipe(SparseContextConfig(overview="auto"))

    @property
    def has_own_weights(self) -> bool:
        """Whether this is the embedded model, with whichever of its weights a request needs."""
        spec = self.spec
        is_own = self._wrapped is None and spec.model is None and spec.lora in (None, OVERVIEW_LORA) and not spec.kv
        return is_own and ADAPTERS["plain"].is_file()

    def __call__(
        self,
        request: Request,
        *,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        preview: Preview | None = None,
        memory: bool = False,
    ) -> Generation:
        """Answer a request. Its config stays applied to the pipeline afterwards. memory: measure that too.

        A model with call settings of its own (`call_settings`) is called by them where the request says nothing else;
        references, and the masks in the config with them, are scaled to the size that it was trained on.

        Raises ValueError for a request that this model does not take, GenerationError for whatever else the pipeline
        raises, and Cancelled where `cancel` says so, before a step or while others are served.

        `preview` is called by pipelines whose family can decode latents (`families.call.find_decode`), and never by
        others.
        """
        return self._answer([request], cancel, progress, preview, memory)[0]

    def together(
        self,
        requests: Sequence[Request],
        *,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        preview: Preview | None = None,
    ) -> list[Generation]:
        """Answer requests that differ in their prompts and seeds alone by one call, for pipelines that can do that
        (`Family.batch`).

        The pictures are those of single calls but for rounding. Their references are encoded and chosen from once, and
        all have the selection and the times of the one call. Raises what a call raises, and ValueError for other
        requests.
        """
        return self._answer(requests, cancel, progress, preview)

    def check(self, request: Request) -> None:
        """Raise ValueError for a request that this model does not take, as a call would, without the call."""
        call_of(self.pipe(request.config), request)

    def select(self, request: Request, score: Score = score_tokens) -> Selection:
        """What a call would keep of the references, without the call: nothing is generated, and nobody is waited for.

        The references are looked at in the size that the model usually has them in: a call with `reference_max_pixels`
        keeps as many tokens, of larger pictures.

        score: as `select_tokens` takes it, such as that of a cache. Raises ValueError for a request that this model
        does not take.
        """
        pipe = self.pipe(request.config)
        config, _, images = call_of(pipe, _in_usual_size(request))
        trained = self.trained(request.config)
        fit = find_fit(pipe, len(images)) or (lambda picture: picture)  # which is fitted already
        return select_pictures(images, config, 2 * pipe.vae_scale_factor, trained, score, place_of(pipe), fit)

    def trained(self, config: SparseContextConfig) -> Trained | None:
        """What the weights that answer requests with this config were trained for; None where nothing says so. Raises
        what `load` raises."""
        pipe = self.pipe(config)
        return trained_for(getattr(pipe, "transformer", None), family_of(pipe).kv)

    def predict(self, request: Request) -> Prediction:
        """What a call would take: tokens, operations, and memory by phase, from shapes alone; nothing is generated.

        A keep of "auto" is predicted as all tokens, for what it comes to the pictures say. Pictures beyond the host's
        own size (`reference_max_pixels`), LoRAs and classifier-free guidance are not counted. Raises ValueError for a
        request that this model does not take, and for a pipeline with parts of the user's own.
        """
        return self._predict(self.pipe(request.config), request)

    def largest_keep(self, request: Request, memory: int) -> float | None:
        """The largest keep, in hundredths, with which a call of this kind stays within `memory` bytes on the device,
        weights included; None where none does. Raises what `predict` raises."""
        pipe = self.pipe(request.config)
        grids, output, steps = _grids(pipe, request)
        return self._predictor(pipe).largest_keep(grids, output, memory, steps)

    def warm_up(self, request: Request | None = None) -> None:
        """Load the pipeline and make a short call, for a first one pays for more than itself.

        request: one of the kind that is to come, which is made with few steps. None: a grey reference, if the pipeline
        takes any. Raises what a call raises.
        """
        if request is None:
            grey = Image.new("RGB", (512, 512), (128, 128, 128))
            mask = Image.new("L", grey.size, 255) if family_of(self.pipe()).paints else None
            request = Request("grey", [grey], inpaint=mask)
        self._answer([replace(request, steps=WARM_UP_STEPS)], disable=True)

    def compare(
        self, request: Request, *, cancel: Cancel | None = None, progress: Progress | None = None
    ) -> Comparison:
        """Answer a request as it is and with all tokens, both after a warm-up. Raises what a call raises.

        `progress` counts the steps of both answers as one.
        """
        dense = all_tokens(request)
        for each in (request, dense):
            self._answer([replace(each, steps=WARM_UP_STEPS)], cancel, disable=True)

        def half(answered: int) -> Progress | None:
            if progress is None:
                return None
            return lambda step, steps: progress(answered * steps + step, 2 * steps)

        return Comparison(
            sparse=self._answer([request], cancel, half(0), desc="kept tokens")[0],
            dense=self._answer([dense], cancel, half(1), desc="all tokens")[0],
        )

    def _answer(
        self,
        requests: Sequence[Request],
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        preview: Preview | None = None,
        memory: bool = False,
        **bar: Any,
    ) -> list[Generation]:
        """A call that answers requests of one kind, with these settings of the pipeline's progress bar."""
        request = requests[0]
        pipe = self.pipe(request.config)
        family, name = family_of(pipe), type(pipe).__name__
        _check_together(requests, family, name)
        config, arguments, _ = call_of(pipe, request)
        prompts = [each.prompt for each in requests]
        generators = [torch.Generator().manual_seed(each.seed) for each in requests]
        asked = (prompts, generators) if len(requests) > 1 else (prompts[0], generators[0])
        decode, free = find_decode(pipe), None
        decoded = None if decode is None else partial(decode, pipe, inputs=arguments)
        try:
            with turn(pipe, cancel), progress_bar(pipe, **bar | self._bar), guided(pipe, request.guidance_scale):
                apply_sparse_context(pipe, config, cache=self.cache, together=self.spec.vae is not None)
                peak = Peak(pipe._execution_device) if memory else None
                free = free_memory(pipe._execution_device)  # now that no other call takes any
                with stepwise(pipe, cancel, progress, preview, decoded), timed(pipe) as times:
                    output = pipe(prompt=asked[0], generator=asked[1], **arguments)
                images = (output if family.modular else output.images)[: len(requests)]
                taken = None if peak is None else peak.read()
                return [Generation(image, last_selection(pipe), times, taken) for image in images]
        except Stop:
            raise Cancelled("The call was cancelled.") from None
        except ValueError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise GenerationError(self._out_of_memory(pipe, requests, free)) from error
            raise GenerationError(f"{name} failed: {one_line(error)}.") from error

    def _predictor(self, pipe: Any) -> Predictor:
        with self._loading:
            if pipe not in self._predictors:
                text = call_settings(pipe).get("max_sequence_length")
                offload = self.spec.cpu_offload if self._wrapped is None else offload_of(pipe)
                self._predictors[pipe] = Predictor(parts_of(pipe, text, offload))
            return self._predictors[pipe]

    def _predict(self, pipe: Any, request: Request) -> Prediction:
        grids, output, steps = _grids(pipe, request)
        return self._predictor(pipe)(grids, kept_of(request.config, grids), output, steps)

    def _out_of_memory(self, pipe: Any, requests: Sequence[Request], free: int | None) -> str:
        """What to do about memory that ran out, of which so many bytes were free before."""
        otherwise = "ask for a smaller height and width, or load the model with cpu_offload or quantization."
        largest, known = None, False
        if free is not None and len(requests) == 1 and requests[0].references:
            try:
                now = self._predict(pipe, requests[0])
                memory = free + now.resident
                largest, known = self.largest_keep(requests[0], memory), now.peak > ROOM * memory
            except Exception:  # what cannot be predicted must not hide what happened
                known = False
        if not known:
            return f"The device's memory ran out: keep fewer tokens, {otherwise}"
        gibibytes = f"{(free or 0) / 2**30:.1f} GiB that were free"
        if largest is None:
            return f"The device's memory ran out, and no keep fits into the {gibibytes}: {otherwise}"
        return f"The device's memory ran out: keep={largest:g} fits into the {gibibytes}. Or {otherwise}"


def _grids(pipe: Any, request: Request) -> tuple[list[Grid], Grid, int | None]:
    """Of a request the grids of its references, that of its output, and the steps."""
    _, arguments, images = call_of(pipe, _in_usual_size(request))
    token, fit = 2 * pipe.vae_scale_factor, find_fit(pipe, len(images))
    grids = [grid_of(*(image if fit is None else fit(image)).size, token) for image in images]
    usual = getattr(pipe, "default_sample_size", 128) * pipe.vae_scale_factor
    rows, columns = grids[0] if grids else (usual // token, usual // token)
    height, width = arguments.get("height") or rows * token, arguments.get("width") or columns * token
    return grids, grid_of(width, height, token), arguments.get("num_inference_steps")


def _in_usual_size(request: Request) -> Request:
    """The same request, whose references are no larger than the model usually has them."""
    return replace(request, config=replace(request.config, reference_max_pixels=None))


def all_tokens(request: Request) -> Request:
    """The same request with all tokens of its references, which its tasks still scale."""
    return replace(request, config=SparseContextConfig(keep=1.0, task=request.config.task))


def _asks_for_overviews(config: SparseContextConfig) -> bool:
    """Whether a config names an overview, in a layout that the embedded model's weights for overviews know."""
    if not config.names_overview or config.overview_layout is None:
        return config.names_overview
    return config.overview_layout == read_trained(OVERVIEW).layout  # a file is read where this alone decides


def _check_together(requests: Sequence[Request], family: Family, name: str) -> None:
    """Raise ValueError where one call cannot answer these requests."""
    if len(requests) > 1 and not family.batch:
        raise ValueError(f"There are {len(requests)} requests, and {name} answers one at a time: call it for each.")
    first = replace(requests[0], prompt="", seed=0)
    if any(replace(other, prompt="", seed=0) != first for other in requests[1:]):
        raise ValueError("Requests that are answered together may differ in prompt and seed alone: call for each.")
