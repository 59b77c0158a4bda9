"""The methods of methods.py against each other, in one run: the same weights, references, steps and noise, in turns.

Each turn runs every method once in every setting, so that a machine that slows down slows all of them. The first turn
is the warm-up: there the peak of memory is read and tokens are counted, and its times do not count. A ratio is taken
within a turn, and what is reported is the median over the turns with the least and the greatest.

Beside each stands what the FLOPs allow (flops.py): `predicted`, how many times fewer they are than dense's, and the
share of it that was reached.
"""

import inspect
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..evaluation.plots import check_matplotlib
from ..generation import DTYPES, call_settings, find_device, load_pipeline, reference_sides
from ..images import save_picture
from ..mini.demo import read_examples
from ..preview import fit_reference
from ..result import make_result, write_result
from ..selection import SparseContextConfig
from .flops import Tokens, call_flops, passes
from .kinds import KINDS
from .methods import METHODS, Hosts, make_hosts, reference_tokens
from .shapes import Shape, build_pipeline, build_transformer, find_shape, shape_of, with_blocks
from .timing import Times, now, timed

TIMED = ("Flux2KleinPipeline", "Flux2Pipeline")
REPORTED = ("text", "encode", "selection", "denoise", "decode", "total")


@dataclass(frozen=True)
class BenchConfig:
    """What to measure: every method with every number of references, every keep that means something to it, every size.

    `references`: how many. `keep`: ratios in (0, 1). `size`: pixels a side of the output, and of the references where
    the model has no size of its own for these; none means the model's own. `methods`: names of `METHODS`, None for all
    that the model has; dense, which all are compared with, always comes along. `turns` after the warm-up; no further
    turn is begun that would end later than `minutes` after the start. `steps`: None means the model's own. Raises
    ValueError that names the value.
    """

    references: tuple[int, ...] = (1, 2, 4)
    keep: tuple[float, ...] = (0.2,)
    size: tuple[int, ...] = ()
    methods: tuple[str, ...] | None = None
    turns: int = 5
    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name, values in (("references", self.references), ("size", self.size)):
            for value in values:
                if value < 1:
                    raise ValueError(f"{name} is {value}: pass a number above 0.")
        for keep in self.keep:
            if not 0 < keep < 1:
                raise ValueError(f"keep is {keep}: pass a ratio above 0 and below 1.")
        for method in self.methods or ():
            if method not in METHODS:
                raise ValueError(f"method is {method!r}: choose among {', '.join(METHODS)}.")
        for name, number in (("turns", self.turns), ("steps", self.steps), ("minutes", self.minutes)):
            if number is not None and not number > 0:
                raise ValueError(f"{name} is {number}: pass a number above 0.")
        if self.methods is not None and "dense" not in self.methods:
            object.__setattr__(self, "methods", ("dense", *self.methods))

    def cells(self, methods: Sequence[str]) -> list[tuple[str, float | None]]:
        """(method, keep) of one setting, in the order in which they are run."""
        return [(m, keep) for m in methods for keep in (self.keep if METHODS[m].keeps else (None,))]


