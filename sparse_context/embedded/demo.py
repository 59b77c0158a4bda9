"""The main job on pictures that the embedded model has not seen: kept tokens, dense beside sparse, the times.

With all tokens it runs without its adapter for dropped ones. Where the package has an adapter for KV mode, also sparse
in that mode. Where it has weights for overviews, an edit of the whole picture has one, beside what dropping alone makes
of as many tokens.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..config import SparseContextConfig
from ..images import check_output, open_picture, save_picture, save_text
from ..pipelines.embedded import ADAPTERS, OVERVIEW
from ..pipelines.lora_file import OVERVIEW_LORA

EXAMPLES = Path(__file__).parent / "examples"

KEEP = {"subject": 0.2, "edit": 0.5, "global": 1.0}
"""The share of a reference's tokens by its task: an edit, which shows all of the reference again, wants more of them
than a subject, and an edit of the whole picture needs each, unless `WITH_OVERVIEW`."""

WITH_OVERVIEW = 0.2
"""The share for an edit of the whole picture by weights that know overviews."""

SIDE = 192  # of the pictures on a sheet, in pixels


def read_examples(folder: Path = EXAMPLES) -> list[dict]:
    """The shipped scenes: a list of {"name", "task", "tasks", "prompt", "files", "references": [PIL], "truth": PIL}.

    "files" has the paths of the references. "tasks" has one of "edit", "global" and "subject" for each reference: a
    background that stays where it is counts as an edit.
    """
    listing = json.loads((folder / "scenes.json").read_text(encoding="utf-8"))
    return [
        {
            **entry,
            "files": [folder / file for file in entry["references"]],
            "references": [open_picture(folder / file) for file in entry["references"]],
            "truth": open_picture(folder / entry["truth"]),
        }
        for entry in listing
    ]


def run_demo(output: Path, keep: float | int | str | None = None) -> list[dict]:
    """Run every example dense, sparse and, where the package has an adapter for it, sparse in KV mode; write a sheet
    for each and one of all into `output`. None keeps the shares of `KEEP`; without an overview, as in KV mode, an edit
    of the whole picture keeps all its tokens in any case, as keep="auto" does.

    Returns the report that is also written to `output`/report.json. Raises ValueError for a keep out of range and
    PictureError where `output` cannot be written, before any work starts.
    """
    if keep is not None:
        SparseContextConfig(keep=keep)  # raises before anything is written
    output.mkdir(parents=True, exist_ok=True)
    check_output(output / "demo.png")

    from ..pipelines.engine import Comparison, Engine
    from ..pipelines.spec import ModelSpec, Request
    from ..preview import column

    plain = Engine(bar=False)
    in_kv_mode = Engine(ModelSpec(kv=True), bar=False) if ADAPTERS["kv"].is_file() else None
    with_overviews = Engine(ModelSpec(lora=OVERVIEW_LORA), bar=False) if OVERVIEW.is_file() else None
    examples = read_examples()

    def engines(example: dict) -> dict[str, Engine]:
        ways = {"dense": plain, "sparse": plain}
        if _is_global(example) and with_overviews is not None:
            ways = {"dense": plain, "dropping": plain, "sparse": with_overviews}
        return ways if in_kv_mode is None else {**ways, "sparse kv": in_kv_mode}

    def request(way: str, example: dict) -> Request:
        config = SparseContextConfig(keep=1.0, task=example["tasks"])
        drops = {"dense": False, "sparse kv": not _is_global(example)}
        if drops.get(way, not _is_global(example) or with_overviews is not None):
            config = replace(config, keep=[_share(task) for task in example["tasks"]] if keep is None else keep)
        return Request(example["prompt"], example["references"], config)

    warm = set()
    for example in examples:
        for way, engine in engines(example).items():
            pipe = engine.pipe(request(way, example).config)
            if id(pipe) not in warm:  # an engine has several, by what a request needs
                warm.add(id(pipe))
                engine.warm_up(request(way, example))

    sheets, report = [], []
    for example in tqdm(examples, desc="demo", unit="scene"):
        results = {way: engine(request(way, example)) for way, engine in engines(example).items()}
        speedups = {way: Comparison(result, results["dense"]).speedup for way, result in results.items()}
        sheet = _draw(example, results, speedups)
        save_picture(sheet, output / f"{example['name']}.png")
        sheets.append(sheet)
        report.append(
            {
                "name": example["name"],
                "prompt": example["prompt"],
                "references": len(example["references"]),
                **{way: result.to_dict() for way, result in results.items()},
                "speedup": {way: speedup for way, speedup in speedups.items() if way != "dense"},
                "psnr": {way: psnr(result.image, example["truth"]) for way, result in results.items()},
                "psnr_to_dense": {
                    way: psnr(result.image, results["dense"].image) for way, result in results.items() if way != "dense"
                },
            }
        )
    save_picture(column(sheets), output / "demo.png")
    save_text(json.dumps(report, indent=2) + "\n", output / "report.json")
    return report


def psnr(picture: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size in dB, 100 where they are equal."""
    first, second = (np.asarray(each.convert("RGB"), np.float64) for each in (picture, other))
    error = np.mean((first - second) ** 2)
    return round(min(100.0, 10 * math.log10(255**2 / error)), 3) if error else 100.0


