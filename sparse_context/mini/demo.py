"""The main job on pictures that the embedded model has not seen: kept tokens, dense beside sparse, the times."""

import json
from dataclasses import replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..images import check_output, open_picture, save_picture, save_text
from ..selection import SparseContextConfig

EXAMPLES = Path(__file__).parent / "examples"


def read_examples(folder: Path = EXAMPLES) -> list[dict]:
    """The shipped scenes: a list of {"name", "task", "tasks", "prompt", "references": [PIL], "truth": PIL}.

    "tasks" has one of "edit", "global" and "subject" for each reference: a background that stays where it is counts as
    an edit.
    """
    listing = json.loads((folder / "scenes.json").read_text())
    return [
        {
            **entry,
            "references": [open_picture(folder / file) for file in entry["references"]],
            "truth": open_picture(folder / entry["truth"]),
        }
        for entry in listing
    ]


def run_demo(output: Path, keep: float | int | str = 0.2) -> list[dict]:
    """Run every example dense and sparse, write a sheet for each and one of all into `output`, and print the times.

    Returns the report that is also written to `output`/report.json. Raises ValueError for a keep out of range and
    PictureError where `output` cannot be written, before any work starts.
    """
    config = SparseContextConfig(keep=keep)
    output.mkdir(parents=True, exist_ok=True)
    check_output(output / "demo.png")

    from ..generation import generate, load_pipeline
    from ..preview import column, draw_selection, label, side_by_side

    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    examples = read_examples()
    for warm_up in (1.0, keep):
        generate(pipe, examples[-1]["references"], examples[-1]["prompt"], SparseContextConfig(keep=warm_up), steps=2)

    sheets, report = [], []
    for example in tqdm(examples, desc="demo", unit="scene"):
        dense, sparse = (
            generate(pipe, example["references"], example["prompt"], replace(config, keep=each, task=example["tasks"]))
            for each in (1.0, keep)
        )
        assert sparse.selection is not None
        faster = dense.times.total / sparse.times.total
        side = 192
        truth, dense_picture, sparse_picture = (
            p.resize((side, side), Image.Resampling.LANCZOS) for p in (example["truth"], dense.image, sparse.image)
        )
        sheet = label(
            side_by_side(
                [
                    draw_selection(sparse.selection, height=side),
                    label(truth, "truth"),
                    label(dense_picture, "all tokens"),
                    label(sparse_picture, f"{sparse.selection.kept} tokens, {faster:.1f}x as fast"),
                ]
            ),
            example["prompt"],
        )
        save_picture(sheet, output / f"{example['name']}.png")
        sheets.append(sheet)
        report.append(
            {
                "name": example["name"],
                "prompt": example["prompt"],
                "references": len(example["references"]),
                "dense": dense.to_dict(),
                "sparse": sparse.to_dict(),
                "times faster": faster,
            }
        )
    save_picture(column(sheets), output / "demo.png")
    save_text(json.dumps(report, indent=2) + "\n", output / "report.json")

    print(f"{'scene':<24}{'references':>11}{'tokens kept':>16}{'dense':>10}{'sparse':>10}{'faster':>9}")
    for row in report:
        kept = row["sparse"]["selection"]
        seconds = [row[which]["seconds"]["total"] for which in ("dense", "sparse")]
        print(
            f"{row['name']:<24}{row['references']:>11}{kept['kept']:>8} of {kept['total']:<5}"
            f"{seconds[0]:>8.2f} s{seconds[1]:>8.2f} s{row['times faster']:>8.2f}x"
        )
    print(f"wrote {output / 'demo.png'}, a sheet for each scene and report.json")
    return report
