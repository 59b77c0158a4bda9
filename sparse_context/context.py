"""What is installed on a pipeline, and what each of its calls makes of it.

Applying gives one pipeline object a class of its own, below its class and with the same name. That class changes
nothing but calls and copies: a shallow copy is sparse on its own, and a call sees some of the pipeline's attributes as
its family wants them. Nothing is written to the pipeline for that, so there is nothing to undo, parts that are
exchanged are taken as they are by then, and calls know nothing of each other: neither those of copies, nor one inside
another's callback, nor those of other threads.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from typing import Any, NoReturn

import numpy as np

from .cache import ReferenceCache
from .config import SparseContextConfig
from .large import Large, large_tokens
from .overview import Overview
from .selection import Pixels, Selection, score_tokens, select_tokens
from .selectors.cells import Grid
from .selectors.registry import each_selector, name_of, user_mask
from .selectors.text import Place
from .tokens import ReferenceTokens
from .trained import trained_for

ATTRIBUTE = "_sparse_context"

EncodeOverviews = Callable[[Mapping[int, Overview], ReferenceTokens], ReferenceTokens]
"""From overviews by the number of their reference, and all tokens of the whole references, to the overviews' tokens,
one overview after another."""

Enlarge = Callable[[int, Pixels, int], Large | None]
"""From the number of a reference, what selectors see of it, and a number of pixels to it in at most so many; None where
that is not larger."""


@dataclass
class SparseContext:
    """What is installed on one pipeline object.

    attach: `attach(pipe, call)` of its family says what a call sees, by `Call.replace` and `Call.around`.
    selection: of the last call. None before the first, or where it had no references.
    kv: whether the pipeline runs references through its model once a call.
    together: whether references of one size are encoded as one batch.
    """

    config: SparseContextConfig
    attach: Callable[[Any, "Call"], None]
    cache: ReferenceCache | None = None
    selection: Selection | None = None
    kv: bool = False
    together: bool = False


def context_of(pipe: object) -> SparseContext | None:
    """What is installed on a pipeline."""
    return vars(pipe).get(ATTRIBUTE)


def install(pipe: object, context: SparseContext) -> None:
    """From the next call on, `pipe` is called as `context` says, instead of what was installed before.

    Raises what `context.attach` raises for a pipeline that it cannot serve, which is then left as it was.
    """
    context.attach(pipe, Call(pipe, context))
    with _lock:
        setattr(pipe, ATTRIBUTE, context)
        cls: Any = type(pipe)
        if not _is_sparse(cls):
            pipe.__class__ = _sparse(cls)


def uninstall(pipe: object) -> None:
    """From the next call on, `pipe` is as it was. Does nothing where nothing is installed."""
    with _lock:
        if vars(pipe).pop(ATTRIBUTE, None) is not None:
            _restore_class(pipe)


class Call:
    """One call of a sparse pipeline: what it sees of the pipeline, and what it kept.

    It is open from the first line of the pipeline's `__call__` to the last; `closing` is closed with it.
    """

    def __init__(self, pipe: Any, context: SparseContext) -> None:
        self.pipe = pipe
        self.context = context
        self.selection: Selection | None = None
        self.closing = ExitStack()
        self._replacements: dict[str, Callable[[Any], object]] = {}

    def replace(self, name: str, replacement: Callable[[Any], object]) -> None:
        """Within the call, `pipe.<name>` is `replacement` of what it is by then."""
        self._replacements[name] = replacement

    def around(self, method: str, function: Callable) -> None:
        """Within the call, `pipe.<method>(...)` is `function(<the pipeline's own>, ...)`."""
        self.replace(method, lambda original: partial(function, original))

    def keep(
        self,
        make: Callable[[], ReferenceTokens],
        grids: Sequence[Grid],
        picture: Callable[[int, np.ndarray | None], Pixels],
        shows_picture: Sequence[np.ndarray | None] | None = None,
        encode_overviews: EncodeOverviews | None = None,
        enlarge: Enlarge | None = None,
    ) -> ReferenceTokens:
        """Choose among the reference tokens of the call, return what is kept of them, and remember the selection.

        `make()` gives all tokens: the pipeline encodes the references in it, and where an accelerator does that, tokens
        are chosen meanwhile. `grids` is one (rows, columns) per reference; `picture(i, mask)` gives the pixels of
        reference i as selectors want them, with the user's mask (or None) carried through the pipeline's own resize and
        crop. `shows_picture` tells tokens from padding (`select_tokens`). `encode_overviews` makes the tokens of
        overviews, which follow the kept ones of all references; None: the pipeline takes none. `enlarge` gives
        references in a larger size; None: the pipeline takes them in its own alone. Raises ValueError where the grids
        hold another number of tokens, and for overviews and larger sizes that cannot be.
        """
        config = self.context.config
        if encode_overviews is None and config.names_overview:
            raise ValueError(
                f"overview is {config.overview!r}, but {type(self.pipe).__name__} takes none: leave it out."
            )
        if enlarge is None and config.reference_max_pixels is not None:
            raise ValueError(
                f"reference_max_pixels is {config.reference_max_pixels}, but {type(self.pipe).__name__} takes "
                "references in its own size alone: leave it out."
            )
        trained = trained_for(getattr(self.pipe, "transformer", None), self.context.kv)
        if encode_overviews is None and trained is not None:
            trained = replace(trained, factors=())
        larger: dict[int, Large] = {}

        def choose() -> Selection:
            start = time.perf_counter()
            pictures = [picture(i, user_mask(config.selector, i)) for i in range(len(grids))]
            preparing = time.perf_counter() - start  # which is a part of what choosing costs

            def large(i: int) -> Large | None:
                found = None
                if enlarge is not None and config.reference_max_pixels is not None:
                    found = enlarge(i, pictures[i], config.reference_max_pixels)
                if found is not None:
                    larger[i] = found
                return found

            score = score_tokens if self.context.cache is None else self.context.cache.score
            place = place_of(self.pipe)
            selection = select_tokens(pictures, grids, config, shows_picture, score, trained, large, place)
            return replace(selection, seconds=preparing + selection.seconds)

        with self._meanwhile(choose, len(grids)) as chosen:
            tokens = make()
            total = sum(rows * columns for rows, columns in grids)
            if total != len(tokens):
                raise ValueError(
                    f"The pipeline made {len(tokens)} reference tokens, but the references account for {total}. A part "
                    "of it was replaced by one that works differently: call remove_sparse_context, or restore the "
                    "original part."
                )
            selection = chosen()
        self.select(selection)
        kept = _keep_sharp(tokens, grids, selection, larger)
        if encode_overviews is None or not selection.overviews:
            return kept
        coarse = encode_overviews(selection.overviews, tokens)
        promised = sum(overview.tokens for overview in selection.overviews.values())
        if len(coarse) != promised:
            raise ValueError(
                f"The pipeline made {len(coarse)} tokens of overviews that have {promised}. A part of it was replaced "
                "by one that works differently: pass overview=None, or restore the original part."
            )
        return kept.join(coarse)

    @contextmanager
    def _meanwhile(self, choose: Callable[[], Selection], references: int) -> Iterator[Callable[[], Selection]]:
        """Gives what waits for the answer of `choose`, which runs in a thread of its own from now on.

        On a CPU it runs once it is asked for, for there both would want the same cores. So does a selector of the
        user's own, which need not be safe for threads.
        """
        selectors = each_selector(self.context.config.selector, references)
        ours = all(selector is None or name_of(selector) is not None for selector in selectors)
        if not ours or not _has_accelerator(self.pipe):
            yield choose
            return
        with ThreadPoolExecutor(1) as thread:
            yield thread.submit(copy_context().run, choose).result

    def select(self, selection: Selection) -> None:
        """Remember what was kept."""
        self.selection = self.context.selection = selection

    def seen(self, name: str, value: object) -> object:
        """What the call sees of an attribute with this value."""
        replacement = self._replacements.get(name)
        return value if replacement is None else replacement(value)

    def __enter__(self) -> "Call":
        self.context.selection = None
        self.context.attach(self.pipe, self)
        with _lock:
            _running[id(self.pipe)] += 1
        self._token = _calls.set((*_calls.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        _calls.reset(self._token)
        self.closing.close()
        self.context.selection = self.selection  # which a call inside this one may have set to its own
        with _lock:
            _running[id(self.pipe)] -= 1
            if context_of(self.pipe) is None:
                _restore_class(self.pipe)


def place_of(pipe: Any) -> Place:
    """Where a model beside a pipeline runs: on its device, in the type of its transformer.

    Where that is of another kind, as fp8 is, the model has float32.
    """
    dtype = str(getattr(getattr(pipe, "transformer", None), "dtype", "")).removeprefix("torch.")
    return Place(str(pipe._execution_device), dtype if dtype in ("bfloat16", "float16") else "float32")


def _has_accelerator(pipe: Any) -> bool:
    """Whether a pipeline works on another device than the CPU."""
    device = getattr(pipe, "_execution_device", None)
    return device is not None and device.type != "cpu"


def _keep_sharp(
    tokens: ReferenceTokens, grids: Sequence[Grid], selection: Selection, larger: Mapping[int, Large]
) -> ReferenceTokens:
    """The sharp tokens of a selection: those of all references in their usual size, then those of larger pictures."""
    if not larger:
        return tokens.keep(selection.index, selection.into)
    ends = np.cumsum([rows * columns for rows, columns in grids])
    starts = [0, *ends[:-1]]
    usual = [kept.index + starts[i] for i, kept in enumerate(selection.references) if i not in larger]
    kept = tokens.keep(np.concatenate([np.zeros(0, np.int64), *usual]))
    for i, large in larger.items():
        index = selection.references[i].index
        if len(index):
            kept = kept.join(large_tokens(large, index, tokens.ids[..., starts[i] : ends[i], :], grids[i]))
    return kept


# The calls that are open where the code runs, in this thread or task, each inside the one before
_calls: ContextVar[tuple[Call, ...]] = ContextVar("sparse_context_calls", default=())
_running: Counter[int] = Counter()  # the id of a pipeline -> how many calls of it are open, in any thread
_lock = threading.Lock()


def _restore_class(pipe: Any) -> None:
    """Give `pipe` its class back, once no call is open that would miss what it sees."""
    if not _running[id(pipe)]:
        del _running[id(pipe)]
        if _is_sparse(type(pipe)):
            pipe.__class__ = type(pipe).__base__


def _is_sparse(cls: type) -> bool:
    return vars(cls).get("__deepcopy__") is _refuse_copy


def _refuse_copy(pipe: object, *args: object) -> NoReturn:
    raise TypeError(
        "A pipeline with Sparse Context cannot be copied whole or pickled, for its selectors and its cache stay with "
        "the process: call remove_sparse_context first, and apply it to both again."
    )


@cache
def _sparse(cls: Any) -> Any:
    """The class below `cls`, of the same name, whose objects are called as the context on them says."""

    @wraps(cls.__call__)
    def call_sparsely(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        context = context_of(pipe)
        if context is None:  # removed in the middle of another call, of which this one is to see nothing
            token = _calls.set(tuple(call for call in _calls.get() if call.pipe is not pipe))
            try:
                return cls.__call__(pipe, *args, **kwargs)
            finally:
                _calls.reset(token)
        with Call(pipe, context):
            return cls.__call__(pipe, *args, **kwargs)

    def see(pipe: object, name: str) -> object:
        value = cls.__getattribute__(pipe, name)
        for call in reversed(_calls.get()):
            if call.pipe is pipe:
                return call.seen(name, value)
        return value

    def copy_shallowly(pipe: Any) -> Any:
        twin = object.__new__(cls)
        vars(twin).update(vars(pipe))
        context = vars(twin).pop(ATTRIBUTE, None)
        if context is not None:
            install(twin, replace(context, selection=None))
        return twin

    @wraps(cls.__init__, assigned=())
    def make_plain(sparse: type, *args: Any, **kwargs: Any) -> Any:
        return cls(*args, **kwargs)  # `type(pipe)(...)` is a pipeline to which nothing was applied

    return type(
        cls.__name__,
        (cls,),
        {
            "__call__": call_sparsely,
            "__getattribute__": see,
            "__copy__": copy_shallowly,
            "__deepcopy__": _refuse_copy,
            "__reduce_ex__": _refuse_copy,
            "__new__": make_plain,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        },
    )
