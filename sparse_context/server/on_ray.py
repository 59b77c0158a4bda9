"""The server by Ray Serve: the same front, and behind it replicas with a pipeline each, on one machine or many.

The front knows no model. It has the queue, the bounds and all that clients see, and gives each call to a replica that
is free. A replica that dies costs a retry of the call that it was at, which is safe, for a request has its seed.

The front is this process (`run`), or, where a Serve config file is deployed to a cluster, a deployment too (`app`).
"""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..batch.cluster import check_gpus, connected, say_what_is_missing
from ..families import FAMILIES
from ..images import save_text
from ..pipelines.embedded import WEIGHTS
from ..pipelines.engine import Engine, Generation
from ..pipelines.errors import Cancelled, GenerationError
from ..pipelines.hub import class_name_of, one_line
from ..pipelines.settings_file import Settings as PipelineSettings
from ..pipelines.settings_file import parse_settings
from ..pipelines.spec import ModelSpec, Request, with_whole_paths
from ..pipelines.steps import Draw, Preview
from . import KEY_VARIABLE
from .app import Server, wrap
from .jobs import wants_partial
from .metrics import Metrics
from .settings import Settings
from .worker import Worker, count_tokens

APPLICATION, REPLICA = "sparse-context", "replica"

TRIALS = 4
"""How often a call is tried whose replica dies."""

HEALTH_SECONDS = 2.0
"""How often Ray looks after a replica."""

log = logging.getLogger("sparse_context.server")


@dataclass(frozen=True)
class Replicas:
    """How many replicas there are, and what each takes. Raises ValueError for numbers that cannot be.

    most: with it, Ray has between `count` and so many, by the load. threads: of each on a CPU, and the CPUs that Ray
    counts for it. gpus: of each; a part of 1 is shared. cache: MiB of each for pictures that come again; 0: none.
    """

    count: int = 1
    most: int | None = None
    threads: int = 1
    gpus: float = 0.0
    cache: int = 256

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"replicas is {self.count}: pass 1 or more.")
        if self.most is not None and self.most < self.count:
            raise ValueError(f"max_replicas is {self.most}, and replicas {self.count}: pass as many or more.")
        check_gpus(self.gpus)

    @property
    def largest(self) -> int:
        """The most there can be."""
        return self.count if self.most is None else self.most


@dataclass(frozen=True)
class Counted(Generation):
    """A generation, and the tokens of its prompt and of its picture."""

    counts: tuple[int, int] = (0, 0)


class Replica:
    """One pipeline in a process that Ray keeps alive. It makes one call at a time."""

    def __init__(self, spec: ModelSpec, threads: int, cache: int) -> None:
        import torch

        from ..cache import ReferenceCache
        from ..pipelines.load import hide_loading_bars

        torch.set_num_threads(threads)
        hide_loading_bars()
        self.engine = Engine(spec, bar=False, cache=ReferenceCache(cache * 2**20) if cache else None)
        self.failure: Exception | None = None
        self._asked_in_vain = False
        try:
            self.engine.warm_up()
            self.engine.load()
        except Exception as error:  # which Ray would try again, and wrap in its own words
            self.failure = _plain(error)

    async def why_not(self) -> Exception | None:
        """Why the model does not load; None once it can make calls."""
        return self.failure

    async def check_health(self) -> None:
        """Raise where calls come to a replica whose model did not load: Ray then starts another one in its place."""
        if self._asked_in_vain:
            raise RuntimeError(f"the model does not load here: {self.failure}")

    async def make(self, requests: Sequence[Request], partials: Sequence[int]) -> AsyncIterator[tuple]:
        """Answer requests by one call: ("step", step, steps, pictures on the way or None) after each denoise step, at
        last ("made", generations), ("failed", error), or ("unfit", reason) where the model did not load.

        It stops before the next step once whoever listens is gone.
        """
        if self.failure is not None:
            self._asked_in_vain = True
            yield "unfit", str(self.failure)
            return
        loop, told, gone = asyncio.get_running_loop(), asyncio.Queue[tuple](), threading.Event()

        def tell(*what: Any) -> None:
            loop.call_soon_threadsafe(told.put_nowait, what)

        def preview(step: int, steps: int, draw: Draw) -> None:
            wanted = any(wants_partial(each, step, steps) for each in partials)
            tell("step", step, steps, draw() if wanted else None)

        def work() -> None:
            looks: dict[str, Any] = {"preview": preview} if any(partials) else {"progress": _told_of(tell)}
            try:
                generations = self.engine.together(requests, cancel=gone, **looks)
                pipe = self.engine.pipe(requests[0].config)
                pairs = zip(requests, generations, strict=True)
                tell("made", [_light(each, count_tokens(pipe, request.prompt, each)) for request, each in pairs])
            except Exception as error:
                tell("failed", _plain(error))

        working = loop.run_in_executor(None, work)
        try:
            while (item := await told.get())[0] == "step":
                yield item
            yield item
        finally:
            gone.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(working)


