"""Variants of the fine-tuning, each run as long: what they gain and lose on validation scenes.

    python runs/ablations.py [--all-selectors NAME ...] [--spread NAME ...] [--runs NAME ...] [--scale 0.6]
    python runs/ablations.py --shipped mix --all-selectors random --spread --runs dense --methods --rank 44 \\
        --checkpoints checkpoints/length --output results/ablations_length.json
    python runs/ablations.py --all-selectors random random:256:1 random-rate-3:256:1 random-plain-rate-3 \\
        random-plain-rate-3:256:1 default-plain-rate-3:256:1 random-plain-lora:8:1 \\
        --spread --runs --methods --keeps 0.2 --scenes 24 \\
        --turns edit_background subject_place edit_background subject_pair \\
        --output results/ablations_random.json
    python runs/ablations.py --shipped mix --all-selectors --spread --runs dense dense:256:1 --methods --rank 44 \\
        --checkpoints checkpoints/control --output results/ablations_control.json
    python runs/ablations.py --all-selectors --spread --runs mix --keeps 0.444 0.25 0.111 --scenes 24 \\
        --turns subject_place edit_background subject_pair subject_scene edit_object subject_quarters \\
        --checkpoints checkpoints/peers --output results/ablations_sides.json    # 192 pixels to 128, 96, 64

The runs are folders that runs/train_ablations.sh makes. What a run changed is taken as the package takes its own: the
LoRA of `--rank`, of a run of all weights the strongest directions of its change, and of that the share `--scale` (with
all tokens the harm grows with the square of the share, since the base had its minimum there, while the gain with
dropped tokens begins with its first power); `NAME:RANK:SHARE` takes another part of it. Every run is measured with what
the tasks choose by themselves, `auto`; those of `--spread` without and with spread tokens too, those of
`--all-selectors` with every selector as well, and those of `--methods`, which were fine-tuned for a peer's way of
saving tokens, with that alone. `--shipped` is a name for the package's own adapter, measured as it is, beside longer
runs (the second line): with every selector where a run is. Stopped at any point, it goes on there. The numbers are PSNR
against the truth, inside the object or, for global edits, of the whole picture: differences to the dense base with all
tokens, and what a run has won over the base, and over another run (`PAIRS`), with the same tokens, scene by scene; and
what `auto` has won over each peer's way with as many tokens, in the base and, each fine-tuned for its own, in a run.

It needs the scenes' objects: `python -m recipes.mini data`.
"""

import argparse
import json
from collections import defaultdict
from functools import partial
from itertools import product
from pathlib import Path

from held_out import scene_maker
from peers import PEERS, peer_maker
from tables import SCORES, difference, draw, read, score_of, table

from recipes.mini.data import load_assets
from recipes.mini.samples import FIRST_SEED, TURNS, scene_samples
from recipes.mini.sparse import export_adapter
from sparse_context.config import SparseContextConfig
from sparse_context.evaluation.evaluate import evaluate, fingerprint
from sparse_context.evaluation.grid import DENSE, Cell, grid
from sparse_context.evaluation.metrics import find_metrics
from sparse_context.evaluation.statistics import summarise
from sparse_context.pipelines.embedded import ADAPTERS, adapter_record
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
BASE = "base"
ALL = ["mix", "random"]
SPREAD = ["coverage-0", "coverage-0.3"]
RUNS = ["dense", "lora", "lora-distilled"]
PAIRS = (
    ("mix", "random"),
    ("mix", "dense"),
    ("mix", "dense:256:1"),
    ("mix", "coverage-0"),
    ("mix", "coverage-0.3"),
    ("lora-distilled", "lora"),
)
"""Runs that are compared with each other, for that is closer than each with the base."""


def read_run(text: str) -> tuple[str, int | None, float | None]:
    """Folder, rank and share of `NAME` or `NAME:RANK:SHARE`."""
    name, *cut = text.split(":")
    if not cut:
        return name, None, None
    rank, share = cut
    return name, int(rank), float(share)


OBJECTS = ("subjects", "edits")
"""The groups that are scored inside an object."""
SELECTORS = ("random", "uniform", "edges", "saliency", "subject", "mask")


