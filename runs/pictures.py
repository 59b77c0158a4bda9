"""The pictures of the README and of docs/, from results and from what the demo and the runs draw. Nothing is measured.

    sparse-context demo --output demo
    python runs/pictures.py [--demo demo/demo.png] [--coverage checkpoints/coverage.webp] \\
        [--overview checkpoints/overview] [--batch out] [--server http://127.0.0.1:8000] \\
        [--recommend recommendation/sheet.png]

A picture whose file is not named is left as it is. Each is WebP of at most 150 KB, since every version of it stays in
the history. The charts need `pip install 'sparse-context[plots]'`.
"""

import argparse
import base64
import io
import json
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from served import written as written_file
from tables import SCORES, read, score_of

from sparse_context import SparseContextConfig, draw_kept, select_tokens
from sparse_context.embedded.demo import EXAMPLES, read_examples
from sparse_context.pipelines import Engine, Request
from sparse_context.preview import column, label, side_by_side

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
MOST = 150_000  # bytes
TILE, CAPTION, GAP = 192, 19, 8  # of the demo's sheets, in pixels
ROW = TILE + CAPTION + 35  # with the line of the prompt
SELECTORS = ("random", "uniform", "edges", "detail", "contrast", "saliency", "subject")


def save(picture: Image.Image, name: str) -> None:
    """As WebP of the best quality that the limit allows."""
    path = IMAGES / f"{name}.webp"
    for quality in range(90, 40, -5):
        picture.convert("RGB").save(path, quality=quality, method=6)
        if path.stat().st_size <= MOST:
            break
    print(f"wrote {path} ({picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} KB)")


def written(width: int, text: str, size: int, bold: bool = False) -> Image.Image:
    line = Image.new("RGB", (width, round(1.5 * size)), "white")
    draw = ImageDraw.Draw(line)
    draw.text(
        (0, 0),
        text,
        fill=(30, 30, 30),
        font=ImageFont.load_default(size),
        stroke_width=int(bold),
        stroke_fill=(30, 30, 30),
    )
    return line


class Demo:
    """The sheet of all scenes of the demo, cut into its parts."""

    def __init__(self, path: Path) -> None:
        self.sheet = Image.open(path).convert("RGB")
        self.examples = read_examples()
        self.names = [example["name"] for example in self.examples]

    def tile(self, name: str, column: int) -> Image.Image:
        """A picture of a scene with its caption; the references come first, then truth, dense, sparse, and KV."""
        left, top = column * (TILE + GAP), self.names.index(name) * (ROW + GAP)
        return self.sheet.crop((left, top, left + TILE, top + TILE + CAPTION))

    def scene(self, name: str, outputs: tuple[int, ...], slots: int) -> Image.Image:
        """A row: the prompt, the references in `slots` places, and the chosen outputs at the right (0 is the truth)."""
        example = self.examples[self.names.index(name)]
        count = len(example["references"])
        width = slots * (TILE + GAP) + 3 * GAP + len(outputs) * (TILE + GAP) - GAP
        row = Image.new("RGB", (width, TILE + CAPTION + 36), "white")
        row.paste(written(width, example["prompt"], 21), (0, 4))
        for i in range(count):
            row.paste(self.tile(name, i), (i * (TILE + GAP), 36))
        for place, output in enumerate(outputs):
            row.paste(self.tile(name, count + output), ((slots + place) * (TILE + GAP) + 3 * GAP, 36))
        return row