def _told_of(tell: Callable[..., None]) -> Callable[[int, int], None]:
    return lambda step, steps: tell("step", step, steps, None)


def _light(generation: Generation, counts: tuple[int, int]) -> Counted:
    """A generation without the pictures of its references, which are many times as large as all else of it."""
    selection = generation.selection
    if selection is not None:
        references = tuple(replace(kept, picture=None) for kept in selection.references)
        selection = replace(selection, references=references)
    return Counted(generation.image, selection, generation.times, counts=counts)


def _plain(error: Exception) -> Exception:
    """An error that any process can unpickle: of its kind as far as the front tells kinds apart, with its words."""
    kind = next((each for each in (Cancelled, GenerationError, ValueError) if isinstance(error, each)), None)
    if kind is None:
        log.exception("a call failed")
        return RuntimeError(str(error))
    return kind(str(error))


class UnfitError(Exception):
    """A replica was asked whose model did not load."""


class RayWorker(Worker):
    """Gives jobs to replicas, as many at a time as there may be replicas."""

    def __init__(
        self, engine: Engine, settings: Settings, metrics: Metrics, *, handle: Any, replicas: Replicas
    ) -> None:
        """handle: of the deployment of `Replica`. engine: names the model; it is never loaded."""
        super().__init__(engine, settings, metrics, threads=replicas.largest)
        self._handle = handle

    def check(self, request: Request) -> None:
        """Nothing: a replica looks at it in its turn."""

    def _load(self) -> None:
        failure = self._handle.why_not.remote().result()
        if failure is not None:
            raise failure
        model = self.engine.spec.model
        family = FAMILIES[class_name_of(str(WEIGHTS) if model is None else model)]
        self.batch = self.settings.batch or 1 if family.batch else 1
        self.ready = True
        log.info("ready, with %d calls at a time", len(self._threads))

    def _make(
        self, requests: Sequence[Request], partials: Sequence[int], cancel: Callable[[], bool], preview: Preview
    ) -> list[Generation]:
        from ray.exceptions import RayActorError

        reached = 0  # the last step that was told of, which a retry does not tell again

        def told(step: int, steps: int, draw: Draw) -> None:
            nonlocal reached
            if step > reached:
                reached = step
                preview(step, steps, draw)

        deaths, end = 0, time.monotonic() + self.settings.deadline
        while deaths < TRIALS:
            try:
                return self._ask(requests, partials, cancel, told)
            except RayActorError:
                log.warning("a replica died, and its call is made again")
                deaths += 1
            except UnfitError as error:
                log.error("a replica's model does not load, and its call waits for another replica: %s", error)
                if time.monotonic() > end:
                    raise GenerationError("No replica loads the model.") from error
                time.sleep(HEALTH_SECONDS)  # by which Ray may have seen it, too
            self.metrics.retried.inc()
        raise GenerationError(f"{TRIALS} replicas died at it, one after the other.")

    def _ask(
        self, requests: Sequence[Request], partials: Sequence[int], cancel: Callable[[], bool], preview: Preview
    ) -> list[Generation]:
        if cancel():
            raise Cancelled("The call was cancelled.")
        answers = self._handle.options(stream=True).make.remote(list(requests), list(partials))
        for kind, *said in answers:
            if kind == "made":
                return said[0]
            if kind == "failed":
                raise said[0]
            if kind == "unfit":
                raise UnfitError(said[0])
            if cancel():
                answers.cancel()
                raise Cancelled("The call was cancelled.")
            step, steps, pictures = said
            if pictures is not None:
                preview(step, steps, _drawn(pictures))
        raise GenerationError("A replica ended a call without a word.")

    def _count(self, request: Request, prompt: str, generation: Generation) -> tuple[int, int]:
        assert isinstance(generation, Counted)
        return generation.counts