def _is_global(example: dict) -> bool:
    """Whether the whole picture is edited."""
    return "global" in example["tasks"]


def _share(task: str) -> float:
    return WITH_OVERVIEW if task == "global" else KEEP[task]


def _draw(example: dict, results: dict, speedups: dict[str, float]) -> Image.Image:
    """The sheet of a scene: what was kept, the truth, and what was made of it each way."""
    from ..preview import draw_selection, label, side_by_side

    selection = results["sparse"].selection
    said = f"{selection.kept} tokens, {speedups['sparse']:.1f}x as fast"
    columns = {"truth": example["truth"], "all tokens": results["dense"].image}
    if "dropping" in results:
        without, with_overview = (psnr(results[way].image, example["truth"]) for way in ("dropping", "sparse"))
        columns[f"{results['dropping'].selection.kept} tokens, {without:.1f} dB"] = results["dropping"].image
        said = f"{selection.kept} {'with an overview' if selection.overviews else 'tokens'}, {with_overview:.1f} dB"
    columns[said] = results["sparse"].image
    if "sparse kv" in results:
        also = "and KV" if results["sparse kv"].selection.kept == selection.kept else "all tokens and KV"
        columns[f"{also}, {speedups['sparse kv']:.1f}x as fast"] = results["sparse kv"].image
    pictures = [
        label(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), text) for text, picture in columns.items()
    ]
    return label(side_by_side([draw_selection(selection, height=SIDE), *pictures]), example["prompt"])


def table(report: list[dict]) -> str:
    """A report of `run_demo` as lines: the times of each scene, and where dropping stands beside an overview, the PSNR
    of both against the truth and against the output with all tokens."""
    ways = [way for way in report[0]["speedup"] if way != "dropping"]
    lines = [f"{'scene':<18}{'references':>11}{'tokens kept':>16}{'dense':>10}" + "".join(f"{way:>18}" for way in ways)]
    for row in report:
        kept = row["sparse"]["selection"]
        line = f"{row['name']:<18}{row['references']:>11}{kept['kept']:>8} of {kept['total']:<5}"
        line += f"{row['dense']['seconds']['total']:>8.2f} s"
        for way in ways:
            line += f"{row[way]['seconds']['total']:>8.2f} s, {row['speedup'][way]:>4.1f}x "
        lines.append(line.rstrip())
    pairs = [row for row in report if "dropping" in row]
    if pairs:
        lines += ["", f"{'PSNR':<18}{'dense':>10}{'dropping':>16}{'to dense':>12}{'overview':>16}{'to dense':>12}"]
    for row in pairs:
        line = f"{row['name']:<18}{row['psnr']['dense']:>7.1f} dB"
        for way in ("dropping", "sparse"):
            line += f"{row['psnr'][way]:>13.1f} dB{row['psnr_to_dense'][way]:>9.1f} dB"
        lines.append(line)
    return "\n".join(lines)
