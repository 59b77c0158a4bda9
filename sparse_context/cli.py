"""The command `sparse-context`: options in, one call of the work below, results out. No logic lives here.

Bad input is one sentence on stderr and exit code 2; nothing is written then. Heavy imports happen inside the commands.
"""

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bench.shapes import SHAPES

if TYPE_CHECKING:
    from .config import SparseContextConfig

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Reference-conditioned image generation with a fraction of the reference tokens.",
)

Keep = Annotated[
    list[str] | None,
    typer.Option(
        help="Ratio (0.2; 1 is all), count (400) or auto; repeat it for one per reference.", show_default="0.2"
    ),
]
Selector = Annotated[
    list[str] | None,
    typer.Option(
        help="auto, a name (random, uniform, edges, detail, saliency, subject, contrast, mask) or a blend "
        "(saliency=0.7,edges=0.3); repeat it for one per reference.",
        show_default="auto",
    ),
]
Task = Annotated[str, typer.Option(help="edit, global, subject or auto: decides what the selector does not.")]
Mask = Annotated[
    list[Path] | None,
    typer.Option(help="A picture of the reference's size, white where to keep; one per reference, in order."),
]
Coverage = Annotated[float | None, typer.Option(help="Share of the kept tokens spread evenly.", show_default="by task")]
Merge = Annotated[float, typer.Option(help="Share of the kept tokens that are averages of the others, 0 to 1.")]
Share = Annotated[
    str, typer.Option(help="Of one ratio or count. equal: the same for each reference. joint: they compete for it.")
]
Lora = Annotated[
    str | None,
    typer.Option(
        help="A LoRA for this model, as safetensors, or the word none.", show_default="the model's own, if it has one"
    ),
]
LoraScale = Annotated[float, typer.Option(help="How much of the LoRA to take: 0.5 takes half of what it changes.")]
KV = Annotated[
    bool, typer.Option("--kv", help="References go through the model once (FLUX.2 klein, with a LoRA of train --kv).")
]
Floor = Annotated[int, typer.Option(help="Fewest tokens of each reference, as far as a count holds them.")]
ConfigName = Annotated[str | None, typer.Option(help="Of a data set that has several.")]
Split = Annotated[str, typer.Option(help="Of a data set.")]
ImageColumn = Annotated[str, typer.Option(help="The picture to be made.")]
CondImageColumn = Annotated[str, typer.Option(help="The reference, or a list of them.")]
CaptionColumn = Annotated[str, typer.Option(help="The prompt.")]


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What to make of the references.")],
    image: Annotated[list[Path] | None, typer.Option(help="A reference; repeat it for several, in order.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub id.", show_default="the embedded model")
    ] = None,
    keep: Keep = None,
    selector: Selector = None,
    task: Task = "auto",
    mask: Mask = None,
    coverage: Coverage = None,
    merge: Merge = 0.0,
    share: Share = "equal",
    floor: Floor = 1,
    output: Annotated[Path, typer.Option(help="Where the picture goes: .png, .jpg or .webp.")] = Path("out.png"),
    show_tokens: Annotated[Path | None, typer.Option(help="Also draw which tokens were kept.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Also run dense; both pictures side by side.")] = None,
    inpaint: Annotated[
        Path | None, typer.Option(help="For inpainting models: a mask of the first picture, white where to paint.")
    ] = None,
    lora: Lora = None,
    lora_scale: LoraScale = 1.0,
    kv: KV = False,
    seed: Annotated[int, typer.Option(help="Of the image noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoise steps.", show_default="the model's")] = None,
    height: Annotated[int | None, typer.Option(help="Of the output, in pixels.", show_default="the model's")] = None,
    width: Annotated[int | None, typer.Option(help="Of the output, in pixels.", show_default="the model's")] = None,
    guidance_scale: Annotated[float | None, typer.Option(show_default="the model's")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="the best")] = None,
    cpu_offload: Annotated[str | None, typer.Option(help="model or group.", show_default="none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Make a picture from references and a prompt, with a fraction of the reference tokens."""
    from .images import open_mask, open_picture, save_picture

    outputs = [path for path in (output, show_tokens, compare) if path is not None]
    _check_outputs(outputs, [*(image or []), *(mask or []), *([inpaint] if inpaint else [])])
    if len({os.path.normcase(path.resolve()) for path in outputs}) < len(outputs):
        raise ValueError("Two of --output, --show-tokens and --compare name the same file: give each its own.")
    references = [open_picture(path) for path in image or []]
    if show_tokens is not None and not references:
        raise ValueError("--show-tokens draws on the references, but there are none: pass --image.")
    config = _config(keep, selector, task, coverage, merge, share, floor, mask, references)

    if inpaint is not None and not references:
        raise ValueError("--inpaint says where to paint in the first reference, but there is none: pass --image.")
    paint_mask = None if inpaint is None else open_mask(inpaint, references[0].size)

    _hide_loading_bars()
    from .config import SparseContextConfig
    from .pipelines.engine import generate
    from .pipelines.load import load_pipeline
    from .pipelines.lora_file import NO_LORA, check_lora_scale
    from .pipelines.settings import check_call, check_references
    from .preview import draw_selection, label, side_by_side

    check_references(model, len(references), inpaint is not None)
    check_lora_scale(lora_scale)
    check_call(prompt, seed, steps, height, width, guidance_scale)
    everything = SparseContextConfig(keep=1.0)
    own = model is None and lora is None and not kv  # the embedded model's adapter, which is for dropped tokens

    def load(config: SparseContextConfig):
        without = own and config.keeps_all
        return load_pipeline(
            model,
            dtype=dtype,
            device=device,
            cpu_offload=cpu_offload,
            lora=NO_LORA if without else lora,
            lora_scale=1.0 if without else lora_scale,
            kv=kv,
        )

    pipe = load(config)
    whole = load(everything) if own and compare is not None else pipe

    def run(pipe: Any, config: SparseContextConfig, steps: int | None = steps):
        return generate(
            pipe,
            references,
            prompt,
            config,
            seed=seed,
            steps=steps,
            height=height,
            width=width,
            guidance_scale=guidance_scale,
            inpaint=paint_mask,
        )

    if compare is not None:  # a first call pays for more than itself, so neither of the two is one
        for one, own_config in ((pipe, config), (whole, everything)):
            one.set_progress_bar_config(disable=True)
            run(one, own_config, steps=1)
            one.set_progress_bar_config(disable=False)
        pipe.set_progress_bar_config(desc="kept tokens")
    result = run(pipe, config)
    dense = None
    if compare is not None:
        whole.set_progress_bar_config(desc="all tokens")
        dense = run(whole, everything)

    pictures = {output: result.image}
    if show_tokens is not None and result.selection is not None:
        pictures[show_tokens] = draw_selection(result.selection)
    if compare is not None and dense is not None:
        sheet = [
            label(dense.image, f"all tokens, {dense.times.total:.2f} s"),
            label(result.image, f"{_kept(result)}, {result.times.total:.2f} s"),
        ]
        pictures[compare] = side_by_side(sheet)
    for path, picture in pictures.items():
        save_picture(picture, path)
    if as_json:
        report = {"output": str(output), **result.to_dict()}
        if dense is not None:
            report["dense"] = dense.to_dict()
        print(json.dumps(report, indent=2))
    else:
        print(result.selection or "no references")
        print(f"took {result.times}")
        if dense is not None:
            print(f"dense {dense.times}: {dense.times.total / result.times.total:.2f}x the time")
        print(f"wrote {', '.join(map(str, outputs))}")


@app.command()
def select(
    images: Annotated[list[Path], typer.Argument(help="The references.")],
    keep: Keep = None,
    selector: Selector = None,
    task: Task = "auto",
    mask: Mask = None,
    coverage: Coverage = None,
    merge: Merge = 0.0,
    share: Share = "equal",
    floor: Floor = 1,
    token: Annotated[
        int,
        typer.Option(
            help="Pixels a side of a token: 16 for FLUX; 8 for the embedded model, which scales what it is given.",
        ),
    ] = 16,
    output: Annotated[Path, typer.Option(help="Where the drawing goes.")] = Path("tokens.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show which tokens would be kept, with no model loaded."""
    from .images import open_picture, save_picture
    from .preview import draw_selection, select_pictures

    if not 1 <= token <= 256:
        raise ValueError(f"token is {token}: pass its pixels a side, from 1 to 256.")
    _check_outputs([output], [*images, *(mask or [])])
    references = [open_picture(path) for path in images]
    config = _config(keep, selector, task, coverage, merge, share, floor, mask, references)
    selection = select_pictures(references, config, token)
    save_picture(draw_selection(selection), output)
    print(json.dumps(selection.to_dict(), indent=2) if as_json else f"{selection}\nwrote {output}")


@app.command()
def train(
    data: Annotated[str, typer.Option(help="JSONL manifest, folder of a data set, or hub name.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub id.", show_default="the embedded model")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Checkpoints, log, validation pictures and the result.")] = Path(
        "sparse-context-lora"
    ),
    check_data: Annotated[bool, typer.Option("--check-data", help="Name every bad row, and train nothing.")] = False,
    dataset_config_name: ConfigName = None,
    split: Split = "train",
    image_column: ImageColumn = "image",
    cond_image_column: CondImageColumn = "references",
    caption_column: CaptionColumn = "prompt",
    resolution: Annotated[int, typer.Option(help="Larger outputs are scaled down to so many pixels a side.")] = 512,
    reference_resolution: Annotated[
        int | None, typer.Option(help="The same for references.", show_default="as --resolution")
    ] = None,
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 4,
    lora_alpha: Annotated[float, typer.Option(help="Scale of the LoRA, times 1 / rank.")] = 4,
    lora_layers: Annotated[
        str | None, typer.Option(help="Modules with a LoRA, by commas.", show_default="attention and fused MLPs")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights of the transformer, no LoRA.")] = False,
    kv: Annotated[bool, typer.Option("--kv", help="Train for Flux2KleinKVPipeline.")] = False,
    keep_min: Annotated[float, typer.Option(help="Smallest keep ratio; they are log-uniform.")] = 0.05,
    keep_max: Annotated[float, typer.Option(help="Largest keep ratio.")] = 1.0,
    dense: Annotated[float, typer.Option(help="Share of sets that keep all tokens.")] = 0.1,
    drop_mix: Annotated[
        str | None, typer.Option(help="Kinds of dropping: random=0.5,blobs=0.5 ...", show_default="see the docs")
    ] = None,
    coverage: Annotated[
        list[float] | None,
        typer.Option(help="Share spread evenly; repeat it, and batches draw one.", show_default="0 and 0.1"),
    ] = None,
    merge: Annotated[
        list[float] | None,
        typer.Option(help="Share of averages of the rest; repeat it, and batches draw one.", show_default="0"),
    ] = None,
    subsets: Annotated[int, typer.Option(help="Sets of kept tokens for each batch, averaged in one update.")] = 1,
    caption_dropout: Annotated[float, typer.Option(help="Share of prompts that are emptied.")] = 0.0,
    distillation: Annotated[float, typer.Option(help="Share of the loss against the dense base's answer.")] = 0.0,
    preservation: Annotated[
        float, typer.Option(help="Times that batches with all tokens count, which then meet the base's answer alone.")
    ] = 0.0,
    focus: Annotated[float, typer.Option(help="Extra weight of what lies inside a sample's mask.")] = 0.0,
    weighting_scheme: Annotated[str, typer.Option(help="Noise levels: logit_normal or none.")] = "logit_normal",
    shift: Annotated[
        float | None, typer.Option(help="Of noise levels towards noise.", show_default="the scheduler's")
    ] = None,
    max_train_steps: Annotated[int, typer.Option(help="Updates of the weights.")] = 1000,
    train_batch_size: Annotated[int, typer.Option(help="Samples a batch and process.")] = 1,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches an update.")] = 1,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, slower.")] = (
        False
    ),
    learning_rate: Annotated[float, typer.Option()] = 1e-4,
    muon_learning_rate: Annotated[
        float | None, typer.Option(help="Muon's, on the matrices of the blocks.", show_default="AdamW takes those too")
    ] = None,
    lr_scheduler: Annotated[
        str, typer.Option(help="constant, constant_with_warmup, linear, cosine or trapezoid.")
    ] = "constant",
    lr_warmup_steps: Annotated[int, typer.Option()] = 100,
    adam_weight_decay: Annotated[float, typer.Option()] = 1e-4,
    max_grad_norm: Annotated[float, typer.Option()] = 1.0,
    ema: Annotated[float, typer.Option(help="Decay of the average that the result is made of.")] = 0.0,
    mixed_precision: Annotated[
        str | None,
        typer.Option(help="no or bf16.", show_default="bf16 on an accelerator; accelerate launch's choice under it"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the frozen weights: auto, bfloat16 or float32.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    checkpointing_steps: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 500,
    checkpoints_total_limit: Annotated[int, typer.Option(help="Checkpoints that are kept.")] = 2,
    resume: Annotated[str | None, typer.Option(help="latest: continue the run in --output-dir.")] = None,
    validation_data: Annotated[str | None, typer.Option(help="As --data; its first samples are drawn.")] = None,
    validation_split: Annotated[
        str | None, typer.Option(help="Of --validation-data, if it is a data set.", show_default="as --split")
    ] = None,
    validation_steps: Annotated[
        int, typer.Option(help="Updates between validation pictures; the last has one too. 0: it alone.")
    ] = 500,
    validation_keep: Annotated[float, typer.Option(help="Keep ratio of the sparse one of them.")] = 0.2,
    num_validation_images: Annotated[int, typer.Option(help="How many samples are drawn.")] = 4,
    dataloader_num_workers: Annotated[
        int, typer.Option(help="Processes that open pictures and choose tokens ahead of the steps; 0: a thread.")
    ] = 0,
    cache_latents: Annotated[bool, typer.Option("--cache-latents", help="Keep latents on disk.")] = False,
    cache_text: Annotated[bool, typer.Option("--cache-text", help="Keep encoded prompts on disk.")] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Where.", show_default="OUTPUT_DIR/cache")] = None,
    report_to: Annotated[str | None, typer.Option(help="tensorboard.", show_default="log.jsonl alone")] = None,
) -> int:
    """Fine-tune with dropped reference tokens: a LoRA, or all weights. Several processes: accelerate launch -m
    sparse_context.training, with the same options."""
    source = _source(dataset_config_name, split, image_column, cond_image_column, caption_column)
    if check_data:
        from .pipelines.settings import most_references
        from .samples import check_samples

        problems = check_samples(data, most_references=most_references(model), **source)
        print("\n".join(problems) if problems else f"{data}: every row is good.")
        return 2 if problems else 0

    from .training.dropping import Dropping
    from .training.launch import launch

    dropping: dict[str, Any] = {"keep_min": keep_min, "keep_max": keep_max, "dense": dense}
    if drop_mix is not None:
        from .selectors.registry import read_weights

        dropping["mix"] = read_weights("drop-mix", drop_mix, "random=0.5,blobs=0.5")
    if coverage:
        dropping["coverage"] = tuple(coverage)
    if merge:
        dropping["merge"] = tuple(merge)
    _hide_loading_bars()
    result = launch(
        model,
        data,
        output_dir,
        dropping=Dropping(**dropping),
        source=source,
        resume=resume,
        train_batch_size=train_batch_size,
        resolution=resolution,
        reference_resolution=reference_resolution,
        mixed_precision=mixed_precision,
        dtype=dtype,
        validation_data=validation_data,
        validation_split=validation_split,
        num_validation_images=num_validation_images,
        dataloader_num_workers=dataloader_num_workers,
        cache_latents=cache_latents,
        cache_text=cache_text,
        cache_dir=cache_dir,
        report_to=report_to,
        rank=rank,
        lora_alpha=lora_alpha,
        lora_layers=None if lora_layers is None else tuple(name.strip() for name in lora_layers.split(",")),
        full=full,
        kv=kv,
        caption_dropout=caption_dropout,
        subsets=subsets,
        distillation=distillation,
        preservation=preservation,
        focus=focus,
        weighting_scheme=weighting_scheme,
        shift=shift,
        max_train_steps=max_train_steps,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate,
        muon_learning_rate=muon_learning_rate,
        lr_scheduler=lr_scheduler,
        lr_warmup_steps=lr_warmup_steps,
        adam_weight_decay=adam_weight_decay,
        max_grad_norm=max_grad_norm,
        ema=ema,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        checkpointing_steps=checkpointing_steps,
        checkpoints_total_limit=checkpoints_total_limit,
        validation_steps=validation_steps,
        validation_keep=validation_keep,
    )
    if result is not None:
        print(f"wrote {result}")
    return 0


@app.command()
def evaluate(
    manifest: Annotated[str | None, typer.Option(help="JSONL manifest, or a data set by folder or hub name.")] = None,
    pie_bench: Annotated[Path | None, typer.Option(help="The folder of PIE-Bench, in the place of a manifest.")] = None,
    dataset_config_name: ConfigName = None,
    split: Split = "train",
    image_column: ImageColumn = "image",
    cond_image_column: CondImageColumn = "references",
    caption_column: CaptionColumn = "prompt",
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub id.", show_default="the embedded model")
    ] = None,
    keep: Annotated[str, typer.Option(help="Ratios, counts or auto, with commas. 1 is always there.")] = "0.5,0.2,0.1",
    selector: Annotated[
        list[str] | None, typer.Option(help="As in generate; repeat it to compare several.", show_default="auto")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric, or NAME=MODEL; repeat it.", show_default="all that need no model"),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="As in generate; repeat it.", show_default="auto")] = None,
    coverage: Annotated[
        list[float] | None, typer.Option(help="As in generate; repeat it.", show_default="by task")
    ] = None,
    merge: Annotated[list[float] | None, typer.Option(help="As in generate; repeat it.", show_default="0")] = None,
    share: Share = "equal",
    floor: Floor = 1,
    limit: Annotated[int | None, typer.Option(help="Only the first so many samples.")] = None,
    lora: Lora = None,
    lora_scale: LoraScale = 1.0,
    kv: KV = False,
    seed: Annotated[int, typer.Option(help="Of the image noise; sample i has seed + i.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoise steps.", show_default="the model's")] = None,
    guidance_scale: Annotated[float | None, typer.Option(show_default="the model's")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="the best")] = None,
    cpu_offload: Annotated[str | None, typer.Option(help="model or group.", show_default="none")] = None,
    output: Annotated[Path, typer.Option(help="A folder for figures and pictures; a second run goes on there.")] = Path(
        "evaluation"
    ),
) -> None:
    """Measure quality against the tokens kept, on the same noise, with 95 % intervals."""
    from .evaluation.evaluate import evaluate, fingerprint, open_folder
    from .evaluation.grid import grid, maker
    from .evaluation.metrics import METRICS, find_metrics, try_out
    from .evaluation.pie_bench import PIE_METRICS, read_pie_bench
    from .evaluation.plots import check_installed, draw_all
    from .evaluation.report import table
    from .pipelines.load import load_pipeline
    from .pipelines.settings import check_references, most_references
    from .samples import read_samples

    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: pass a number of samples, 1 or more.")
    if (manifest is None) == (pie_bench is None):
        raise ValueError("Name what to evaluate on: pass either --manifest or --pie-bench.")
    known = METRICS if pie_bench is None else PIE_METRICS | METRICS
    usual = METRICS if pie_bench is None else PIE_METRICS
    metrics = find_metrics(metric or [name for name, one in usual.items() if one.model is None], known)
    check_installed(metrics, manifest)
    keeps, selectors = [_number(k) for k in keep.split(",")], [_selector(s) for s in selector or ["auto"]]
    cells = grid(
        keeps,
        selectors,
        tasks=task or ["auto"],
        coverages=coverage or [None],
        merges=merge or [0.0],
        share=share,
        floor=floor,
    )
    if manifest is not None:
        source = _source(dataset_config_name, split, image_column, cond_image_column, caption_column)
        read = read_samples(manifest, needs_image=False, most_references=most_references(model), **source)
        samples, part = read[:limit], {"data_split": read.split, "data_config": read.config}
    else:
        assert pie_bench is not None
        samples, part = read_pie_bench(pie_bench)[:limit], {}
    _hide_loading_bars()
    try_out(metrics)
    open_folder(output)
    for count in sorted({len(sample.references) for sample in samples}):
        check_references(model, count, inpaint=False)
    pipe = load_pipeline(
        model, dtype=dtype, device=device, cpu_offload=cpu_offload, lora=lora, lora_scale=lora_scale, kv=kv
    )
    pipe.set_progress_bar_config(disable=True)
    about = {
        "data": str(manifest or pie_bench),
        **part,
        "model": model or "embedded",
        "lora": lora,
        "lora_scale": lora_scale,
        "weights": fingerprint(pipe),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "dtype": dtype,
        **({"kv": True} if kv else {}),
    }
    make = maker(pipe, steps=steps, guidance_scale=guidance_scale)
    result = evaluate(make, samples, cells, metrics, output, seed=seed, about=about)
    drawn = draw_all(result, output, samples)
    print(table(result))
    print(f"wrote {', '.join(str(path) for path in [output / 'result.json', *drawn])}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="A folder for the pictures.")] = Path("demo"),
    keep: Annotated[
        str | None, typer.Option(help="As in generate; a fifth of subjects and half of edits without it.")
    ] = None,
) -> None:
    """Run the embedded model on pictures that it has not seen: kept tokens, dense, sparse and KV outputs, the times."""
    from .embedded.demo import run_demo

    _hide_loading_bars()
    run_demo(output, None if keep is None else _number(keep))


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub id.", show_default="the embedded model")
    ] = None,
    random_weights: Annotated[
        str | None, typer.Option(help=f"A model's shape, with nothing to download: {', '.join(SHAPES)}.")
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(
            help="With --random-weights: only so many double and single blocks, denoising alone; needed but for FLUX.2."
        ),
    ] = None,
    references: Annotated[list[int] | None, typer.Option(help="How many; repeatable.", show_default="1 2 4")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Ratio; repeatable.", show_default="0.2")] = None,
    size: Annotated[
        list[int] | None, typer.Option(help="Pixels a side; repeatable.", show_default="the model's, or 1024")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Repeatable.", show_default="all that the model has")] = None,
    turns: Annotated[int, typer.Option(help="Of each method, after a warm-up.")] = 5,
    minutes: Annotated[float, typer.Option(help="Begin no turn that would end later.")] = 2.5,
    steps: Annotated[int | None, typer.Option(help="Denoise steps.", show_default="the model's")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="the best")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write all figures, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw latency against references (needs matplotlib).")] = None,
    quality: Annotated[
        Path | None, typer.Option(help="With --plot: known quality, as JSON (docs/performance.md), against latency.")
    ] = None,
) -> None:
    """Time the ways to make references cheaper against each other, and against what the FLOPs allow."""
    from .images import check_output

    if plot is not None:
        check_output(plot)
    _hide_loading_bars()
    from .bench.config import BenchConfig
    from .bench.report import read_quality, summary
    from .bench.run import run_bench

    config = BenchConfig(
        references=tuple(references or (1, 2, 4)),
        keep=tuple(keep or (0.2,)),
        size=tuple(size or ()),
        methods=None if not method else tuple(method),
        turns=turns,
        minutes=minutes,
        steps=steps,
    )
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


def _source(config_name: str | None, split: str, image: str, references: str, prompt: str) -> dict[str, Any]:
    """Which part of a data set is read, and by which columns: keywords of `manifest.read_samples`."""
    columns = {"image": image, "references": references, "prompt": prompt}
    columns = {field: column for field, column in columns.items() if field != column}
    return {"columns": columns, "split": split, "config": config_name}


def _config(keep, selector, task, coverage, merge, share, floor, mask, references) -> "SparseContextConfig":
    from .config import SparseContextConfig
    from .images import open_mask
    from .selectors.masks import mask as masks_of

    for option, values in (("--keep", keep), ("--selector", selector)):
        if values and len(values) not in (1, len(references)):
            raise ValueError(
                f"{option} has {len(values)} values for {len(references)} references: give one, or as many."
            )
    keeps = [_number(k) for k in keep or ["0.2"]]
    selectors = [_selector(s) for s in selector or ["auto"]]
    if mask:
        if len(mask) != len(references):
            raise ValueError(f"There are {len(mask)} masks for {len(references)} references: pass one --mask for each.")
        masks = [open_mask(path, r.size) for path, r in zip(mask, references, strict=True)]
        shares = [masks] if len(selectors) == 1 else [[own] for own in masks]
        selectors = [_with_masks(s, masks_of(own)) for s, own in zip(selectors, shares, strict=True)]
    return SparseContextConfig(
        keep=keeps[0] if len(keeps) == 1 else keeps,
        selector=selectors[0] if len(selectors) == 1 else selectors,
        task=task,
        coverage=coverage,
        merge=merge,
        share=share,
        floor=floor,
    )


def _check_outputs(outputs: list[Path], inputs: list[Path]) -> None:
    """Raise ValueError where an output cannot be written, or would be written over a picture that is read."""
    from .images import check_output

    for path in outputs:
        check_output(path)
        for given in inputs:
            if path.exists() and given.exists() and path.samefile(given):
                raise ValueError(f"{path} is read too, and would be written over: name another file for the output.")


def _with_masks(selector, given):
    """`--mask` alone selects by the mask; beside a selector it stands for the part of it that is named mask."""
    if selector is None or selector == "mask":
        return given
    if isinstance(selector, dict) and "mask" in selector:
        return {given if name == "mask" else name: weight for name, weight in selector.items()}
    raise ValueError("--mask was given, but --selector does not use it: name mask there, or leave one of the two out.")


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text == "auto":
        return text
    raise ValueError(f"keep is {text!r}: pass a ratio such as 0.2, a count such as 400, or auto.")


def _selector(text: str):
    if text == "auto":
        return None
    if "=" not in text:
        return text
    from .selectors.registry import read_weights

    return read_weights("selector", text, "saliency=0.7,edges=0.3")


def _kept(result) -> str:
    return f"{result.selection.kept} of {result.selection.total} tokens" if result.selection else "no references"


def _hide_loading_bars() -> None:
    """Leave stderr to the bars of the steps and of downloads."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()  # this one hides the bars of downloads too
    huggingface_hub.utils.enable_progress_bars()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries log and warn of from stderr: what goes wrong is one sentence of our own."""
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    """Run the command. Bad input ends in one sentence on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a name may hold what the terminal's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _quiet():
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (ValueError, OSError) as error:
        _fail(str(error) or type(error).__name__)
    except (KeyboardInterrupt, EOFError):
        sys.exit(130)
    except Exception as error:
        # Typer's own errors about options know how to say themselves
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message())
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print("sparse-context: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