def _drawn(pictures: list[Image.Image]) -> Draw:
    return lambda: pictures


# How it is started ----------------------------------------------------------------------------------------------------


def deploy(spec: ModelSpec, replicas: Replicas, deadline: float) -> Any:
    """The deployment of `Replica`, bound to its arguments, for a connected Ray."""
    from ray import serve

    scale: dict[str, Any] = {"num_replicas": replicas.count}
    if replicas.most is not None:
        bounds = {"min_replicas": replicas.count, "max_replicas": replicas.most, "target_ongoing_requests": 1}
        scale = {"autoscaling_config": bounds}
    deployment = serve.deployment(Replica).options(
        name=REPLICA,
        max_ongoing_requests=1,  # a pipeline makes one call at a time
        ray_actor_options={"num_cpus": replicas.threads, "num_gpus": replicas.gpus},
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=deadline,
        **scale,
    )
    return deployment.bind(spec, replicas.threads, replicas.cache)


def run(spec: ModelSpec, settings: Settings, port: int, replicas: Replicas) -> None:
    """Serve from this process, with replicas in the cluster that RAY_ADDRESS names, or on this machine.

    Raises what `server.run.run` raises, and GenerationError where Ray starts no replica.
    """
    from .run import check_port
    from .run import run as run_front

    check_port(port)
    spec, settings = _for_other_folders(spec, settings)
    with connected(cpus=replicas.largest * replicas.threads + 1) as ray:
        from ray import serve

        say_what_is_missing(ray, replicas.count, replicas.threads, replicas.gpus)

        serve.start(proxy_location="Disabled")  # the front is here
        try:
            bound = deploy(spec, replicas, settings.deadline)
            try:
                handle = serve.run(bound, name=APPLICATION, route_prefix=None)
            except RuntimeError as error:
                raise GenerationError(f"Ray started no replica: {one_line(error)}.") from error
            run_front(Engine(spec), settings, port, partial(RayWorker, handle=handle, replicas=replicas))
        finally:
            serve.shutdown()


def _for_other_folders(spec: ModelSpec, settings: Settings) -> tuple[ModelSpec, Settings]:
    """What says the same to a process in another folder."""
    return spec.with_whole_paths(), replace(settings, config=with_whole_paths(settings.config))


def write_config(path: Path, spec: ModelSpec, settings: Settings, port: int, replicas: Replicas) -> None:
    """Write a Serve config file, for `serve deploy` to a cluster. It listens where `settings` says: on loopback unless
    told otherwise, where Serve's own files listen everywhere. An API key is not in it: the front asks its environment.
    """
    import yaml

    from .run import check_port

    check_port(port)
    spec, settings = _for_other_folders(spec, settings)
    args = {
        "model": asdict(spec),
        "keep": PipelineSettings(request=Request("", config=settings.config)).to_dict(),
        "server": {
            key: value
            for key, value in vars(settings).items()
            if key not in ("config", "api_key") and value is not None
        },
        "replicas": asdict(replicas),
    }
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "sparse_context.server.on_ray:app",
        "args": args,
    }
    config = {"http_options": {"host": settings.host, "port": port}, "applications": [application]}
    save_text(yaml.safe_dump(config, sort_keys=False), path)


def app(args: dict[str, Any]) -> Any:
    """The application of a Serve config file, as `write_config` wrote it."""
    from ray import serve

    spec, replicas = ModelSpec(**args["model"]), Replicas(**args["replicas"])
    config = parse_settings(args["keep"]).request.config

    def build() -> Any:
        key = os.environ.get(KEY_VARIABLE, "").strip() or None
        settings = Settings(**args["server"], config=config, api_key=key)
        handle = serve.get_deployment_handle(REPLICA, APPLICATION)
        return wrap(Server(Engine(spec), settings, partial(RayWorker, handle=handle, replicas=replicas)))

    front = serve.deployment(serve.ingress(build)()).options(
        name="front", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0}
    )
    return front.bind(deploy(spec, replicas, args["server"]["deadline"]))
