"""Write the tables of README.md and docs/ from the code and from results/*.json, between their markers.

    python runs/readme.py [--check]

With --check nothing is written, and a page that is out of date is an error: so no figure in it is typed by hand.
"""

import ast
import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from base_quality import ALIKE
from base_quality import check as check_base
from bench_mini import check as check_mini
from bench_mini import known_quality
from check_gpu import check

from sparse_context.families import FAMILIES, Family
from sparse_context.result import selection_version
from sparse_context.selection import task_defaults
from sparse_context.speed.flops import Tokens, call_flops
from sparse_context.speed.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]


def pipelines() -> str:
    rows = "\n".join(
        f"| `{name}` | {_references(family)} | `families/{family.file}.py` |" for name, family in FAMILIES.items()
    )
    return f"| pipeline | references | file |\n|---|---|---|\n{rows}"


def _references(family: Family) -> str:
    if family.fewest == family.most:
        return str(family.most)
    return f"{family.fewest} or more" if family.most is None else f"{family.fewest} to {family.most}"


def _read(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def _machine(result: dict) -> str:
    hardware = result["hardware"]
    return f"{hardware['cpu']}, {hardware['cores']} cores"


def _of_its_time(weights: str, newest: str) -> str:
    """A sentence where a result is of other weights of the embedded model than what was measured of it last."""
    return (
        "" if weights == newest else " The embedded model was trained further since: these are of the weights before."
    )


UNRECORDED = "4c4dc696f009"
"""What the results were chosen by that do not say it."""


def _choice_since(*results: dict) -> str:
    """A sentence where results are of other selectors or rules than the package's."""
    older = [result for result in results if result["versions"].get("selection", UNRECORDED) != selection_version()]
    if not older:
        return ""
    splits = dict.fromkeys(result["config"].get("split", "validation") for result in older)
    what = f"those of the {' and '.join(splits)} split" if len(older) < len(results) else "these"
    return f" The saliency net or the tasks' rules have changed since: {what} are of the ones before."


def core_speed() -> str:
    result = _read("core_speed")
    lines = [
        "| references | tokens kept | end to end | denoising alone | all kept, to untouched |",
        "|---|---|---|---|---|",
    ]
    for count, row in result["figures"].items():
        faster, kept = row["times faster"], row["keep 1 to untouched"]
        lines.append(
            f"| {count} | {row['tokens']['kept']} of {row['tokens']['of']} | {faster['total']['median']:.2f}x "
            f"({faster['total']['min']:.2f} to {faster['total']['max']:.2f}) | {faster['denoise']['median']:.2f}x | "
            f"{kept['median']:.2f} ({kept['min']:.2f} to {kept['max']:.2f}) |"
        )
    config = result["config"]
    return "\n".join(lines) + (
        f"\n\nTimes faster than the untouched pipeline at keep {config['keep']}, and the time of the patched pipeline "
        f"with all tokens kept as a share of its: the embedded model, {config['num_inference_steps']} "
        f"steps, {config['dtype']}, the median of {config['turns']} interleaved turns and their range, on "
        f"{_machine(result)} (`runs/core_speed.py`)."
    )


def selection() -> str:
    result = _read("selection")
    times = result["figures"]["milliseconds"]
    head = "| " + " | ".join(times) + " |\n|" + "---|" * len(times)
    row = "| " + " | ".join(f"{t['median'] / times['edges']['median']:.2f}" for t in times.values()) + " |"
    under = [name for name, t in times.items() if t["median"] <= 10]
    return (
        f"{head}\n{row}\n\nTime to select from a 1-megapixel reference on one core, as a share of what `edges` takes; "
        f"at most 10 ms for {', '.join(under)} on {_machine(result)} (`runs/time_selection.py`)."
    )


def lines() -> str:
    """The lines of code of each family's file: without blank lines, comments and docstrings."""
    folder = ROOT / "sparse_context" / "families"
    rows = ["| file | pipelines | lines of code |", "|---|---|---|"]
    files = dict.fromkeys(family.file for family in FAMILIES.values())
    shared = sorted(path.stem for path in folder.glob("*.py") if path.stem not in files)
    for file in [*files, *shared]:
        count = sum(family.file == file for family in FAMILIES.values())
        lines = _code_lines((folder / f"{file}.py").read_text(encoding="utf-8"))
        rows.append(f"| `{file}.py` | {count or 'shared'} | {lines} |")
    return "\n".join(rows)


def _code_lines(source: str) -> int:
    """Lines that hold a statement or a part of one; docstrings are none."""
    tree = ast.parse(source)
    held: set[int] = set()
    for node in ast.walk(tree):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.stmt) and not is_docstring:
            body = getattr(node, "body", None)
            held.update(range(node.lineno, body[0].lineno if body else node.end_lineno + 1))
    text = source.splitlines()
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    return sum(bool(text[n - 1].strip()) and not text[n - 1].lstrip().startswith("#") for n in held - docstrings)


