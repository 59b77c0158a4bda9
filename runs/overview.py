"""Overviews at equal numbers of tokens: against dropping, random tokens, merged ones and references scaled down.

    python runs/overview.py --pictures checkpoints/overview        # validation, to choose by
    python runs/overview.py --split test                           # what won there, once a release
    python runs/overview.py --split test --assets checkpoints/cutouts.safetensors --output results/overview_cutouts.json

The embedded model, on the scenes of runs/mini_curves.py and their noise, with its weights for overviews; the ways to do
without have its LoRA for dropped tokens. On "validation" an overview of each factor is measured alone, and with sharp
tokens by each rule of overview_ways.py; the best in a group at a keep, by its mean, is chosen, and the result says
which. On "test" what was chosen is read from `--rules`, all results on validation without it, and measured under the
name "overview and sharp". The ways to do without are `dropping`, which keeps what the tasks choose, `random`, `merged`
with as many averages (`merge=1`), and `downscaled`, that of the benchmark; `default` names nothing but the keep, by the
weights for overviews, and `dropping, same weights` is dropping by them. Differences are to the dense base without an
adapter, scene by scene; the result also has those of every way to `dropping`, and of "overview and sharp" to every way
without. `--masks` adds the objects' true masks, a bound and no method: nothing is chosen by them. `--kv` is the same in
KV mode, where nothing is scaled down. `--pictures` draws the curves, and the scenes of each group, the worst first.
Stopped at any point, it goes on there.

It needs the scenes' objects: `python -m recipes.mini data`, and for the last line `python -m recipes.mini cutouts`.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

from held_out import cell_rows, print_gains, scene_maker
from overview_pages import save_curves, save_pages
from overview_ways import (
    CHOSEN,
    DEFAULT,
    MASKED,
    RULES,
    SAME_WEIGHTS,
    TRUE_MASK,
    WITHOUT,
    by_group,
    choose,
    config_of,
    ways_at,
    with_masks,
)
from peers import peer_maker
from tables import RESULTS, SCORES, difference, draw, read, score_of, table

from recipes.mini.data import SPLITS, load_assets
from recipes.mini.samples import FIRST_SEED, GROUPS, TURNS, scene_samples
from recipes.mini.scenes import TOKEN, Scene
from sparse_context.bench.methods import reference_tokens
from sparse_context.config import SparseContextConfig
from sparse_context.evaluation.evaluate import evaluate, fingerprint
from sparse_context.evaluation.grid import DENSE, Cell, Maker, grid
from sparse_context.evaluation.metrics import find_metrics
from sparse_context.evaluation.statistics import summarise
from sparse_context.pipelines.load import load
from sparse_context.pipelines.lora_file import NO_LORA, OVERVIEW_LORA
from sparse_context.pipelines.settings import call_settings
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.result import checkout, write_result
from sparse_context.trained import trained_for, write_record

ROOT = Path(__file__).resolve().parents[1]

# Tables ---------------------------------------------------------------------------------------------------------------


def curves(name: str) -> str:
    """Each way at each keep, against the dense base with all tokens."""
    result = read(name)
    without = [way for way in WITHOUT if way in result["config"]["ways"]]
    rows = []
    for group, of in SCORES.items():
        settings = result["figures"]["groups"].get(group, {})
        for keep in (f"{keep:g}" for keep in result["config"]["keeps"]) if settings else ():
            alone = next((cell for cell in settings if cell.endswith(f"alone {keep}")), "")
            named = (f"{way} {keep}" for way in (*without, SAME_WEIGHTS))  # the latter where they are others
            cells = [*named, alone, f"{CHOSEN} {keep}", f"{DEFAULT} {keep}"]
            rows.append([group, keep, *(difference(score_of(settings, cell, of)) for cell in cells)])
    return table(["task", "keep", *without, SAME_WEIGHTS, "overview alone", CHOSEN, DEFAULT], rows)


def chosen_over(name: str) -> str:
    """What was chosen, and what it wins over each way without an overview."""
    figures = read(name)["figures"]
    rows = []
    for group, of in SCORES.items():
        for keep, won in figures["chosen_over"].items() if group in figures["groups"] else ():
            cells = [difference(score_of(won.get(way, {}).get(group, {}), CHOSEN, of)) for way in WITHOUT]
            rows.append([group, keep, figures["chosen"].get(group, {}).get(keep, ""), *cells])
    return table(["task", "keep", "chosen", *(f"over {way}" for way in WITHOUT)], rows)


def rules(name: str) -> str:
    """Each factor and rule, against the dense base with all tokens."""
    result = read(name)
    config = result["config"]
    shown = [rule for rule in (*RULES, TRUE_MASK) if any(way.endswith(f", {rule}") for way in config["ways"])]
    rows = []
    for group, of in SCORES.items():
        settings = result["figures"]["groups"].get(group, {})
        for keep in (f"{keep:g}" for keep in config["keeps"]):
            for factor in config["factors"]:
                cells = [difference(score_of(settings, f"overview {factor}, {rule} {keep}", of)) for rule in shown]
                if any(cells):
                    rows.append([group, keep, str(factor), *cells])
    return table(["task", "keep", "factor", *shown], rows)


def tables() -> dict[str, Any]:
    """Those of the results that are there: each split, source and mode has its own."""
    found: dict[str, Any] = {}
    for name in sorted(path.stem for path in RESULTS.glob("overview_*.json")):
        if "chosen_over" not in read(name)["figures"]:
            continue  # of another run
        found |= {name: partial(curves, name), f"{name}-over": partial(chosen_over, name)}
        if any(way.startswith("overview ") and ", " in way for way in read(name)["config"]["ways"]):
            found[f"{name}-rules"] = partial(rules, name)
    return found


TABLES = tables()

# The run --------------------------------------------------------------------------------------------------------------

Chosen = Mapping[str, Mapping[str, str]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Overviews against dropping, at equal numbers of tokens.")
    parser.add_argument("--split", choices=SPLITS[1:], default="validation")
    parser.add_argument("--model", help="a folder; the weights in the package without it")
    parser.add_argument("--lora", help="a file or the word none; the package's for overviews, or for KV, without it")
    parser.add_argument("--kv", action="store_true", help="in KV mode")
    parser.add_argument("--masks", action="store_true", help="true masks too")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.3, 0.2, 0.1, 0.0625])
    parser.add_argument("--factors", type=int, nargs="+", help="what the weights were trained for without it")
    parser.add_argument("--layout", help="of the overviews; what the weights were trained for without it")
    parser.add_argument(
        "--rules",
        type=Path,
        nargs="+",
        help="results on validation, of which later ones count; for the test split those in results/",
    )
    parser.add_argument("--turns", nargs="+", default=TURNS, choices=sum(GROUPS.values(), ()), help="kinds of scenes")
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--assets", type=Path, default=ROOT / "checkpoints" / "assets.safetensors")
    parser.add_argument("--folder", type=Path, help="working folder; checkpoints/NAME of the output's NAME without it")
    parser.add_argument("--output", type=Path, help="results/overview_SPLIT.json, and _kv, without it")
    parser.add_argument("--pictures", type=Path, help="a folder for the curves and the pages of scenes")
    parser.add_argument("--pictured", type=float, default=0.2, help="the keep that the pages show")
    parser.add_argument("--most", type=int, default=12, help="scenes on a page")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    arguments.output = arguments.output or RESULTS / f"overview_{arguments.split}{'_kv' * arguments.kv}.json"
    arguments.folder = arguments.folder or ROOT / "checkpoints" / arguments.output.stem
    if arguments.split == "test":
        found = sorted(RESULTS.glob("overview_validation*.json"))
        arguments.rules = arguments.rules or [path for path in found if path.stem.endswith("_kv") == arguments.kv]
    return arguments


def read_rules(arguments: argparse.Namespace) -> Chosen | None:
    """What was chosen on validation; None where it is to be chosen. Ends the script where something is missing."""
    if arguments.rules is None:
        return None
    chosen: dict[str, dict[str, str]] = {}
    for file in arguments.rules:
        if not file.is_file():
            sys.exit(f"overview: {file} is missing: choose on the validation split first.")
        for group, of in json.loads(file.read_text(encoding="utf-8"))["figures"]["chosen"].items():
            chosen[group] = chosen.get(group, {}) | of
    missing = {f"{keep:g}" for keep in arguments.keeps} - {keep for of in chosen.values() for keep in of}
    if missing:
        sys.exit(f"overview: nothing was chosen on validation at keep {', '.join(sorted(missing))}: leave it out.")
    return chosen


def cells_of(
    arguments: argparse.Namespace,
    make: Maker,
    without: Maker,
    downscale: Maker | None,
    chosen: Chosen | None,
    weights: tuple[str, str],
) -> dict[str, Cell]:
    """The settings by name: "WAY KEEP"; each way's name is in its `about`. without: makes those without an overview,
    and downscale those of smaller pictures. weights: the fingerprints of those of `make` and of `without`."""
    cells = grid([1.0])
    absent = {"downscaled"} if downscale is None else set()
    absent |= {SAME_WEIGHTS} if weights[0] == weights[1] else set()
    for keep in arguments.keeps:
        ways = [way for way in (*WITHOUT, SAME_WEIGHTS, DEFAULT) if way not in absent]
        ways += ways_at(keep, arguments.factors, RULES if chosen is None else ())
        ways += [MASKED, *ways_at(keep, arguments.factors, [TRUE_MASK])] if arguments.masks else []
        for way in dict.fromkeys(ways):
            how = with_masks(make) if TRUE_MASK in way else without if way in (*WITHOUT, MASKED) else make
            config = config_of(way, keep, arguments.layout)
            by = weights[1] if how is without else weights[0]
            how = downscale if way == "downscaled" else how
            cells[f"{way} {keep:g}"] = Cell(config, make=how, about={"weights": by, "way": way})
        if chosen is not None:
            how, told = by_group(make, chosen, arguments.layout), {"way": CHOSEN, "chosen": chosen}
            about = {"weights": weights[0], **told}
            cells[f"{CHOSEN} {keep:g}"] = Cell(SparseContextConfig(keep=keep), make=how, about=about)
    return cells


def rows_of(folder: Path, cells: Mapping[str, Cell], scenes: Mapping[str, Scene]) -> dict[str, list[dict]]:
    """The figures of every scene by setting. Of smaller pictures nothing is selected: their tokens are counted here."""
    rows = {name: cell_rows(folder, name) for name in cells}
    for name, cell in cells.items():
        for row in rows[name] if cell.about.get("way") == "downscaled" else ():
            grids = [(r.shape[0] // TOKEN, r.shape[1] // TOKEN) for r in scenes[row["name"]].references]
            row["kept"] = reference_tokens("downscaled", grids, cast("float", cell.config.keep))
            row["total"] = sum(rows * columns for rows, columns in grids)
    return rows


def by_task(rows: Mapping[str, list[dict]]) -> dict[str, Any]:
    """`summarise`, with a group for the task where there is but one, too."""
    groups = summarise(rows)
    return groups | {row["task"]: groups["all"] for row in rows[DENSE] if row["task"] not in groups}


def compare(rows: Mapping[str, list[dict]], keeps: list[float]) -> dict[str, dict[str, Any]]:
    """By keep: every way against `dropping`, and `CHOSEN` against each way without an overview, scene by scene."""
    found: dict[str, dict[str, Any]] = {"against_dropping": {}, "chosen_over": {}}
    for keep in (f"{keep:g}" for keep in keeps):
        at = {name.removesuffix(f" {keep}"): of for name, of in rows.items() if name.endswith(f" {keep}")}
        found["against_dropping"][keep] = by_task({DENSE: at["dropping"]} | at)
        found["chosen_over"][keep] = {
            way: by_task({DENSE: at[way], CHOSEN: at[CHOSEN]}) for way in WITHOUT if way in at and CHOSEN in at
        }
    return found


def main() -> None:
    arguments = parse()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(tables())
    chosen, layout = read_rules(arguments), arguments.layout
    assets = load_assets(arguments.assets).split(arguments.split)
    samples, scenes = scene_samples(assets, arguments.scenes, FIRST_SEED[arguments.split], arguments.turns)
    dense = load(ModelSpec(arguments.model, lora=NO_LORA))
    own = arguments.model is None and arguments.lora is None
    plain = load(ModelSpec(arguments.model, lora=arguments.lora, kv=arguments.kv))
    pipe = load(ModelSpec(lora=OVERVIEW_LORA)) if own and not arguments.kv else plain
    make, without = scene_maker(pipe, scenes), scene_maker(plain, scenes)
    downscale = None if arguments.kv else peer_maker(plain, "downscaled")
    trained = trained_for(pipe.transformer, arguments.kv)
    arguments.factors = arguments.factors or (trained.factors if trained is not None else ()) or [2, 4]
    about = {
        "split": arguments.split,
        "assets": arguments.assets.name,
        "model": arguments.model or "embedded",
        "lora": arguments.lora or "the package's own",
        "kv": arguments.kv,
        "weights": fingerprint(dense),
        "trained": None if trained is None else write_record(trained),
        "call": call_settings(dense),
    }
    cells = cells_of(arguments, make, without, downscale, chosen, (fingerprint(pipe), fingerprint(plain)))
    evaluate(scene_maker(dense, scenes), samples, cells, find_metrics(["psnr"]), arguments.folder, about=about)

    rows = rows_of(arguments.folder, cells, {name: scene for name, (scene, _, _) in scenes.items()})
    if chosen is None:
        chosen = choose(by_task(rows), cells)
        for keep in (f"{keep:g}" for keep in arguments.keeps):
            won = {group: rows[f"{of[keep]} {keep}"] for group, of in chosen.items() if keep in of}
            rows[f"{CHOSEN} {keep}"] = [row for group, found in won.items() for row in found if row["task"] == group]
    groups = by_task(rows)
    config = about | {
        "scenes": arguments.scenes,
        "turns": list(arguments.turns),
        "keeps": arguments.keeps,
        "factors": arguments.factors,
        "layout": layout,
        "rules": None if arguments.rules is None else [file.name for file in arguments.rules],
        "ways": list(dict.fromkeys(cell.about["way"] for cell in cells.values() if cell.about)),
    }
    figures = {"groups": groups, "chosen": chosen, **compare(rows, arguments.keeps)}
    write_result(arguments.output, arguments.output.stem, config, figures)
    draw(tables())
    if arguments.pictures is not None:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        save_curves(groups, arguments.pictures)
        keep, ours = f"{arguments.pictured:g}", by_group(make, chosen, layout)
        makers = {
            "dropping": (without, config_of("dropping", arguments.pictured), f"dropping {keep}"),
            CHOSEN: (ours, SparseContextConfig(keep=arguments.pictured), f"{CHOSEN} {keep}"),
        }
        save_pages(samples, rows, makers, arguments.folder / DENSE, arguments.pictures, arguments.most)
    print_gains({group: groups[group] for group in SCORES if group in groups})
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
