"""The command `sparse-context`: options in, one call of the work below, results out. No logic lives here.

Bad input is one sentence on stderr and exit code 2; nothing is written then. Heavy imports happen inside the commands.
"""

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .selection import SparseContextConfig

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Reference-conditioned image generation with a fraction of the reference tokens.",
)

Keep = Annotated[
    list[str] | None,
    typer.Option(help="Ratio (0.2), count (400) or auto; repeat it for one per reference.", show_default="0.2"),
]
Selector = Annotated[
    list[str] | None,
    typer.Option(
        help="auto, a name (random, uniform, edges, detail, saliency, mask) or a blend (saliency=0.7,edges=0.3); "
        "repeat it for one per reference.",
        show_default="auto",
    ),
]
Task = Annotated[str, typer.Option(help="edit, subject or auto: decides what the selector does not.")]
Mask = Annotated[
    list[Path] | None,
    typer.Option(help="A picture of the reference's size, white where to keep; one per reference, in order."),
]
Coverage = Annotated[float | None, typer.Option(help="Share of the kept tokens spread evenly.", show_default="by task")]
Share = Annotated[str, typer.Option(help="joint: references compete for the budget. equal: they do not.")]
Floor = Annotated[int, typer.Option(help="Fewest tokens of each reference.")]


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
    share: Share = "joint",
    floor: Floor = 1,
    output: Annotated[Path, typer.Option(help="Where the picture goes: .png, .jpg or .webp.")] = Path("out.png"),
    show_tokens: Annotated[Path | None, typer.Option(help="Also draw which tokens were kept.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Also run dense; both pictures side by side.")] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA for this model, as safetensors.")] = None,
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
    from .images import check_output, open_picture, save_picture

    outputs = [path for path in (output, show_tokens, compare) if path is not None]
    for path in outputs:
        check_output(path)
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise ValueError("Two of --output, --show-tokens and --compare name the same file: give each its own.")
    references = [open_picture(path) for path in image or []]
    if show_tokens is not None and not references:
        raise ValueError("--show-tokens draws on the references, but there are none: pass --image.")
    config = _config(keep, selector, task, coverage, share, floor, mask, references)

    _hide_loading_bars()
    from .generation import generate, load_pipeline
    from .preview import draw_selection, label, side_by_side
    from .selection import SparseContextConfig

    pipe = load_pipeline(
        model, dtype=dtype, device=device, cpu_offload=cpu_offload, lora=None if lora is None else str(lora)
    )

    def run(config: SparseContextConfig, steps: int | None = steps):
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
        )

    everything = SparseContextConfig(keep=1.0)
    if compare is not None:  # a first call pays for more than itself, so neither of the two is one
        run(config, steps=1)
        run(everything, steps=1)
    result = run(config)
    dense = None if compare is None else run(everything)

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
    share: Share = "joint",
    floor: Floor = 1,
    token: Annotated[int, typer.Option(help="Pixels a side of a token: 16 for FLUX.", min=1, max=256)] = 16,
    output: Annotated[Path, typer.Option(help="Where the drawing goes.")] = Path("tokens.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show which tokens would be kept, with no model loaded."""
    from .images import check_output, open_picture, save_picture
    from .preview import draw_selection, select_pictures

    check_output(output)
    references = [open_picture(path) for path in images]
    config = _config(keep, selector, task, coverage, share, floor, mask, references)
    selection = select_pictures(references, config, token)
    save_picture(draw_selection(selection), output)
    print(json.dumps(selection.to_dict(), indent=2) if as_json else f"{selection}\nwrote {output}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="A folder for the pictures.")] = Path("demo"),
    keep: Annotated[str, typer.Option(help="As in generate.")] = "0.2",
) -> None:
    """Run the embedded model on pictures that it has not seen: kept tokens, dense beside sparse, the times."""
    from .mini.demo import run_demo

    _hide_loading_bars()
    run_demo(output, _number(keep))


def _config(keep, selector, task, coverage, share, floor, mask, references) -> "SparseContextConfig":
    from .images import open_mask
    from .selection import SparseContextConfig
    from .selectors import mask as masks_of

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
        share=share,
        floor=floor,
    )


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
    weights = {}
    for part in text.split(","):
        name, _, weight = (piece.strip() for piece in part.partition("="))
        try:
            if name in weights:
                raise ValueError
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(f"selector is {text!r}: write a blend as saliency=0.7,edges=0.3.") from None
    return weights


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