def named(selector: str) -> str:
    return "task default" if selector == "auto" else selector


def won_by_keep(name: str = "ablations") -> str:
    """What each run wins over the base with the tokens that the tasks choose."""
    result = read(name)
    keeps, figures = result["config"]["keeps"], result["figures"]
    rows = []
    for group, of in SCORES.items():
        base = figures["against_dense"][BASE][group]
        cells = [difference(score_of(base, f"auto-{keep:g}", of), interval=False) for keep in keeps]
        rows.append([group, "the base, against all tokens", "", *cells])
        for run, groups in figures["won"].items():
            if run in result["config"]["runs"] and f"auto-{keeps[0]:g}" in groups[group]:
                full = difference(score_of(figures["against_dense"][run][group], "all tokens", of))
                cells = [difference(score_of(groups[group], f"auto-{keep:g}", of)) for keep in keeps]
                rows.append([group, run, full, *cells])
    return table(["task", "run", "all tokens", *(f"keep {keep:g}" for keep in keeps)], rows)


def pairs(name: str = "ablations") -> str:
    """Runs against each other, with the tokens that the tasks choose."""
    result = read(name)
    columns = [(group, of, keep) for group, of in SCORES.items() for keep in result["config"]["keeps"]]
    rows = [
        [pair, *(difference(score_of(groups[group], f"auto-{keep:g}", of)) for group, of, keep in columns)]
        for pair, groups in result["figures"]["pairs"].items()
    ]
    return table(["runs", *(f"{group}, keep {keep:g}" for group, _, keep in columns)], rows)


def mix_over_random(name: str = "ablations") -> str:
    """The mix against random sets alone, for every selector: a difference of pairs."""
    result = read(name)
    keeps, found = result["config"]["keeps"], result["figures"]["pairs"]["mix over random"]
    rows = [
        [
            f"{named(selector)}, keep {keep:g}",
            *(difference(score_of(found[group], f"{selector}-{keep:g}", of)) for group, of in SCORES.items()),
        ]
        for selector in ("auto", *SELECTORS)
        if f"{selector}-{keeps[0]:g}" in found["all"]
        for keep in keeps
    ]
    return table(["selector", *SCORES], rows)


def won_by_selector(name: str = "ablations_length") -> str:
    """What the runs that were measured with every selector win over the base, by selector."""
    result = read(name)
    config = result["config"]
    runs = [run for run in (config.get("shipped"), *config["all_selectors"]) if run]
    columns = [(run, group) for run in runs for group in OBJECTS]
    rows = [
        [
            f"{selector}, keep {keep:g}",
            *(
                difference(score_of(result["figures"]["won"][run][group], f"{selector}-{keep:g}", SCORES[group]))
                for run, group in columns
            ),
        ]
        for selector in SELECTORS
        for keep in config["keeps"]
    ]
    return table(["selector", *(f"{run}, {group}" for run, group in columns)], rows)


def random_alone() -> str:
    """Random sets alone, by learning rate, loss and how much of what they changed is taken, for every selector."""
    result = read("ablations_random")
    config, figures = result["config"], result["figures"]
    (keep,) = config["keeps"]
    selectors = ("auto", *SELECTORS)
    rows = []
    for group in OBJECTS:
        of = SCORES[group]
        base = figures["against_dense"][BASE][group]
        cells = [difference(score_of(base, f"{selector}-{keep:g}", of)) for selector in selectors]
        rows.append([group, "the base, against all tokens", "", "", "", *cells])
        for run, record in config["runs"].items():
            name, _, cut = run.partition(":")
            won = figures["won"][run][group]
            cells = [group, name, cut.partition(":")[0] or str(config["rank"]), f"{record['share']:g}"]
            cells.append(difference(score_of(figures["against_dense"][run][group], "all tokens", of)))
            rows.append([*cells, *(difference(score_of(won, f"{selector}-{keep:g}", of)) for selector in selectors)])
    return table(["task", "run", "rank", "share", "all tokens", *map(named, selectors)], rows)