def bench(pipe: Any, pictures: Sequence[Image.Image], prompt: str, config: BenchConfig) -> dict[str, Any]:
    """Whole calls of `pipe`, a FLUX.2 klein or dev of any size; returns the figures.

    `pictures` are the references, used again from the first where there are too few. Where `pipe` has no text encoder,
    the prompt's embeddings are drawn, and encoding the text takes no time. Raises ValueError for what the model does
    not take.
    """
    if type(pipe).__name__ not in TIMED:
        raise ValueError(f"The model is a {type(pipe).__name__}; the benchmark takes {' and '.join(TIMED)}.")
    settings = call_settings(pipe)
    most, token = settings.get("max_references"), 2 * pipe.vae_scale_factor
    if most is not None and max(config.references) > most:
        raise ValueError(f"references is {max(config.references)}, and this model takes at most {most}: pass fewer.")
    sizes = config.size or (settings.get("height") or 1024,)
    for size in sizes:
        if size % token:
            raise ValueError(f"size is {size}: this model makes multiples of {token}.")
    hosts = make_hosts(pipe)
    methods = config.methods or [m for m in METHODS if hosts.kv is not None or not METHODS[m].kv]
    if hosts.kv is None and any(METHODS[method].kv for method in methods):
        raise ValueError(f"{type(pipe).__name__} has no pipeline that reuses keys and values: leave out kv, sparse_kv.")
    arguments = _arguments(pipe, settings, prompt, config.steps)
    steps = arguments["num_inference_steps"]
    groups = []
    for size in sizes:
        for count in config.references:
            chosen = [pictures[i % len(pictures)].convert("RGB") for i in range(count)]
            if settings.get("reference_size") is None:
                references = [picture.resize((size, size), Image.Resampling.LANCZOS) for picture in chosen]
            else:
                sides = reference_sides(settings["reference_size"], SparseContextConfig(), count)
                references = [fit_reference(*pair) for pair in zip(chosen, sides, strict=True)]
            groups.append((size, count, references))

    jobs, rows = [], []
    for size, count, references in groups:
        for method, keep in config.cells(methods):
            call = arguments | {"height": size, "width": size}
            row: dict[str, Any] = {"size": size, "references": count, "method": method, "keep": keep}

            def run(first: bool, row=row, references=references, call=call) -> Times:
                given = METHODS[row["method"]].prepare, references, 0.0 if row["keep"] is None else row["keep"]
                if not first:
                    return _call(hosts, *given, call)
                row["memory"] = {}
                seen: list[Tokens] = []
                watched = [watch_tokens(host.transformer, seen, row["size"] // token) for host in _hosts(hosts)]
                try:
                    times = _call(hosts, *given, call, row["memory"])
                finally:
                    for hook in watched:
                        hook.remove()
                row["tokens"] = asdict(seen[0])
                return times

            jobs.append(run)
            rows.append(row)
    turns = take_turns(jobs, config)
    for row, times in zip(rows, turns, strict=True):
        row["seconds"] = {name: [getattr(each, name) for each in times] for name in REPORTED}
    shape = shape_of(pipe.transformer, token, rows[0]["tokens"]["text"], steps)
    return {"turns": len(turns[0]), "steps": steps, "rows": compare(rows, shape)}


def bench_blocks(
    shape: Shape, blocks: int, device: torch.device, dtype: torch.dtype, config: BenchConfig
) -> dict[str, Any]:
    """Denoising alone, with `blocks` of each kind of block of a shape in place of all; returns the figures.

    A call is put together from its forwards: each is timed once a turn, and counts as often as the call runs it. What
    a method would do to pixels and to the VAE is not measured, so `sparse_cached` is no other than `sparse`, and merged
    and downscaled references, which have as many tokens, neither: they are left out. `extrapolated` is the median of
    denoising with as many blocks as the model has, had each the time of these; no such call was made. There is none
    where a model's blocks differ in what they cost. Raises ValueError for a method that the transformer does not have.
    """
    kind = KINDS[shape.kind]
    for method in config.methods or ():
        if METHODS[method].kv and not kind.kv:
            raise ValueError(f"method is {method!r}, and only FLUX.2 reuses keys and values: leave out kv, sparse_kv.")
    left_out = {"sparse_cached", "merged", "downscaled"}
    methods = [m for m in config.methods or METHODS if m not in left_out and (kind.kv or not METHODS[m].kv)]
    steps = config.steps or shape.steps
    few = replace(with_blocks(shape, blocks), steps=steps)
    transformer = build_transformer(shape, device, dtype, blocks).eval()
    runs: dict[tuple[str | None, Tokens], Callable[[], float]] = {}
    extracted: dict[Tokens, Any] = {}
    rows, needs = [], []
    for size in config.size or (1024,):
        if size % shape.token:
            raise ValueError(f"size is {size}: this model makes multiples of {shape.token}.")
        grid = (size // shape.token, size // shape.token)
        for count in config.references:
            for method, keep in config.cells(methods):
                kept = reference_tokens(method, [grid] * count, 0.0 if keep is None else keep)
                tokens = Tokens(shape.text, grid[0] * grid[1], kept)
                needed = [(each.mode, tokens, each.times) for each in passes(steps, tokens, METHODS[method].kv)]
                for mode, _, _ in needed:
                    runs.setdefault((mode, tokens), _forward(transformer, shape, tokens, mode, extracted))
                needs.append(needed)
                rows.append({"size": size, "references": count, "method": method, "keep": keep,
                             "tokens": asdict(tokens)})  # fmt: skip
    # The shortest is the warm-up for all: on a CPU the longest takes minutes
    shortest = min(runs, key=lambda run: run[1].total)
    warm = [lambda first, key=key: runs[key]() if not first or key == shortest or device.type == "cuda" else 0.0
            for key in runs]  # fmt: skip
    turns = dict(zip(runs, take_turns(warm, config), strict=True))
    whole = (shape.double_blocks + shape.single_blocks) / (few.double_blocks + few.single_blocks)
    for row, needed in zip(rows, needs, strict=True):
        counts = range(len(turns[shortest]))
        seconds = [sum(times * turns[mode, tokens][i] for mode, tokens, times in needed) for i in counts]
        row["seconds"] = {"denoise": seconds}
        if kind.alike:
            row["extrapolated"] = round(whole * median(seconds), 3)
    return {"turns": len(turns[shortest]), "steps": steps, "blocks": [few.double_blocks, few.single_blocks],
            "of": [shape.double_blocks, shape.single_blocks], "rows": compare(rows, few)}  # fmt: skip


def run_bench(
    config: BenchConfig,
    *,
    model: str | None = None,
    random_weights: str | None = None,
    blocks: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    output: Path | None = None,
    plot_to: Path | None = None,
    quality: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What `sparse-context bench` does: build or load the model, measure, print the table, write JSON and plot.

    Without `model` and `random_weights` the embedded model is measured. Returns the result record (result.py), in whose
    figures `took` are the seconds of it all, loading and the warm-up included. Raises ValueError for arguments that do
    not go together, before any work.
    """
    if random_weights is not None and model is not None:
        raise ValueError("A model and random-weights were given: choose one of the two.")
    if blocks is not None and random_weights is None:
        raise ValueError("blocks is for shapes: name one with random-weights.")
    if blocks is not None and blocks < 1:
        raise ValueError(f"blocks is {blocks}: pass a number above 0.")
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: choose auto, {', '.join(DTYPES)}.")
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"{output} cannot be written: the folder {output.parent} does not exist; make it first.")
    if output is not None and output.is_dir():
        raise ValueError(f"{output} is a folder: name a file in it.")
    if plot_to is not None:
        check_matplotlib()
    shape = None if random_weights is None else find_shape(random_weights)
    if shape is not None and blocks is None and shape.kind != "flux2":
        raise ValueError(f"random-weights is {random_weights!r}, of which only blocks can be timed: pass --blocks N.")
    where, start = find_device(device), time.perf_counter()
    kind = DTYPES.get(dtype, torch.bfloat16)
    example = next(e for e in read_examples() if len(e["references"]) == 4)
    try:
        if shape is not None and blocks is not None:
            figures = bench_blocks(shape, blocks, where, kind, config)
        else:
            pipe = (
                load_pipeline(model, dtype=dtype, device=device)
                if shape is None
                else build_pipeline(shape, where, kind)
            )
            kind = pipe.transformer.dtype
            if shape is not None and config.steps is None:
                config = replace(config, steps=shape.steps)
            figures = bench(pipe, example["references"], example["prompt"], config)
    except torch.OutOfMemoryError as error:
        raise ValueError("The device's memory ran out: choose a smaller shape or size, or --blocks 1.") from error
    figures["took"] = round(time.perf_counter() - start, 1)
    print(table(figures))
    turns = "1 turn" if figures["turns"] == 1 else f"{figures['turns']} turns"
    print(f"{turns} after the warm-up, in {figures['took']:.0f} s.")
    if blocks is not None:
        (double, single), of = figures["blocks"], figures["of"]
        print(f"Measured with {double} double and {single} single blocks of {of[0]} and {of[1]}.")
    record = {
        "model": model or random_weights or "embedded",
        "random_weights": shape is not None,
        **{k: v for k, v in asdict(config).items() if k != "steps"},
        "dtype": str(kind).removeprefix("torch."),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        "threads": torch.get_num_threads(),
    }
    result = make_result("bench", record, figures) if output is None else write_result(output, "bench", record, figures)
    if plot_to is not None:
        plot(figures, plot_to, quality)
    for written in (output, plot_to):
        if written is not None:
            print(f"wrote {written}")
    return result


def read_quality(path: Path) -> list[dict[str, Any]]:
    """Known quality from a JSON list of {"method", "keep", "references", "value", "metric"}; raises ValueError."""
    names: dict[str, Any] = {"method": str, "keep": int | float | None, "references": int, "value": int | float,
                             "metric": str}  # fmt: skip
    wanted = f"pass a JSON list of {{{', '.join(sorted(names))}}}"
    if not path.is_file():
        raise ValueError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: {wanted}.")
    try:
        points = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(points, list) or not all(
            isinstance(p, dict) and all(name in p and isinstance(p[name], kind) for name, kind in names.items())
            for p in points
        ):
            raise ValueError("it is no list of points")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): make it readable.") from error
    except ValueError as error:
        raise ValueError(f"{path} holds no quality figures: {wanted}.") from error
    return points


def take_turns(jobs: Sequence[Callable[[bool], Any]], config: BenchConfig) -> list[list[Any]]:
    """What each job gives in each turn after the warm-up. A job is told whether it is the warm-up."""
    start = time.perf_counter()
    results: list[list[Any]] = [[] for _ in jobs]
    with tqdm(total=len(jobs) * (1 + config.turns), desc="bench", unit="run") as bar:
        for turn in range(config.turns + 1):
            begun = time.perf_counter()
            for job, result in zip(jobs, results, strict=True):
                made = job(turn == 0)
                if turn:
                    result.append(made)
                bar.update()
            end = time.perf_counter()
            if turn and config.minutes is not None and 2 * end - begun - start > 60 * config.minutes:
                break
    return results


def compare(rows: list[dict[str, Any]], shape: Shape) -> list[dict[str, Any]]:
    """`rows`, whose `seconds` are lists with one entry a turn, with medians, ratios to dense and what FLOPs allow."""
    compared = []
    for row in rows:
        alike = [r for r in rows if (r["size"], r["references"]) == (row["size"], row["references"])]
        base = next(r for r in alike if r["method"] == "dense")
        ceiling = next((r for r in alike if r["method"] == "no_references"), None)
        faster = {
            p: _ratios(base["seconds"][p], row["seconds"][p]) for p in ("total", "denoise") if p in row["seconds"]
        }
        flops = [call_flops(shape, Tokens(**r["tokens"]), shape.steps, METHODS[r["method"]].kv) for r in (base, row)]
        predicted = flops[0] / flops[1]
        reached = faster["denoise"]["median"]
        compared.append(
            {
                **row,
                "seconds": {phase: _spread(times) for phase, times in row["seconds"].items()},
                "times faster": faster,
                "predicted": round(predicted, 3),
                "of predicted": round(reached / predicted, 3),
            }
        )
        if ceiling is not None:
            most = _ratios(base["seconds"]["denoise"], ceiling["seconds"]["denoise"])["median"]
            compared[-1]["of ceiling"] = round(reached / most, 3)
    return compared


def table(figures: dict[str, Any]) -> str:
    """The rows as text for a terminal."""
    head = (
        "size",
        "references",
        "method",
        "keep",
        "tokens",
        "end to end",
        "denoising",
        "predicted",
        "of it",
        "ceiling",
    )
    lines = [head]
    for row in figures["rows"]:
        faster, seconds = row["times faster"], row["seconds"]
        lines.append(
            (
                str(row["size"]), str(row["references"]), row["method"],
                "" if row["keep"] is None else f"{row['keep']:g}", str(row["tokens"]["references"]),
                *(f"{seconds[p]['median']:.2f} s {faster[p]['median']:.2f}x" if p in faster else ""
                  for p in ("total", "denoise")),
                f"{row['predicted']:.2f}x", f"{row['of predicted']:.0%}",
                f"{row['of ceiling']:.0%}" if "of ceiling" in row else "",
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def plot(figures: dict[str, Any], path: Path, quality: Sequence[dict[str, Any]] = ()) -> None:
    """Draw latency against references, a line for each method and keep; and what `quality` knows, against speed.

    `quality` has {"method", "keep", "references", "value", "metric"} for each point that is known. With one number of
    references there is no line to draw, and quality stands alone. Raises ValueError where matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    rows = figures["rows"]
    phase = "total" if "total" in rows[0]["seconds"] else "denoise"
    sizes = sorted({row["size"] for row in rows})
    known = {(q["method"], q["keep"], q["references"]): q for q in quality}
    points = [(row, known[key]["value"]) for row in rows
              if (key := (row["method"], row["keep"], row["references"])) in known]  # fmt: skip
    counts = sorted({row["references"] for row in rows})
    sizes = [] if points and len(counts) == 1 else sizes
    figure = Figure(figsize=(6.4 * (len(sizes) + bool(points)), 4.4), layout="constrained")
    axes = figure.subplots(1, len(sizes) + bool(points), squeeze=False)[0]
    lines = sorted(
        {(row["method"], row["keep"]) for row in rows}, key=lambda each: (list(METHODS).index(each[0]), -(each[1] or 0))
    )
    colours = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(method for method, _ in lines))}
    keeps = sorted({keep for _, keep in lines if keep is not None}, reverse=True)
    styles = {keep: ("-", "--", ":", "-.")[i % 4] for i, keep in enumerate(keeps)} | {None: "-"}
    for axis, size in zip(axes, sizes, strict=False):
        for method, keep in lines:
            of = [r for r in rows if (r["method"], r["keep"], r["size"]) == (method, keep, size)]
            medians = [row["seconds"][phase]["median"] for row in of]
            spread = [[m - row["seconds"][phase]["min"] for m, row in zip(medians, of, strict=True)],
                      [row["seconds"][phase]["max"] - m for m, row in zip(medians, of, strict=True)]]  # fmt: skip
            name = _line(method, keep)
            axis.errorbar([row["references"] for row in of], medians, spread, label=name, marker="o", capsize=3,
                          color=colours[method], linestyle=styles[keep])  # fmt: skip
        axis.set(
            xlabel="references",
            ylabel=f"{'call' if phase == 'total' else 'denoising'}, seconds",
            title=f"{size} x {size} pixels",
            ylim=(0, None),
            xticks=counts,
        )
        axis.legend(fontsize="small")
    if points:
        compared = all("times faster" in row for row, _ in points)  # with dense, if that was measured
        for i, (row, value) in enumerate(points):
            at = row["times faster" if compared else "seconds"][phase]["median"], value
            name = _line(row["method"], row["keep"])
            name += "" if len(counts) == 1 else f", {row['references']} references"
            axes[-1].scatter(*at, color=colours[row["method"]])
            axes[-1].annotate(name, at, (5, (4, -11)[i % 2]), textcoords="offset points", fontsize="small")
        axes[-1].margins(y=0.1)
        axes[-1].set(
            xlim=(0, 1.35 * axes[-1].dataLim.x1),  # room for the last one's name
            xlabel="times faster than dense" if compared else "seconds",
            ylabel=next(iter(known.values()))["metric"],
            title="quality against speed",
        )
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    save_picture(Image.open(drawn).convert("RGB"), path)


def watch_tokens(transformer: Any, seen: list[Tokens], side: int) -> Any:
    """A hook that adds to `seen` what each forward gets, beside `side` x `side` tokens of the output."""

    def record(module: Any, args: tuple, kwargs: dict) -> None:
        got = kwargs["hidden_states"].shape[1] - side * side
        seen.append(Tokens(kwargs["encoder_hidden_states"].shape[1], side * side, got))

    return transformer.register_forward_pre_hook(record, with_kwargs=True)


def _hosts(hosts: Hosts) -> list[Any]:
    return [host for host in (hosts.plain, hosts.kv) if host is not None]


def _arguments(pipe: Any, settings: dict, prompt: str, steps: int | None) -> dict[str, Any]:
    """What every call is given, whatever the method."""
    arguments = settings | {"num_inference_steps": steps or settings.get("num_inference_steps") or 28}
    if getattr(pipe.config, "is_distilled", False):
        arguments["guidance_scale"] = 1.0
    if pipe.text_encoder is not None:
        return arguments | {"prompt": prompt}
    config = pipe.transformer.config
    embeds = torch.randn(1, 512, config.joint_attention_dim, generator=torch.Generator().manual_seed(0))
    return arguments | {"prompt_embeds": embeds.to(pipe.transformer.device, pipe.transformer.dtype)}


def _call(
    hosts: Hosts, prepare: Callable, references: list, keep: float, call: dict, peaks: dict | None = None
) -> Times:
    """Time one call, with what the method does before it."""
    device = hosts.plain._execution_device
    start = now(device)
    pipe, given = prepare(hosts, references, keep)
    prepared = now(device) - start
    taken = inspect.signature(type(pipe).__call__).parameters
    arguments = {name: value for name, value in call.items() if name in taken}
    with timed(pipe, peaks) as times:
        pipe(image=given or None, generator=torch.Generator().manual_seed(0), **arguments)
    times.total += prepared
    return times


def _forward(
    transformer: Any, shape: Shape, tokens: Tokens, mode: str | None, extracted: dict[Tokens, Any]
) -> Callable[[], float]:
    """A function that runs one forward and gives its seconds. "extract" leaves in `extracted` what "cached" takes."""
    arguments, device = KINDS[shape.kind].arguments, transformer.device

    @torch.no_grad()
    def run() -> float:
        given = arguments(transformer, shape, tokens, mode)
        if mode == "cached":
            given["kv_cache"] = extracted[tokens]
        start = now(device)
        made = transformer(**given, return_dict=False)
        seconds = now(device) - start
        if mode == "extract":
            extracted[tokens] = made[1]
        elif mode == "cached":
            extracted.pop(tokens).clear()
        return seconds

    return run


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": round(median(values), 5), "min": round(min(values), 5), "max": round(max(values), 5)}


def _ratios(base: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    return _spread([b / max(o, 1e-9) for b, o in zip(base, other, strict=True)])


def _line(method: str, keep: float | None) -> str:
    return method.replace("_", " ") if keep is None else f"{method.replace('_', ' ')}, keep {keep:g}"