def stacked(rows: list[Image.Image], gap: int = 10) -> Image.Image:
    height = sum(row.height for row in rows) + gap * (len(rows) - 1)
    sheet = Image.new("RGB", (max(row.width for row in rows), height), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + gap
    return sheet


def scaled(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


def selectors() -> Image.Image:
    """One photograph, and the fifth of its tokens that each selector keeps."""
    side, grid = 256, (16, 16)
    crab = Image.open(EXAMPLES / "in-front-2.webp").convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    pixels = np.asarray(crab)
    tiles = [("the reference", crab)]
    for name in SELECTORS:
        selection = select_tokens([pixels], [grid], SparseContextConfig(keep=0.2, selector=name))
        tiles.append((name, draw_kept(pixels, selection.references[0])))
    sheet = Image.new("RGB", (4 * (side + GAP) - GAP, 2 * (side + 40)), "white")
    for i, (name, tile) in enumerate(tiles):
        left, top = i % 4 * (side + GAP), i // 4 * (side + 40)
        sheet.paste(tile, (left, top))
        sheet.paste(written(side, name, 20), (left, top + side + 4))
    return sheet


def chart(figure) -> Image.Image:
    """A figure of matplotlib as a picture."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def new_figure(columns: int, width: float, height: float):
    """A figure that needs no screen, and its axes, without the frame at the top and the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def speed() -> Image.Image:
    """The seconds of a whole call of klein-9B with four references, by method."""
    rows = {
        (row["method"], row["keep"]): row["seconds"]["total"]["median"]
        for row in read("bench_gpu_klein-9b")["figures"]["rows"]
        if row["references"] == 4 and row["size"] == 1024
    }
    shown = {
        "all tokens": ("dense", None),
        "KV cache": ("kv", None),
        "keep 0.2": ("sparse", 0.2),
        "keep 0.1": ("sparse", 0.1),
        "keep 0.1 + KV": ("sparse_kv", 0.1),
        "keep 0.1, references cached": ("sparse_cached", 0.1),
        "no references (the limit)": ("no_references", None),
    }
    seconds = [rows[way] for way in shown.values()]
    figure, (axes,) = new_figure(1, 8, 2.9)
    colours = ["#9aa3ad", "#9aa3ad", *["#e24c3c"] * 4, "#d8dce0"]
    bars = axes.barh(list(shown), seconds, color=colours, height=0.7)
    axes.bar_label(bars, [f"{each:.2f} s, {seconds[0] / each:.1f}x" for each in seconds], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * seconds[0])
    axes.set_xlabel("seconds per image, four references (shape of klein-9B, random weights, one H200)")
    return chart(figure)


def curves() -> Image.Image:
    """What subjects and edits lose by keep and selector: test split, fine-tuned."""
    result = read("mini_curves_test")
    named = {
        "auto": "task default",
        "mask": "mask (knows the object)",
        "subject": "subject",
        "saliency": "saliency",
        "edges": "edges",
        "random": "random",
    }
    figure, panels = new_figure(2, 9, 3.7)
    for axes, group in zip(panels, ("subjects", "edits"), strict=True):
        settings = result["figures"]["against_dense_base"][group]
        for selector, name in named.items():
            found = {1.0: score_of(settings, "all tokens", SCORES[group])["difference"]}
            for cell, config in result["config"]["cells"].items():
                plain = not config["coverage"] and not config.get("merge")
                if config["selector"] == selector and plain and cell != "dense":
                    found[config["keep"]] = score_of(settings, cell, SCORES[group])["difference"]
            keeps = sorted(found)
            axes.plot(
                keeps,
                [found[keep] for keep in keeps],
                marker="o",
                markersize=3.5,
                label=name,
                linewidth=2.2 if selector == "auto" else 1.2,
                linestyle="--" if selector == "mask" else "-",
            )
        axes.set_xscale("log")
        axes.set_xticks([0.05, 0.1, 0.2, 0.3, 0.5, 1], ["0.05", "0.1", "0.2", "0.3", "0.5", "all"])
        axes.minorticks_off()
        axes.axhline(0, color="#9aa3ad", linewidth=0.8)
        axes.set_title(group)
        axes.set_xlabel("share of tokens kept")
        axes.set_ylim(-15, 2)
    panels[0].set_ylabel("PSNR against all tokens, dB")
    figure.legend(
        *panels[0].get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower center", ncols=6
    )
    return chart(figure)


def batch(folder: Path) -> Image.Image:
    """What became of the jobs of a batch: their pictures, or why there is none."""
    tiles = []
    for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        tile = Image.new("RGB", (TILE, TILE), (238, 238, 238))
        if record["status"] == "done":
            tile = Image.open(folder / record["output"]).convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
        else:
            text = "\n".join(textwrap.wrap(record["reason"], 26))
            ImageDraw.Draw(tile).text((10, 10), text, fill=(160, 30, 30), font=ImageFont.load_default(13))
        tiles.append(label(tile, f"{record['name']}: {record['status']}"))
    return column([side_by_side(tiles[i : i + 4]) for i in range(0, len(tiles), 4)])


def server(url: str) -> Image.Image:
    """Edits of an example that a server of the embedded model makes for the official client: kept tokens, a stream
    with two images on the way, and the image with all tokens."""
    import openai

    example = next(each for each in read_examples() if each["name"] == "side-by-side")
    prompt, references = example["prompt"], example["references"]
    files = [written_file(each) for each in references]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        ask = partial(client.images.edit, image=files, prompt=prompt, stream=True, partial_images=2)
        kept, dense = (
            [Image.open(io.BytesIO(base64.b64decode(event.b64_json))) for event in ask(extra_body=extra)]
            for extra in ({"keep": 0.2, "seed": 0}, {"keep": 1, "seed": 0})
        )
    selection = Engine(bar=False).select(Request(prompt, references, SparseContextConfig(keep=0.2)))
    tiles = [draw_kept(np.asarray(each.picture), each) for each in selection.references]
    captions = [f"keep {each.count} of {each.total} tokens" for each in selection.references]
    tiles += [*kept, dense[-1]]
    captions += ["partial image", "partial image", "the answer", "with all tokens"]
    shown = [tile.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS) for tile in tiles]
    row = side_by_side([label(tile, caption) for tile, caption in zip(shown, captions, strict=True)])
    return stacked([written(row.width, prompt, 20), row])


def main() -> None:
    parser = argparse.ArgumentParser(description="The pictures of the documents.")
    parser.add_argument("--demo", type=Path, help="the sheet of all scenes that the demo writes")
    parser.add_argument("--coverage", type=Path, help="coverage.webp of runs/coverage.py")
    parser.add_argument("--overview", type=Path, help="folder of the --pictures of runs/overview.py")
    parser.add_argument("--recommend", type=Path, help="sheet.png of the command recommend")
    parser.add_argument("--batch", type=Path, help="output folder of the command batch")
    parser.add_argument("--server", help="address of `serve` with the embedded model")
    arguments = parser.parse_args()

    IMAGES.mkdir(parents=True, exist_ok=True)
    for make in (selectors, speed, curves):
        save(make(), make.__name__)
    if arguments.demo:
        demo = Demo(arguments.demo)
        rows = [demo.scene(name, (0, 1, 2), 4) for name in ("placed", "side-by-side", "quarters")]
        save(scaled(stacked(rows), 1200), "hero")
        rows = [demo.scene(name, (0, 1, 2, 3), 2) for name in ("recoloured", "in-front")]
        save(scaled(stacked(rows), 1000), "failures")
    if arguments.coverage:
        save(Image.open(arguments.coverage), "coverage")
    if arguments.overview:
        parts = [Image.open(arguments.overview / f"{name}.webp") for name in ("curves-psnr", "edits", "global-edits")]
        width = min(part.width for part in parts)
        parts = [part.resize((width, round(part.height * width / part.width))) for part in parts]
        save(column(parts, gap=12), "overview")
    if arguments.recommend:
        save(Image.open(arguments.recommend), "recommend")
    if arguments.batch:
        save(batch(arguments.batch), "batch")
    if arguments.server:
        save(server(arguments.server), "server")


if __name__ == "__main__":
    main()