def spread() -> str:
    """Evenly spread tokens, in training and at inference."""
    result = read("ablations")
    config = result["config"]
    columns = [(group, of, share) for group in OBJECTS for of in ("psnr_in_mask", "psnr") for share in (0, 0.3)]
    places = {"psnr_in_mask": "object", "psnr": "picture"}
    rows = []
    for run in (BASE, *config["all_selectors"], *config["spread"]):
        figures, setting = result["figures"]["against_dense"][run], f"auto-{config['keeps'][0]:g}-coverage"
        cells = (score_of(figures[group], f"{setting}={share:g}", of) for group, of, share in columns)
        rows.append([run, *(difference(cell, interval=False) for cell in cells)])
    return table(["run", *(f"{group}, {places[of]}, coverage {share:g}" for group, of, share in columns)], rows)


def methods(name: str = "ablations") -> str:
    """The peers' ways of saving tokens, each fine-tuned for as long."""
    result = read(name)
    keeps, peers, figures = result["config"]["keeps"], result["config"]["methods"], result["figures"]
    columns = [(group, keep) for group in OBJECTS for keep in keeps]
    own = next(iter(result["config"]["runs"]))

    def cells(settings: dict, method: str) -> list[str]:
        return [difference(score_of(settings[group], f"{method}-{keep:g}", SCORES[group])) for group, keep in columns]

    rows = []
    for shown, method, run in (("sparse", "auto", own), *((peer, peer, peer) for peer in peers)):
        rows.append([f"{shown}, training-free", *cells(figures["against_dense"][BASE], method)])
        rows.append([f"{shown}, fine-tuned", *cells(figures["against_dense"][run], method)])
    for run, ways in figures.get("over_peers", {}).items():
        weights = "training-free" if run == BASE else "each fine-tuned"
        rows += [[f"**sparse over {peer}**, {weights}", *cells(ways[peer], "auto")] for peer in peers]
    return table(["method", *(f"{group}, keep {keep:g}" for group, keep in columns)], rows)


