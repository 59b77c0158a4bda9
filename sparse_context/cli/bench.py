"""`sparse-context bench`: the methods against each other, in seconds."""

from pathlib import Path
from typing import Annotated

import typer

from ..bench.shapes import SHAPES
from . import options

TURNS, MINUTES = 5, 2.5


def bench(
    model: options.Model = None,
    random_weights: Annotated[
        str | None, typer.Option(help=f"Random weights in the shape of a model, with no download: {', '.join(SHAPES)}.")
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            help="With --random-weights: number of double and single blocks to time, denoising alone. Required for "
            "all shapes but FLUX.2."
        ),
    ] = None,
    references: Annotated[
        list[int] | None, typer.Option(help="Number of references. Repeat it for several.", show_default="1 2 4")
    ] = None,
    keep: Annotated[
        list[float] | None, typer.Option(help="Keep ratio. Repeat it for several.", show_default="0.2")
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(help="Side of the output in pixels. Repeat it for several.", show_default="the model's, or 1024"),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Method to time. Repeat it for several.", show_default="all that the model supports"),
    ] = None,
    predict: Annotated[
        bool,
        typer.Option(help="Measure nothing: say what calls take, in tokens, FLOPs and memory. No weights are read."),
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option(help="With --predict: memory of the device in GB. Adds the largest keep that fits."),
    ] = None,
    cpu_offload: options.CpuOffload = None,
    turns: Annotated[int, typer.Option(help="Number of timed calls per method, after a warm-up.")] = TURNS,
    minutes: Annotated[
        float, typer.Option(help="Time budget in minutes; no new turn starts if it would run over.")
    ] = MINUTES,
    steps: options.Steps = None,
    dtype: options.Dtype = "auto",
    device: options.Device = None,
    output: Annotated[Path | None, typer.Option(help="Also write all figures as JSON into this file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also plot latency against references into this file (needs matplotlib).")
    ] = None,
    quality: Annotated[
        Path | None, typer.Option(help="JSON file of measured quality, to plot against latency with --plot.")
    ] = None,
) -> None:
    """Time the methods that make references cheaper, and compare each with what its FLOPs allow."""
    from ..images import check_output

    for needed, given in (("--memory", memory), ("--cpu-offload", cpu_offload)):
        if given is not None and not predict:
            raise ValueError(f"{needed} is for what is predicted: pass --predict too, or leave it out.")
    if predict and blocks is not None:
        raise ValueError("--blocks is for what is timed: leave it or --predict out.")
    for useless, given in (
        ("--plot", plot is not None),
        ("--quality", quality is not None),
        ("--turns", turns != TURNS),
        ("--minutes", minutes != MINUTES),
        ("--device", device is not None),
    ):
        if given and predict:
            raise ValueError(f"{useless} is for what is timed: leave it or --predict out.")
    if quality is not None and plot is None:
        raise ValueError("--quality is for the plot: pass --plot too, or leave it out.")
    options.check_distinct({"--output": output, "--plot": plot, "--quality": quality})
    if plot is not None:
        check_output(plot)
    options.hide_loading_bars()
    from ..bench.config import BenchConfig
    from ..bench.report import read_quality, summary
    from ..bench.run import run_bench

    config = BenchConfig(
        references=tuple(references or (1, 2, 4)),
        keep=tuple(keep or (0.2,)),
        size=tuple(size or ()),
        methods=None if not method else tuple(method),
        turns=turns,
        minutes=minutes,
        steps=steps,
    )
    if predict:
        from ..bench import predict as predicting

        rows, fits = predicting.predict(
            config,
            model=model,
            random_weights=random_weights,
            memory=memory,
            cpu_offload=cpu_offload,
            dtype=dtype,
            output=output,
        )
        print(predicting.summary(rows, fits, memory))
        if output is not None:
            print(f"wrote {output}")
        return
    figures = run_bench(
        config,
        model=model,
        random_weights=random_weights,
        blocks=blocks,
        dtype=dtype,
        device=device,
        output=output,
        plot_to=plot,
        quality=() if quality is None else read_quality(quality),
    )
    print(summary(figures))
    for path in (output, plot):
        if path is not None:
            print(f"wrote {path}")
