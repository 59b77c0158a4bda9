"""The main job on pictures that the embedded model has not seen: kept tokens, dense beside sparse, the times.

With all tokens it runs without its adapter for dropped ones. Where the package has an adapter for KV mode, also sparse
in that mode.
"""

import json
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..config import SparseContextConfig
from ..images import check_output, open_picture, save_picture, save_text
from ..pipelines.embedded import ADAPTERS

EXAMPLES = Path(__file__).parent / "examples"

KEEP = {"subject": 0.2, "edit": 0.5, "global": 1.0}
"""The share of a reference's tokens by its task: an edit, which shows all of the reference again, wants more of them
than a subject, and an edit of the whole picture needs each."""

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
    for each and one of all into `output`. None keeps the shares of `KEEP`; an edit of the whole picture keeps all its
    tokens in any case, as keep="auto" does.

    Returns the report that is also written to `output`/report.json. Raises ValueError for a keep out of range and
    PictureError where `output` cannot be written, before any work starts.
    """
    if keep is not None:
        SparseContextConfig(keep=keep)  # raises before anything is written
    output.mkdir(parents=True, exist_ok=True)
    check_output(output / "demo.png")

    from ..pipelines.engine import Comparison, Engine, Generation
    from ..pipelines.spec import ModelSpec, Request
    from ..preview import column, draw_selection, label, side_by_side

    def keep_of(tasks: list[str]) -> float | int | str | list[float]:
        return [KEEP[task] for task in tasks] if keep is None else 1.0 if "global" in tasks else keep

    plain = Engine(bar=False)
    engines = {"dense": plain, "sparse": plain}
    if ADAPTERS["kv"].is_file():
        engines["sparse kv"] = Engine(ModelSpec(kv=True), bar=False)
    examples = read_examples()

    def request(way: str, example: dict) -> Request:
        config = SparseContextConfig(keep=1.0 if way == "dense" else keep_of(example["tasks"]), task=example["tasks"])
        return Request(example["prompt"], example["references"], config)

    for way, engine in engines.items():
        engine.warm_up(request(way, examples[-1]))

    def run(way: str, example: dict) -> Generation:
        return engines[way](request(way, example))

    sheets, report = [], []
    for example in tqdm(examples, desc="demo", unit="scene"):
        results = {way: run(way, example) for way in engines}
        speedups = {way: Comparison(result, results["dense"]).speedup for way, result in results.items()}
        selection = results["sparse"].selection
        assert selection is not None
        columns = {
            "truth": example["truth"],
            "all tokens": results["dense"].image,
            f"{selection.kept} tokens, {speedups['sparse']:.1f}x as fast": results["sparse"].image,
        }
        if "sparse kv" in results:
            columns[f"and KV, {speedups['sparse kv']:.1f}x as fast"] = results["sparse kv"].image
        pictures = [
            label(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), text) for text, picture in columns.items()
        ]
        sheet = label(side_by_side([draw_selection(selection, height=SIDE), *pictures]), example["prompt"])
        save_picture(sheet, output / f"{example['name']}.png")
        sheets.append(sheet)
        report.append(
            {
                "name": example["name"],
                "prompt": example["prompt"],
                "references": len(example["references"]),
                **{way: result.to_dict() for way, result in results.items()},
                "speedup": {way: speedup for way, speedup in speedups.items() if way != "dense"},
            }
        )
    save_picture(column(sheets), output / "demo.png")
    save_text(json.dumps(report, indent=2) + "\n", output / "report.json")
    return report


def table(report: list[dict]) -> str:
    """The times of a report of `run_demo`: a head and a line for each scene."""
    ways = list(report[0]["speedup"])
    lines = [f"{'scene':<18}{'references':>11}{'tokens kept':>16}{'dense':>10}" + "".join(f"{way:>18}" for way in ways)]
    for row in report:
        kept = row["sparse"]["selection"]
        line = f"{row['name']:<18}{row['references']:>11}{kept['kept']:>8} of {kept['total']:<5}"
        line += f"{row['dense']['seconds']['total']:>8.2f} s"
        for way, ratio in row["speedup"].items():
            line += f"{row[way]['seconds']['total']:>8.2f} s, {ratio:>4.1f}x "
        lines.append(line.rstrip())
    return "\n".join(lines)