TABLES = {
    "ablations": won_by_keep,
    "ablations-pairs": pairs,
    "ablations-selectors": mix_over_random,
    "ablations-coverage": spread,
    "ablations-methods": methods,
    "ablations_length": partial(won_by_keep, "ablations_length"),
    "ablations_length-pairs": partial(pairs, "ablations_length"),
    "ablations_length-won": won_by_selector,
    "ablations_length-selectors": partial(mix_over_random, "ablations_length"),
    "ablations_control": partial(won_by_keep, "ablations_control"),
    "ablations_control-pairs": partial(pairs, "ablations_control"),
    "ablations_random": random_alone,
    "ablations_sides": partial(methods, "ablations_sides"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded model's quality after variants of its fine-tuning.")
    parser.add_argument("--all-selectors", nargs="*", default=ALL, help="runs, by their folders")
    parser.add_argument("--spread", nargs="*", default=SPREAD, help="runs measured with spread tokens too")
    parser.add_argument("--runs", nargs="*", default=RUNS, help="runs measured with what the tasks choose alone")
    parser.add_argument("--methods", nargs="*", choices=PEERS, default=PEERS, help="runs of train_peers.py")
    parser.add_argument("--shipped", metavar="NAME", help="measure the package's own adapter as the run of this name")
    parser.add_argument("--scale", type=float, default=0.6, help="the share of each that is taken")
    parser.add_argument("--rank", type=int, default=64, help="of what is cut from runs of all weights")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.2, 0.1])
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--turns", nargs="+", default=TURNS, help="the kinds of scenes in turn")
    parser.add_argument("--checkpoints", type=Path, default=ROOT / "checkpoints" / "ablations", help="working folder")
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "ablations.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    assets = load_assets(arguments.assets).split("validation")
    samples, scenes = scene_samples(assets, arguments.scenes, FIRST_SEED["validation"], arguments.turns)
    keeps, place = (1.0, *arguments.keeps), arguments.checkpoints / arguments.output.stem
    by_task = grid(keeps)
    spread = grid((1.0, arguments.keeps[0]), coverages=(0.0, 0.3))
    selectors = grid(keeps, ("random", "uniform", "edges", "saliency", "subject", "mask"))

    def measure(name: str, lora: str, scale: float) -> dict[str, list[dict]]:
        """The figures of every scene, by setting."""
        pipe = load(ModelSpec(lora=lora, lora_scale=1.0 if lora == NO_LORA else scale))
        make = scene_maker(pipe, scenes)
        beside = (BASE, arguments.shipped) if arguments.all_selectors else ()
        everything = name in (*beside, *arguments.all_selectors)
        cells = grid([1.0]) if name in arguments.methods else dict(by_task)
        cells |= spread if everything or name in arguments.spread else {}
        cells |= selectors if everything else {}
        for method in arguments.methods if name == BASE else {name} & set(arguments.methods):
            for keep in arguments.keeps:
                config, about = SparseContextConfig(keep=keep), {"method": method}
                cells[f"{method}-{keep:g}"] = Cell(config, make=peer_maker(pipe, method), about=about)
        about = {"weights": fingerprint(pipe), "scale": scale}
        evaluate(make, samples, cells, find_metrics(["psnr"]), place / name, about=about)
        files = {cell: place / name / "cells" / f"{cell}.json" for cell in cells}
        return {
            cell: json.loads(file.read_text(encoding="utf-8"))["figures"]["samples"] for cell, file in files.items()
        }

    def won(rows: dict[str, list[dict]], other: dict[str, list[dict]]) -> dict[str, dict]:
        """What one run has won over another in the settings of both, by group and setting."""
        figures: dict[str, dict] = defaultdict(dict)
        for cell in [name for name in rows if name in other]:
            for group, entry in summarise({DENSE: other[cell], cell: rows[cell]}).items():
                figures[group][cell] = entry[cell]
        return figures

    found = {BASE: measure(BASE, NO_LORA, 0)}
    base, records = found[BASE], {}
    against_dense, gains = {BASE: summarise(base)}, {}
    shipped = [] if arguments.shipped is None else [arguments.shipped]
    for run in (*shipped, *arguments.all_selectors, *arguments.spread, *arguments.runs, *arguments.methods):
        (place / run).mkdir(parents=True, exist_ok=True)
        if run == arguments.shipped:  # a share of its change was taken when it was written
            adapter, scale = ADAPTERS["plain"], 1.0
        else:
            folder, rank, share = read_run(run)
            adapter = export_adapter(arguments.checkpoints / folder, place / run, rank=rank or arguments.rank)
            scale = share or arguments.scale
        records[run] = adapter_record(adapter) | {"share": scale}
        rows = found[run] = measure(run, str(adapter), scale)
        rows["all tokens"] = rows.pop(DENSE)
        against_dense[run] = summarise({DENSE: base[DENSE]} | rows)
        gains[run] = won(rows, base)
        for group, cells in against_dense[run].items():
            score = "psnr" if group == "global edits" else "psnr_in_mask"
            shown = (f"{name} {entry['scores'][score]['difference']:+.2f}" for name, entry in cells.items())
            print(f"{run}, {group}: {', '.join(shown)}", flush=True)
    over_peers: dict[str, dict] = defaultdict(dict)
    own = [run for run in found if run not in arguments.methods and f"auto-{arguments.keeps[0]:g}" in found[run]]
    for run, method in product(own, arguments.methods):
        theirs = found[BASE if run == BASE else method]
        rows = {f"auto-{keep:g}": theirs[f"{method}-{keep:g}"] for keep in arguments.keeps}
        over_peers[run][method] = won(found[run], rows)
    config = {
        "split": "validation",
        "keeps": arguments.keeps,
        "scale": arguments.scale,
        "rank": arguments.rank,
        "all_selectors": arguments.all_selectors,
        "spread": arguments.spread,
        "methods": arguments.methods,
        "turns": list(arguments.turns),
        "shipped": arguments.shipped,
        "runs": records,
    }
    compared = {
        f"{one} over {other}": won(found[one], found[other]) for one, other in PAIRS if {one, other} <= found.keys()
    }
    figures = {"against_dense": against_dense, "won": gains, "pairs": compared, "over_peers": over_peers}
    write_result(arguments.output, arguments.output.stem, config, figures)
    draw(TABLES)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