def base_quality() -> str:
    result = _read("base_quality")
    heads = ("task", "scenes", "whole picture", "inside the object", "its flat colour", "its blur", "recognised",
             "at most", "taken for its flat colour or blur", "for another object",
             "flat colour, blur recognised")  # fmt: skip
    above = _read("base_quality_ceiling")
    ceiling = above["figures"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for task, figures in result["figures"].items():
        if "psnr" not in figures or task == "vae":
            continue

        def show(name: str, pattern: str, figures: dict = figures) -> str:
            return pattern.format(figures[name]["mean"]) if name in figures else ""

        lines.append(
            f"| {task.replace('_', ', ')} | {figures['psnr']['number']} | {show('psnr', '{:.1f} dB')} | "
            f"{show('psnr inside', '{:.1f} dB')} | {show('psnr inside, flat colour', '{:.1f} dB')} | "
            f"{show('psnr inside, blur', '{:.1f} dB')} | {show('recognised', '{:.0%}')} | "
            f"{show('recognised', '{:.0%}', ceiling[task])} | "
            f"{show('taken for its flat colour or blur', '{:.0%}')} | {show('taken for another object', '{:.0%}')} | "
            f"{show('recognised, flat colour', '{:.0%}')}{show('recognised, blur', ', {:.0%}')} |"
        )

    def of_all(figures: dict, name: str) -> str:
        """The share of the objects of all tasks."""
        found = [by_name[name] for by_name in figures.values() if name in by_name]
        share = sum(one["mean"] * one["number"] for one in found) / sum(one["number"] for one in found)
        return f"{share:.0%}".replace("%", " %")

    config, vae = result["config"], result["figures"]["vae"]["psnr"]
    short: dict[str, list[str]] = {}
    for name, (value, _, _, reached) in check_base(result["figures"]).items():
        if not reached:
            task, _, score = name.partition(", ")
            shown = f"{value:.0%}".replace("%", " %") if score == "recognised" else f"{value:.1f} dB"
            kind = score.removeprefix("psnr, ")
            short.setdefault(task.replace("_", ", "), []).append(shown + (f" ({kind})" if kind in score[5:] else ""))
    missed = [f"{task}, with {' and '.join(values)}" for task, values in short.items()]
    return "\n".join(lines) + (
        f"\n\nThe dense base with all tokens (`--lora none`) against the truth, {config['split']} split, "
        f"{config['num_inference_steps']} steps, trained for {config['training_steps']:,} steps: PSNR, and how often "
        f"the object is nearest to itself among {config['candidates']} candidates by EfficientNet features; beside "
        f"both what its flat colour and a blur of it would have, and at most, what the truth itself has after the VAE, "
        f"which a transformer without a fault would reach ({above['config']['scenes']} scenes a task). Of all objects "
        f"{of_all(result['figures'], 'alike')} are all but their own flat colour or blur (a cosine of {ALIKE} and "
        f"more); of the others {of_all(result['figures'], 'recognised, unlike')} are recognised, at most "
        f"{of_all(ceiling, 'recognised, unlike')}. PSNR "
        f"alone does not tell these from a recoloured "
        f"object, nor from one whose scale changes; recognition does. The VAE alone: {vae['mean']:.1f} dB over "
        f"{vae['number']} references. Asked are 19 dB inside the object, 80 % recognised, 22 dB of global edits and "
        f"32 dB of the VAE; "
        f"short of that: {'; '.join(missed) or 'nothing'}. "
        f"Measured on {_machine(result)} (`runs/base_quality.py`)."
    )


def unlike() -> str:
    """The dense base on held-out objects whose names have nothing of a training one's, beside all that are held out."""
    if not _measured("base_quality_unlike"):
        return "Not measured yet: `runs/base_quality.py`."
    every, apart = _read("base_quality"), _read("base_quality_unlike")
    rows = ["| task | inside the object | unlike | recognised | unlike |", "|---|---|---|---|---|"]
    for task, figures in apart["figures"].items():
        if "psnr inside" in figures:
            pairs = [(of["psnr inside"]["mean"], of["recognised"]["mean"], of["recognised"]["number"])
                     for of in (every["figures"][task], figures)]  # fmt: skip
            cells = [f"{value:.1f} dB" for value, _, _ in pairs]
            cells += [f"{share:.0%} of {number}".replace("%", " %") for _, share, number in pairs]
            rows.append(f"| {task.replace('_', ', ')} | {' | '.join(cells)} |")
    config = apart["config"]
    return "\n".join(rows) + (
        f"\n\nThe dense base with all tokens: the objects of the {config['split']} split, and under *unlike* other "
        f"scenes, {config['scenes']} a task, with the {config['objects']} objects of it whose names share no word "
        f"of three letters or more with a training one's. Measured on {_machine(apart)} (`runs/base_quality.py`)."
    )


def _bench_rows(figures: dict, more: Mapping[str, Mapping[str, str]] | None = None) -> list[str]:
    """The rows of a benchmark, as sparse_context/speed/bench.py gives them. more: columns, of texts by method."""
    more = more or {}
    heads = ["references", "method", "keep", "tokens", "end to end", "denoising", "FLOPs allow", "of that",
             "of the ceiling", *more]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in figures["rows"]:
        faster = row["times faster"]
        cells = [
            str(row["references"]),
            row["method"].replace("_", " "),
            "" if row["keep"] is None else f"{row['keep']:g}",
            str(row["tokens"]["references"]),
            *(_times(faster[phase]) if phase in faster else "" for phase in ("total", "denoise")),
            f"{row['predicted']:.2f}x",
            f"{row['of predicted']:.0%}".replace("%", " %"),
            f"{row['of ceiling']:.0%}".replace("%", " %"),
            *(texts.get(row["method"], "") for texts in more.values()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _times(faster: dict) -> str:
    """How many times faster, and the range of the turns where there were several."""
    spread = "" if faster["min"] == faster["max"] else f" ({faster['min']:.2f} to {faster['max']:.2f})"
    return f"{faster['median']:.2f}x{spread}"


def _asked(found: Mapping[str, tuple[float, float, bool, bool]], what: str) -> str:
    """A table of what was to be reached, from what `check_gpu.check` and its kin found."""
    rows = [
        f"| {name} | {'>=' if more else '<='} {bound:g} | {value:.2f} | {'yes' if reached else '**no**'} |"
        for name, (value, bound, more, reached) in found.items()
    ]
    return "\n".join([f"| {what} | | measured | reached |", "|---|---|---|---|", *rows])


def bench_mini() -> str:
    if not (ROOT / "results" / "bench_mini.json").exists():
        return "Not measured yet: `runs/bench_mini.py`."
    result = _read("bench_mini")
    config, figures = result["config"], result["figures"]
    costs = {
        group: {method: f"{entry['difference']:+.1f} dB" for method, entry in known_quality(group).items()}
        for group in ("subjects", "edits")
    }
    return "\n".join(_bench_rows(figures, costs)) + (
        f"\n\nTimes faster than dense: the embedded model, {figures['steps']} steps, {config['dtype']}, the median of "
        f"{figures['turns']} interleaved turns and their range, on {_machine(result)} (`runs/bench_mini.py`). Beside "
        f"them what the method costs at that keep, PSNR inside the object, over scenes of the validation split with "
        f"one to four references (`runs/peers.py`, `runs/kv.py`): sparse and KV each with the package's LoRA for it, "
        f"the others training-free." + _choice_since(_read("peers"), _read("kv"))
    )


def bench_default() -> str:
    """How long the benchmark takes when nothing is asked of it."""
    result = _read("bench_default")
    figures = result["figures"]
    return (
        f"`sparse-context bench --output results/bench_default.json` took {figures['took'] / 60:.1f} minutes for "
        f"{len(figures['rows'])} settings in {figures['turns']} turns after the warm-up, on {_machine(result)}."
    )


def bench_mini_asked() -> str:
    return _asked(check_mini(_read("bench_mini")["figures"]), "asked of it at keep 0.15, end to end")


def bench_klein_9b_blocks() -> str:
    if not (ROOT / "results" / "bench_klein_9b_blocks.json").exists():
        return "Not measured yet: `runs/bench_klein_9b_blocks.py`."
    result = _read("bench_klein_9b_blocks")
    config, figures = result["config"], result["figures"]
    (double, single), (doubles, singles) = figures["blocks"], figures["of"]
    return "\n".join(_bench_rows(figures)) + (
        f"\n\nTimes faster than dense: {double} double and {single} single block of klein-9B, which has {doubles} and "
        f"{singles}, {config['size']}x{config['size']} pixels, {config['dtype']}, random weights, {figures['turns']} "
        f"interleaved turns, on {_machine(result)} (`runs/bench_klein_9b_blocks.py`)."
    )


def bench_gpu() -> str:
    parts = []
    for path in sorted((ROOT / "results").glob("bench_gpu_*.json")):
        result = _read(path.stem)
        config, figures = result["config"], result["figures"]
        largest = max(row["size"] for row in figures["rows"])
        shown = {"rows": [row for row in figures["rows"] if row["size"] == largest]}
        parts.append(
            _asked(check(figures), "asked of it at keep 0.1")
            + "\n\n"
            + "\n".join(_bench_rows(shown))
            + f"\n\nTimes faster than dense: the shape of {config['model']}, random weights, "
            f"{largest}x{largest} pixels, {figures['steps']} steps, {config['dtype']}, {figures['turns']} interleaved "
            f"turn{'' if figures['turns'] == 1 else 's'}, on {config['device']} (`sparse-context bench`)."
        )
    return "\n\n".join(parts) or "Not measured yet, for want of a GPU: `runs/bench_gpu.sh` stands ready."


GPU_SHORT = (("dense", None), ("kv", None), ("downscaled", 0.1), ("merged", 0.1), ("sparse", 0.2), ("sparse", 0.1),
             ("sparse_cached", 0.1), ("sparse_kv", 0.1), ("no_references", None))  # fmt: skip


def bench_gpu_short() -> str:
    """Whole calls of the klein shapes on a GPU, in seconds: what a user waits for, and what memory denoising takes."""
    files = sorted((ROOT / "results").glob("bench_gpu_*.json"), reverse=True)
    if not files:
        return "Not measured yet, for want of a GPU: `runs/bench_gpu.sh` stands ready."
    lines = ["| shape | references | method | keep | end to end | denoising | its memory |", "|" + "---|" * 7]
    for path in files:
        result = _read(path.stem)
        for row in result["figures"]["rows"]:
            if row["size"] != 1024 or row["references"] != 4 or (row["method"], row["keep"]) not in GPU_SHORT:
                continue
            cells = [result["config"]["model"], str(row["references"]), row["method"].replace("_", " "),
                     "" if row["keep"] is None else f"{row['keep']:g}",
                     *(f"{row['seconds'][phase]['median']:.2f} s, {row['times faster'][phase]['median']:.1f}x"
                       for phase in ("total", "denoise")),
                     f"{row['memory']['denoise'] / 2**30:.1f} GiB"]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    config, figures = result["config"], result["figures"]
    return "\n".join(lines) + (
        f"\n\nThe shapes of FLUX.2 klein with random weights, 1024x1024 pixels, {figures['steps']} steps, "
        f"{config['dtype']}, {figures['turns']} turn{'' if figures['turns'] == 1 else 's'} after the warm-up, on one "
        f"{config['device']} (`sparse-context bench --random-weights`); "
        f"memory is what denoising takes beside the weights."
    )


def choosing_gpu() -> str:
    """What choosing takes of calls with four references on a GPU."""
    result = _read("choosing_gpu")
    config, figures = result["config"], result["figures"]
    lines = ["| method | encoding | choosing | denoising | whole call | choosing's share |", "|" + "---|" * 6]
    for row in figures["rows"]:
        seconds = {phase: times["median"] for phase, times in row["seconds"].items()}
        if seconds["selection"]:
            times = [f"{1000 * seconds[phase]:.0f} ms" for phase in ("encode", "selection", "denoise", "total")]
            share = seconds["selection"] / seconds["total"]
            lines.append(
                f"| {row['method'].replace('_', ' ')} | {' | '.join(times)} | {share:.1%} |".replace("%", " %")
            )
    return "\n".join(lines) + (
        f"\n\nThe shape of {config['model']}, random weights, {config['references'][0]} references of "
        f"{config['size'][0]}x{config['size'][0]} pixels, keep {config['keep'][0]:g}, {figures['turns']} "
        f"turn{'' if figures['turns'] == 1 else 's'} after a warm-up, on {config['device']} beside "
        f"{result['hardware']['cores']} cores of {result['hardware']['cpu']} (`sparse-context bench`, which waits for "
        "the device between the parts of a call)."
    )


def flops() -> str:
    """What the FLOPs of klein-9B allow, from the model of speed/flops.py: 1024 x 1024 pixels, four steps."""
    shape, grid = SHAPES["klein-9b"], 64 * 64
    lines = [
        "| references | none at all | keep 0.2 | keep 0.1 | KV | keep 0.2 + KV | keep 0.1 + KV |",
        "|" + "---|" * 7,
    ]
    for count in (1, 2, 4, 8, 10):
        cells = []
        for keep, kv in ((0, False), (0.2, False), (0.1, False), (1.0, True), (0.2, True), (0.1, True)):
            dense, other = (Tokens(shape.text, grid, round(k * grid * count)) for k in (1.0, keep))
            cells.append(f"{call_flops(shape, dense, 4) / call_flops(shape, other, 4, kv):.2f}x")
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts() -> str:
    result = _read("parts")
    figures = result["figures"]
    lines = ["| what | milliseconds |", "|---|---|"]
    lines += [f"| {name} | {value:.1f} |" for name, value in figures["milliseconds"].items()]
    apart = figures["largest difference from one by one"]
    return "\n".join(lines) + (
        f"\n\nProcessor time on one thread: 1024x1024 pixels in float32, and four references of 128x128 pixels by the "
        f"embedded model's VAE; {_machine(result)} (`runs/time_parts.py`). Latents differ from those encoded one by "
        f"one by at most {apart['as a batch']:.1g} as a batch and {apart['channels last']:.1g} in channels-last order."
    )


def training_speed() -> str:
    if not (ROOT / "results" / "training_speed.json").exists():
        return "Not measured yet: `runs/time_training.py`."
    result = _read("training_speed")
    config = result["config"]
    return (
        f"A step of LoRA fine-tuning with {config['references']} references at keep {config['keep']} is "
        f"{_times(result['figures']['times faster'])} as fast as with all tokens: the embedded model, "
        f"{config['batch']} samples, {config['dtype']}, {config['turns']} interleaved turns, on {_machine(result)} "
        f"(`runs/time_training.py`). The dense step has too many tokens for the attention by matrix products that the "
        f"sparse one takes (`training/attention.py`), which is a part of the ratio."
        + (
            ""
            if config["memory is reused"]
            else " Memory was not reused between steps, which costs the dense one more."
        )
    )


def klein_training() -> str:
    """What a step of fine-tuning takes at the shape of klein-4B."""
    if not _measured("klein_training"):
        return "Not measured yet: `runs/time_klein_training.py`."
    result = _read("klein_training")
    config, figures = result["config"], result["figures"]
    part = " and ".join(
        f"{own} of {all_of} {kind}"
        for own, all_of, kind in zip(figures["blocks"], figures["of"], ("double", "single"), strict=True)
    )
    memory = {name: f"{size / 2**30:.2f} GiB" for name, size in figures["memory above the weights"].items()}
    tokens = {name: each["references"] for name, each in figures["tokens"].items()}
    return (
        f"A step of LoRA fine-tuning (rank {config['rank']}, {config['dtype']}, gradient checkpointing, one sample of "
        f"{config['size']}x{config['size']} pixels with {config['references']} references) on {tokens['sparse']} of "
        f"{tokens['dense']} reference tokens is {_times(figures['times faster'])} as fast as on all, and takes "
        f"{memory['sparse']} beside the weights, not {memory['dense']}: {part} blocks of the shape of "
        f"{config['shape']}, random weights, on {_machine(result)} (`runs/time_klein_training.py`)."
    )


CURVES = {
    "subjects": ("psnr_in_mask", "subject"),
    "edits": ("psnr_in_mask", "edit"),
    "global edits": ("psnr", "global"),
}
"""The groups of runs/mini_curves.py: the score that counts there, and the task whose own choice is shown."""


OWN = "the task's own"
OWN_MERGED = OWN + ", 30 % averages"


def _line(cell: dict) -> str:
    """What a cell of a result has in common with those of other keeps."""
    name = OWN if cell["selector"] == "auto" else cell["selector"]
    name += f", {cell['coverage']:.0%} spread".replace("%", " %") if cell["coverage"] else ""
    return name + (f", {cell['merge']:.0%} averages".replace("%", " %") if cell.get("merge") else "")


def _curve_cells(result: dict) -> dict[str, dict[float, str]]:
    """The cells of each line of the curves: {line: {keep: cell}}."""
    lines: dict[str, dict[float, str]] = {}
    for name, cell in result["config"]["cells"].items():
        if name != "dense":
            lines.setdefault(_line(cell), {})[cell["keep"]] = name
    return lines


def _difference(cells: dict, name: str, score: str, interval: bool = True) -> str:
    """What a setting gains or loses; empty where no sample has it."""
    entry = cells.get(name, {}).get("scores", {}).get(score, {})
    if "difference" not in entry:
        return ""
    low, high = entry["difference_interval"] or (None, None)
    return f"{entry['difference']:+.1f}" + (f" ({low:+.1f} to {high:+.1f})" if interval and low is not None else "")


def _curves(name: str, against: str) -> str:
    result = _read(name) if (ROOT / "results" / f"{name}.json").exists() else {"figures": {}}
    if against not in result["figures"]:
        return "Not measured yet: `runs/mini_curves.py`."
    lines, parts = _curve_cells(result), []
    keeps = sorted({keep for cells in lines.values() for keep in cells}, reverse=True)
    for group, (score, _) in CURVES.items():
        cells = result["figures"][against][group]
        dense = cells["dense"]["scores"][score]
        head = f"**{group.capitalize()}**, {dense['n']} scenes. The dense base has {dense['mean']:.1f} dB"
        full = _difference(cells, "all tokens", score)
        head += f"; fine-tuned, with all tokens: {full}." if full else "."
        table = ["| tokens kept | " + " | ".join(lines) + " |", "|---|" + "---|" * len(lines)]
        for keep in keeps:
            row = [_difference(cells, kept.get(keep, ""), score) for kept in lines.values()]
            table.append(f"| {keep:g} | " + " | ".join(row) + " |")
        parts.append(head + "\n\n" + "\n".join(table))
    config = result["config"]
    few = min(cell["limit"] for cell in config["cells"].values())
    return "\n\n".join(parts) + (
        f"\n\nDecibels of PSNR gained or lost against the dense base with all tokens, and the 95 % interval of that: "
        f"scenes of the {config['split']} split, at some keeps only the first of them, {few} of all groups together. "
        f"Measured on {_machine(result)} (`runs/mini_curves.py`)." + _choice_since(result)
    )


def curves_base(name: str = "mini_curves_base") -> str:
    return _curves(name, "groups")


def curves(name: str = "mini_curves") -> str:
    return _curves(name, "to the dense base")


TARGETS = (
    ("subjects", 0.2, -0.3),
    ("subjects", 0.1, -1.0),
    ("subjects", 1, -0.1),
    ("edits", 1, -0.1),
    ("global edits", 1, -0.1),
)
"""What was to be reached after the fine-tuning: (group, keep, the most that may be lost against the dense base)."""


def targets() -> str:
    """What was asked of the fine-tuning and what it reached, on both splits."""
    found = {name: _read(name) for name in ("mini_curves", "mini_curves_test") if _measured(name)}
    rows = ["| tokens kept | by | at most | " + " | ".join(each["config"]["split"] for each in found.values()) + " |",
            "|" + "---|" * (3 + len(found))]  # fmt: skip
    for group, keep, bound in TARGETS:
        for selector in (OWN, "saliency") if keep < 1 else ("",):
            cells = []
            for result in found.values():
                figures = result["figures"]["to the dense base"][group]
                name = _curve_cells(result)[selector][keep] if selector else "all tokens"
                entry = figures[name]["scores"][CURVES[group][0]]
                reached = "" if entry["difference"] >= bound else ", **short**"
                cells.append(_difference(figures, name, CURVES[group][0]) + reached)
            rows.append(
                f"| {group}, {'all' if keep == 1 else f'{keep:g}'} | {selector} | {bound:+.1f} | {' | '.join(cells)} |"
            )
    counts = "; ".join(
        ", ".join(f"{result['figures']['to the dense base'][group]['dense']['samples']} {group}" for group in CURVES)
        + f" of the {result['config']['split']} split"
        for result in found.values()
    )
    return "\n".join(rows) + (
        f"\n\nDecibels of PSNR that the fine-tuned model gains or loses against the dense base with all tokens, and "
        f"what it was to lose at most: {counts}. Measured on {_machine(result)} (`runs/mini_curves.py`)."
        + _choice_since(*found.values())
    )


def over_random() -> str:
    """What the tasks' own choice wins over random tokens."""
    names = ("mini_curves_base", "mini_curves", "mini_curves_base_test", "mini_curves_test")
    columns = {**{group: (group, score) for group, (score, _) in CURVES.items()},
               "edits, whole picture": ("edits", "psnr")}  # fmt: skip
    rows = ["| weights | split | tokens kept | " + " | ".join(columns) + " |", "|" + "---|" * (3 + len(columns))]
    results = [_read(name) for name in names if _measured(name)]
    for result in results:
        arm = "training-free" if result["config"]["lora"] == "none" else "fine-tuned"
        for keep in ("0.2", "0.1"):
            groups = result["figures"]["over random"][keep]
            won = [_difference(groups[group], "auto", score) for group, score in columns.values()]
            rows.append(f"| {arm} | {result['config']['split']} | {keep} | {' | '.join(won)} |")
    return "\n".join(rows) + (
        f"\n\nDecibels of PSNR won over random tokens by what each task chooses itself, scene by scene, and the 95 % "
        f"interval of that. Measured on {_machine(result)} (`runs/mini_curves.py`)." + _choice_since(*results)
    )


def recognised() -> str:
    """How often the object is nearest to itself, against the tokens kept."""
    results = [_read(name) for name in ("mini_curves_base_test", "mini_curves_test") if _measured(name)]
    kinds = {"the task's own": "auto", "random": "random", "mask": "mask"}
    keeps = ("0.5", "0.2", "0.1")
    columns = [f"{kind}, {keep}" for kind in kinds for keep in keeps]
    rows = ["| weights | objects of | all tokens | " + " | ".join(columns) + " |", "|" + "---|" * (3 + len(columns))]
    for result in results:
        arm = "training-free" if result["config"]["lora"] == "none" else "fine-tuned"
        for group in ("subjects", "edits"):
            figures = result["figures"]["groups"][group]
            cells = ["dense", *(f"{kind}-{keep}" for kind in kinds.values() for keep in keeps)]
            shares = [
                f"{figures[cell]['scores']['recognised_in_mask']['mean']:.0%}".replace("%", " %") for cell in cells
            ]
            rows.append(f"| {arm} | {group} | {' | '.join(shares)} |")
    return "\n".join(rows) + (
        f"\n\nHow many of the objects are nearest to themselves among 64 candidates by EfficientNet features: "
        f"{result['config']['split']} split. Measured on {_machine(result)} (`runs/mini_curves.py`)."
        + _choice_since(*results)
    )


def by_kept() -> str:
    """What subjects lose where all of their objects was kept, and where it was not."""
    names = ("mini_curves_base", "mini_curves", "mini_curves_base_test", "mini_curves_test")
    rows = ["| weights | split | tokens kept | objects kept whole | in part |", "|" + "---|" * 5]
    results = [_read(name) for name in names if _measured(name)]
    for result in results:
        arm = "training-free" if result["config"]["lora"] == "none" else "fine-tuned"
        for keep, parts in result["figures"]["subjects by what was kept"].items():
            cells = [f"{_difference(parts[part], 'auto', 'psnr_in_mask')}, {parts[part]['auto']['samples']} scenes"
                     if part in parts else "" for part in ("whole", "in part")]  # fmt: skip
            rows.append(f"| {arm} | {result['config']['split']} | {keep} | {' | '.join(cells)} |")
    return "\n".join(rows) + (
        f"\n\nDecibels of PSNR inside objects against the dense base with all tokens, and the 95 % interval of that, "
        f"of subjects by what the task's own choice kept: at least 99 % of the area of each object, or less of one. "
        f"Measured on {_machine(result)} (`runs/mini_curves.py`)." + _choice_since(*results)
    )


def global_keep() -> str:
    """What an edit of the whole picture loses just below all tokens."""
    result = _read("global_keep")
    arms = ("training-free", "fine-tuned")
    keeps = [f"{keep:g}" for keep in result["config"]["keeps"]]
    rows = ["| weights | all tokens | " + " | ".join(keeps) + " |", "|" + "---|" * (2 + len(keeps))]
    for arm in arms:
        whole = _difference(result["figures"], f"{arm}, dense", "psnr") or "0"
        cells = [_difference(result["figures"], f"{arm}, auto-{keep}", "psnr") for keep in keeps]
        rows.append(f"| {arm} | {whole} | {' | '.join(cells)} |")
    dense = result["figures"]["dense"]
    return "\n".join(rows) + (
        f"\n\nDecibels of PSNR of the whole picture against the dense base with all tokens, and the 95 % interval of "
        f"that: {dense['samples']} global edits of the {result['config']['split']} split, evenly spread tokens. "
        f"Measured on {_machine(result)} (`runs/global_keep.py`)."
    )


def recall() -> str:
    """How much of the subject's tokens the saliency net's selector finds, beside simpler ways."""
    result = _read("saliency")
    ways = ("saliency", "net", "contrast", "centre", "edges", "uniform")
    rows = ["| pictures | | " + " | ".join(ways) + " |", "|" + "---|" * (2 + len(ways))]
    for name, figures in result["figures"].items():
        if isinstance(figures, dict) and "recall" in figures:
            found = figures["recall"]
            cells = [f"{found[way]['0.2']['recall']:.2f}" if way in found else "" for way in ways]
            rows.append(f"| {name} | {figures['pictures']} | {' | '.join(cells)} |")
    return "\n".join(rows) + (
        f"\n\nRecall of the subject at keep 0.2: what was kept of it, as a share of what the best choice of as many "
        f"tokens keeps. `saliency` is the selector, `net` the net alone. The selector takes "
        f"{result['figures']['time']['milliseconds']['saliency']['median']:.0f} ms of one core for a reference of one "
        f"megapixel. Measured on {_machine(result)} (`runs/saliency.py`)."
    )


def behind() -> str:
    """How many objects are kept whole, by what is behind them in the reference."""
    result = _read("saliency")
    if "objects kept whole" not in result["figures"]:
        return "Not measured yet: `runs/saliency.py`."
    splits = result["figures"]["objects kept whole"]
    rows = ["| split | tokens kept | " + " | ".join(next(iter(splits.values()))) + " |", "|---|---|---|---|---|"]
    for split, kinds in splits.items():
        for keep in ("0.2", "0.1"):
            cells = [f"{kind[keep]['whole']:.0%} of {kind['objects']}".replace("%", " %") for kind in kinds.values()]
            rows.append(f"| {split} | {keep} | {' | '.join(cells)} |")
    return "\n".join(rows) + (
        f"\n\nObjects of subjects' references of which `subject` keeps at least 99 % of the area, by what they were "
        f"pasted onto: a texture, a photograph of a place, or one that shows a thing of its own. Measured on "
        f"{_machine(result)} (`runs/saliency.py`)."
    )


def _measured(name: str) -> bool:
    return (ROOT / "results" / f"{name}.json").exists()


def curves_short() -> str:
    """What each task's own choice of tokens costs: training-free, and fine-tuned where that was measured."""
    if not _measured("mini_curves_base_test"):
        return "Not measured yet: `runs/mini_curves.py`."
    before = _read("mini_curves_base_test")
    arms, results = {"training-free": before["figures"]["groups"]}, [before]
    if _measured("mini_curves_test"):
        results.append(_read("mini_curves_test"))
        arms["fine-tuned"] = results[-1]["figures"]["to the dense base"]
    lines = _curve_cells(before)
    rows = ["| weights | task | by | the rest | all tokens | keep 0.5 | 0.2 | 0.1 | 0.1, at random |", "|" + "---|" * 9]
    for arm, groups in arms.items():
        for group, (score, task) in CURVES.items():
            cells = groups[group]
            full = f"{cells['dense']['scores'][score]['mean']:.1f} dB"
            selector, coverage = task_defaults(task, 1)
            by = selector if isinstance(selector, str) else ",".join(f"{name}={w:g}" for name, w in selector.items())
            by += f", {coverage:.0%} spread".replace("%", " %") if coverage else ""
            for line, rest in ((OWN, "dropped"), (OWN_MERGED, "averaged")):
                kept = [lines[line][0.5], lines[line][0.2], lines[line][0.1], lines["random"][0.1]]
                row = [arm, group, by, rest, _difference(cells, "all tokens", score, interval=False) or full]
                row += [_difference(cells, name, score, interval=False) for name in kept]
                rows.append("| " + " | ".join(row) + " |")
    scenes = before["figures"]["groups"]["all"]["dense"]["samples"]
    few = min(cell["limit"] for cell in before["config"]["cells"].values())
    return "\n".join(rows) + (
        f"\n\nDecibels of PSNR against the dense base with all tokens (subjects and edits: inside the object), on the "
        f"same noise; averaged is `merge=0.3`: the embedded model, {scenes} scenes of the "
        f"{before['config']['split']} split, at 0.5 the first {few} of them, on {_machine(before)} "
        f"(`runs/mini_curves.py`). [docs/quality.md](docs/quality.md) has every keep and selector, "
        f"intervals, curves and pictures." + _choice_since(*results)
    )


def _ablations(name: str = "ablations") -> tuple[dict, str]:
    """The result, and a line on how it was made."""
    result = _read(name)
    config = result["config"]
    base = result["figures"]["against dense"]["base"]
    counts = {group: base[group]["dense"]["samples"] for group in CURVES if group in base}
    steps = sorted({record["steps"] for record in config["runs"].values()})
    runs = "each run" if len(steps) == 1 else "the runs"
    other = " where no line says otherwise" if any(":" in run for run in config["runs"]) else ""
    how = (
        f"{', '.join(f'{count} {group}' for group, count in counts.items())} of the {config['split']} split; "
        f"{', '.join(map(str, steps))} steps of {runs}, of whose change {config['scale']:g} of a LoRA of rank "
        f"{config['rank']} is taken{other}. Measured on {_machine(result)} (`runs/ablations.py`)."
    )
    return result, how + _choice_since(result) + _of_its_time(
        next(iter(config["runs"].values()))["base_weights"], _read("kv")["config"]["adapter"]["base_weights"]
    )


def ablations(name: str = "ablations") -> str:
    """What variants of the fine-tuning win over the base, with what the tasks choose."""
    if not _measured(name):
        return "Not measured yet: `runs/ablations.py`."
    result, how = _ablations(name)
    keeps = result["config"]["keeps"]
    parts = []
    for group, (score, _) in CURVES.items():
        head = " | ".join(f"at {keep:g}" for keep in keeps)
        rows = [f"| {group} | all tokens | {head} |", "|" + "---|" * (len(keeps) + 2)]
        base = result["figures"]["against dense"]["base"][group]
        cells = [_difference(base, f"auto-{keep:g}", score, interval=False) for keep in keeps]
        rows.append(f"| the base, against all tokens | | {' | '.join(cells)} |")
        for run, groups in result["figures"]["won"].items():
            if run in result["config"]["runs"] and f"auto-{keeps[0]:g}" in groups[group]:
                full = _difference(result["figures"]["against dense"][run][group], "all tokens", score)
                cells = [_difference(groups[group], f"auto-{keep:g}", score) for keep in keeps]
                rows.append(f"| {run} | {full} | {' | '.join(cells)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + f"\n\nDecibels of PSNR won over the base with the same tokens: {how}"


def ablations_selectors(name: str = "ablations") -> str:
    """Random sets alone against the mix, for every selector: a difference of pairs."""
    if not _measured(name):
        return "Not measured yet: `runs/ablations.py`."
    result, how = _ablations(name)
    pair = "mix over random"
    rows = ["| selector | " + " | ".join(CURVES) + " |", "|" + "---|" * (len(CURVES) + 1)]
    for selector in ("auto", "random", "uniform", "edges", "saliency", "subject", "mask"):
        if f"{selector}-{result['config']['keeps'][0]:g}" not in result["figures"]["pairs"][pair]["all"]:
            continue
        for keep in result["config"]["keeps"]:
            cells = [_difference(result["figures"]["pairs"][pair][group], f"{selector}-{keep:g}", score)
                     for group, (score, _) in CURVES.items()]  # fmt: skip
            rows.append(f"| {OWN if selector == 'auto' else selector} at {keep:g} | {' | '.join(cells)} |")
    return "\n".join(rows) + f"\n\nDecibels of PSNR that {pair} wins, scene by scene, with the same tokens: {how}"


def ablations_won(name: str = "ablations_length") -> str:
    """What the runs that were measured with every selector win over the base, by selector."""
    if not _measured(name):
        return "Not measured yet: `runs/ablations.py`."
    result, how = _ablations(name)
    config = result["config"]
    runs = [run for run in (config.get("shipped"), *config["all selectors"]) if run]
    groups = [group for group in CURVES if group != "global edits"]
    columns = [(run, group) for run in runs for group in groups]
    rows = ["| selector | " + " | ".join(f"{run}, {group}" for run, group in columns) + " |",
            "|" + "---|" * (len(columns) + 1)]  # fmt: skip
    for selector in ("random", "uniform", "edges", "saliency", "subject", "mask"):
        for keep in config["keeps"]:
            cells = [_difference(result["figures"]["won"][run][group], f"{selector}-{keep:g}", CURVES[group][0])
                     for run, group in columns]  # fmt: skip
            rows.append(f"| {selector} at {keep:g} | {' | '.join(cells)} |")
    return "\n".join(rows) + f"\n\nDecibels of PSNR won over the base with the same tokens: {how}"


def ablations_random() -> str:
    """Random sets alone, by learning rate, loss and how much of what they changed is taken, for every selector."""
    if not _measured("ablations_random"):
        return "Not measured yet: `runs/ablations.py`."
    result, how = _ablations("ablations_random")
    (keep,) = result["config"]["keeps"]
    selectors = ("auto", "random", "uniform", "edges", "saliency", "subject", "mask")
    parts = []
    for group in ("subjects", "edits"):
        score = CURVES[group][0]
        head = " | ".join(OWN if selector == "auto" else selector for selector in selectors)
        rows = [f"| {group} | rank | share | all tokens | {head} |", "|" + "---|" * (len(selectors) + 4)]
        base = result["figures"]["against dense"]["base"][group]
        cells = [_difference(base, f"{selector}-{keep:g}", score) for selector in selectors]
        rows.append(f"| the base, against all tokens | | | | {' | '.join(cells)} |")
        for run, record in result["config"]["runs"].items():
            name, _, cut = run.partition(":")
            cells = [name, cut.partition(":")[0] or str(result["config"]["rank"]), f"{record['share']:g}"]
            cells.append(_difference(result["figures"]["against dense"][run][group], "all tokens", score))
            won = result["figures"]["won"][run][group]
            cells += [_difference(won, f"{selector}-{keep:g}", score) for selector in selectors]
            rows.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + (
        f"\n\nDecibels of PSNR inside the object won over the base with the same tokens, at keep {keep:g}; with all "
        f"tokens, over the base with all tokens. All of a change has rank 256. The edits are recoloured backgrounds. "
        f"{how[0].upper()}{how[1:]}"
    )


def ablations_pairs(name: str = "ablations") -> str:
    """Runs against each other, with what the tasks choose."""
    if not _measured(name):
        return "Not measured yet: `runs/ablations.py`."
    result, how = _ablations(name)
    keeps = result["config"]["keeps"]
    columns = [(group, score, keep) for group, (score, _) in CURVES.items() for keep in keeps]
    rows = ["| runs | " + " | ".join(f"{group} at {keep:g}" for group, _, keep in columns) + " |",
            "|" + "---|" * (len(columns) + 1)]  # fmt: skip
    for pair, groups in result["figures"]["pairs"].items():
        cells = [_difference(groups[group], f"auto-{keep:g}", score) for group, score, keep in columns]
        rows.append(f"| {pair} | {' | '.join(cells)} |")
    return "\n".join(rows) + f"\n\nDecibels of PSNR, scene by scene: {how}"


def ablations_coverage() -> str:
    """Tokens that are spread evenly in training, and at inference."""
    if not (ROOT / "results" / "ablations.json").exists():
        return "Not measured yet: `runs/ablations.py`."
    result, how = _ablations()
    keep = result["config"]["keeps"][0]
    groups = [group for group in CURVES if group != "global edits"]
    columns = [(group, score, spread) for group in groups for score in ("psnr_in_mask", "psnr") for spread in (0, 0.3)]
    places = {"psnr_in_mask": "object", "psnr": "picture"}
    head = " | ".join(f"{group}, {places[score]}, {spread:.0%} spread" for group, score, spread in columns)
    rows = [f"| run | {head} |", "|" + "---|" * (len(columns) + 1)]
    for run in ("base", *result["config"]["all selectors"], *result["config"]["spread"]):
        figures = result["figures"]["against dense"][run]
        cells = [
            _difference(figures[group], f"auto-{keep:g}-coverage={spread:g}", score, interval=False)
            for group, score, spread in columns
        ]
        rows.append(f"| {run} | {' | '.join(cells)} |")
    return "\n".join(rows) + f"\n\nDecibels of PSNR at keep {keep:g} against the dense base with all tokens: {how}"


def ablations_methods(name: str = "ablations") -> str:
    """The peers' ways of saving tokens, each fine-tuned for as long."""
    if not _measured(name):
        return "Not measured yet: `runs/ablations.py`."
    result, how = _ablations(name)
    keeps, methods = result["config"]["keeps"], result["config"]["methods"]
    groups = {group: score for group, (score, _) in CURVES.items() if group != "global edits"}
    columns = [(group, keep) for group in groups for keep in keeps]
    rows = ["| way | " + " | ".join(f"{group} at {keep:g}" for group, keep in columns) + " |",
            "|" + "---|" * (len(columns) + 1)]  # fmt: skip
    figures = result["figures"]["against dense"]
    own = next(iter(result["config"]["runs"]))
    for name, method, run in (("sparse", "auto", own), *((name, name, name) for name in methods)):
        for shown, of in ((f"{name}, training-free", "base"), (f"{name}, fine-tuned", run)):
            cells = [_difference(figures[of][group], f"{method}-{keep:g}", groups[group]) for group, keep in columns]
            rows.append(f"| {shown} | {' | '.join(cells)} |")
    for run, ways in result["figures"].get("over peers", {}).items():
        for method in methods:
            cells = [_difference(ways[method][group], f"auto-{keep:g}", groups[group]) for group, keep in columns]
            weights = "training-free" if run == "base" else "each fine-tuned"
            rows.append(f"| **sparse over {method}**, {weights} | {' | '.join(cells)} |")
    return "\n".join(rows) + (
        "\n\nDecibels of PSNR inside the object against the dense base with all tokens"
        + (", and in bold of one way over the other, scene by scene" if "over peers" in result["figures"] else "")
        + f": {how}"
    )


def peers(name: str = "peers") -> str:
    """Quality at equal numbers of tokens."""
    if not (ROOT / "results" / f"{name}.json").exists():
        return "Not measured yet: `runs/peers.py`."
    result = _read(name)
    methods, keeps = result["config"]["methods"], result["config"]["keeps"]
    rows = ["| task | keep | " + " | ".join(methods) + " |", "|" + "---|" * (len(methods) + 2)]
    for group, (score, _) in CURVES.items():
        for keep in keeps:
            cells = [_difference(result["figures"][group], f"{method} {keep:g}", score) for method in methods]
            rows.append(f"| {group} | {keep:g} | " + " | ".join(cells) + " |")
    samples = result["figures"]["all"]["dense"]["samples"]
    whole = "sparse, fine-tuned, all tokens"
    kept = [f"{group} {_difference(result['figures'][group], whole, score)}" for group, (score, _) in CURVES.items()
            if whole in result["figures"][group]]  # fmt: skip
    also = f" Fine-tuned and with all tokens: {', '.join(kept)}." if kept else ""
    tokens = result["figures"].get("tokens")
    if tokens:
        counts = [
            f"{keep:g}: " + ", ".join(f"{method} {n}" for method, n in tokens[f"{keep:g}"].items() if method != "dense")
            for keep in keeps
        ]
        also += f" Reference tokens of all scenes, of {tokens[f'{keeps[0]:g}']['dense']}: {'; '.join(counts)}."
    return "\n".join(rows) + (
        f"\n\nDecibels of PSNR against the dense base with all tokens, and the 95 % interval of that: {samples} scenes "
        f"of the {result['config']['split']} split, on {_machine(result)} (`runs/peers.py`).{also}"
        + _choice_since(result)
    )


def peers_pairs(name: str = "peers_sides") -> str:
    """The other ways against sparse, scene by scene."""
    if not _measured(name):
        return "Not measured yet: `runs/peers.py`."
    result = _read(name)
    ways = [way for way in result["config"]["methods"] if way not in ("sparse", "copied and filled")]
    rows = ["| task | keep | " + " | ".join(ways) + " |", "|" + "---|" * (len(ways) + 2)]
    for group, (score, _) in CURVES.items():
        for keep in result["config"]["keeps"]:
            cells = [_difference(result["figures"]["to sparse"][f"{keep:g}"][group], way, score) for way in ways]
            rows.append(f"| {group} | {keep:g} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + (
        f"\n\nDecibels of PSNR against `sparse`, training-free, scene by scene, and the 95 % interval of that: "
        f"{result['figures']['all']['dense']['samples']} scenes of the {result['config']['split']} split, on "
        f"{_machine(result)} (`runs/peers.py`)." + _choice_since(result)
    )


def other_scores() -> str:
    """What else was measured of the outputs, before and after the fine-tuning."""
    results = {"training-free": _read("mini_curves_base"), "fine-tuned": _read("mini_curves")}
    scores = {"ssim": "SSIM", "st_lpips": "ST-LPIPS", "identity": "identity", "psnr_to_dense": "PSNR to all tokens"}
    cells = {"all tokens": "dense", "0.2": "auto-0.2", "0.1": "auto-0.1", "random, 0.2": "random-0.2",
             "random, 0.1": "random-0.1"}  # fmt: skip
    rows = ["| score | of | weights | " + " | ".join(cells) + " |", "|" + "---|" * (len(cells) + 3)]
    for score, shown in scores.items():
        for group, (psnr, _) in CURVES.items():
            for weights, result in results.items():
                name = score if score.endswith("to_dense") else score + psnr.removeprefix("psnr")
                found = (result["figures"]["groups"][group][cell]["scores"].get(name) for cell in cells.values())
                means = (_mean(entry, 1 if "psnr" in score else 2) if entry else "" for entry in found)
                rows.append(f"| {shown} | {group} | {weights} | {' | '.join(means)} |")
    config = results["fine-tuned"]["config"]
    return "\n".join(rows) + (
        f"\n\nAgainst the truth, inside the object or, for global edits, of the whole picture; the last against what "
        f"the same weights make of all tokens, of the whole picture, in dB. More is better but for ST-LPIPS. What each "
        f"task chooses itself, {config['split']} split, and 95 % intervals. Measured on "
        f"{_machine(results['fine-tuned'])} "
        f"(`runs/mini_curves.py`)." + _choice_since(*results.values())
    )


def _mean(entry: dict, digits: int) -> str:
    low, high = entry["interval"]
    return f"{entry['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def tuned() -> str:
    """What the adapter wins over the training-free base with the same tokens."""
    rows = ["| split | tokens kept | " + " | ".join(CURVES) + " |", "|" + "---|" * (len(CURVES) + 2)]
    results = [_read(name) for name in ("mini_curves", "mini_curves_test") if _measured(name)]
    for result in results:
        for keep in ("0.5", "0.2", "0.1"):
            groups = result["figures"]["won by fine-tuning"][keep]
            won = [_difference(groups[group], "auto", score) for group, (score, _) in CURVES.items()]
            rows.append(f"| {result['config']['split']} | {keep} | " + " | ".join(won) + " |")
    return "\n".join(rows) + (
        f"\n\nDecibels of PSNR won over the training-free base with the same tokens, scene by scene, and the 95 % "
        f"interval of that. Measured on {_machine(result)} (`runs/mini_curves.py`)." + _choice_since(*results)
    )


def kv(name: str = "kv") -> str:
    """What KV mode costs, before and after a fine-tuning for it."""
    if not (ROOT / "results" / f"{name}.json").exists():
        return "Not measured yet: `runs/kv.py`."
    result = _read(name)
    rows = ["| weights and tokens | " + " | ".join(CURVES) + " |", "|" + "---|" * (len(CURVES) + 1)]
    for way in result["figures"]["all"]:
        if way != "dense":
            costs = [_difference(result["figures"][group], way, score) for group, (score, _) in CURVES.items()]
            rows.append(f"| {way} | " + " | ".join(costs) + " |")
    samples, adapter = result["figures"]["all"]["dense"]["samples"], result["config"]["adapter"]
    return "\n".join(rows) + (
        f"\n\nDecibels of PSNR against the plain pipeline on the dense base with all tokens, and the 95 % interval of "
        f"that: {samples} scenes of the {result['config']['split']} split; the LoRA was trained for {adapter['steps']} "
        f"steps. Measured on {_machine(result)} (`runs/kv.py`)." + _choice_since(result)
    )


def _curves_weights(lora: str) -> str:
    """The fingerprint of the weights that the curves were measured with: of the dense base, or of the adapter's."""
    return _read("mini_curves_base" if lora == "none" else "mini_curves")["config"]["weights"]


def auto_budget(name: str = "auto_budget") -> str:
    """What an adaptive budget gains over a fixed ratio of as many tokens."""
    if not (ROOT / "results" / f"{name}.json").exists():
        return "Not measured yet: `runs/auto_budget.py`."
    result = _read(name)
    rows = ["| task | mass | keeps | auto, against the fixed ratio |", "|---|---|---|---|"]
    for group, (score, task) in CURVES.items():
        if task == "global":  # which keeps all
            continue
        for mass, groups in result["figures"].items():
            kept = f"{groups[group]['auto']['kept']:.0%}".replace("%", " %")
            rows.append(f"| {group} | {mass} | {kept} | {_difference(groups[group], 'auto', score)} |")
    samples = result["figures"][str(mass)]["all"]["dense"]["samples"]
    weights = "the dense base" if result["config"]["lora"] == "none" else "the embedded model as it is shipped"
    return "\n".join(rows) + (
        f"\n\nDecibels of PSNR, and the 95 % interval of that: {weights}, {samples} scenes of the "
        f"{result['config']['split']} split, on {_machine(result)} (`runs/auto_budget.py`). What the fixed ratio "
        f"has is interpolated, scene by scene, between the nearest that were run."
        + _choice_since(result)
        + _of_its_time(result["config"]["weights"], _curves_weights(result["config"]["lora"]))
    )


def coverage(name: str = "coverage") -> str:
    """What evenly spread tokens among the kept ones buy, of the picture and of the object."""
    if not (ROOT / "results" / f"{name}.json").exists():
        return "Not measured yet: `runs/coverage.py`."
    result = _read(name)
    config, figures = result["config"], result["figures"]
    shares = [f"{share:.0%} spread".replace("%", " %") for share in config["coverages"]]
    rows = ["| task | PSNR | " + " | ".join(shares) + " |", "|" + "---|" * (len(shares) + 2)]
    for group in ("subjects", "edits"):
        for score, where in (("psnr_in_mask", "inside the object"), ("psnr", "of the whole picture")):
            settings = figures[group]
            found = [_difference(settings, name, score) for name in settings if name != "dense"]
            without = settings["dense"]["scores"][score]["mean"]
            rows.append(f"| {group} | {where} | {without:.1f} dB | " + " | ".join(found) + " |")
    weights = "the dense base" if config["lora"] == "none" else "the embedded model as it is shipped"
    return "\n".join(rows) + (
        f"\n\nDecibels gained or lost against no spread tokens, at keep {config['keep']:g}, and the 95 % interval of "
        f"that: {weights}, {figures['all']['dense']['samples']} scenes of the {config['split']} split, on "
        f"{_machine(result)} (`runs/coverage.py`)."
        + _choice_since(result)
        + _of_its_time(config["weights"], _curves_weights(config["lora"]))
    )


BENCHMARKS = {"flops": flops, "parts": parts, "bench_mini": bench_mini, "bench_mini_asked": bench_mini_asked,
              "bench_default": bench_default,
               "bench_klein_9b_blocks": bench_klein_9b_blocks,
              "bench_gpu": bench_gpu, "choosing_gpu": choosing_gpu, "training_speed": training_speed}  # fmt: skip
TABLES = {"pipelines": pipelines, "bench_gpu_short": bench_gpu_short, "core_speed": core_speed,
          "bench_mini": bench_mini, "base_quality": base_quality,
          "curves_short": curves_short, "selection": selection}  # fmt: skip
PAGES = {
    "README.md": TABLES,
    "docs/quality.md": {
        "curves_base": curves_base,
        "curves_base_test": partial(curves_base, "mini_curves_base_test"),
        "global_keep": global_keep,
        "over_random": over_random,
        "auto_budget": auto_budget,
        "auto_budget_tuned": partial(auto_budget, "auto_budget_tuned"),
        "coverage": coverage,
        "coverage_tuned": partial(coverage, "coverage_tuned"),
        "peers": peers,
        "peers_test": partial(peers, "peers_test"),
        "peers_sides": partial(peers, "peers_sides"),
        "peers_pairs": peers_pairs,
        "other_scores": other_scores,
        "kv": kv,
        "kv_test": partial(kv, "kv_test"),
        "curves": curves,
        "curves_test": partial(curves, "mini_curves_test"),
        "targets": targets,
        "by_kept": by_kept,
        "behind": behind,
        "recognised": recognised,
        "tuned": tuned,
        "ablations": ablations,
        "ablations_pairs": ablations_pairs,
        "ablations_selectors": ablations_selectors,
        "ablations_length": partial(ablations, "ablations_length"),
        "ablations_length_pairs": partial(ablations_pairs, "ablations_length"),
        "ablations_length_won": ablations_won,
        "ablations_length_selectors": partial(ablations_selectors, "ablations_length"),
        "ablations_random": ablations_random,
        "ablations_coverage": ablations_coverage,
        "ablations_methods": ablations_methods,
        "ablations_control": partial(ablations, "ablations_control"),
        "ablations_control_pairs": partial(ablations_pairs, "ablations_control"),
        "ablations_sides": partial(ablations_methods, "ablations_sides"),
    },
    "docs/adding-a-pipeline.md": {"lines": lines},
    "sparse_context/saliency.md": {"recall": recall},
    "sparse_context/mini/README.md": {"unlike": unlike},
    "docs/performance.md": BENCHMARKS,
    "docs/training.md": {"klein_training": klein_training},
}


def render(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """`text` with every table between `<!-- begin NAME -->` and `<!-- end NAME -->` made anew."""
    for name, make in tables.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the page has no markers for the table {name}")
        text = pattern.sub(rf"\g<1>{make()}\n\g<2>", text)
    return text


def main() -> None:
    for page, tables in PAGES.items():
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = render(before, tables)
        if "--check" in sys.argv[1:] and after != before:
            sys.exit(f"{page} is out of date: run `python runs/readme.py`")
        elif after != before:
            path.write_text(after, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
