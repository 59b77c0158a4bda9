"""What an overview costs: a call with one against plain dropping of as many tokens, by the same weights.

    python runs/overview_speed.py [--turns 9] [--keep 0.2] [--output results/overview_speed.json]

The embedded model's weights for overviews, one and four references that were never seen before. Calls take turns in one
process, the order changing from turn to turn, after one call each to warm up. A ratio is that of times within a turn; a
figure is the median over the turns. Denoising has as many tokens either way. Encoding has the overviews beside the
references, and choosing looks for what an overview does not show.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from tables import draw, machine, read, table
from tqdm import tqdm

from sparse_context import SparseContextConfig
from sparse_context.bench.figures import Spread
from sparse_context.embedded.demo import read_examples
from sparse_context.pipelines.engine import Engine
from sparse_context.pipelines.lora_file import OVERVIEW_LORA
from sparse_context.pipelines.spec import ModelSpec, Request
from sparse_context.result import checkout, write_result

ROOT = Path(__file__).resolve().parents[1]
SCENES = {1: "grey", 4: "quarters"}
"""Of the demo, by the number of references."""
FACTOR = 4


def overview_speed() -> str:
    """Times with an overview, as shares of those of dropping."""
    result = read("overview_speed")
    rows = []
    for count, of in result["figures"].items():
        ratios = [Spread(**of["ratios"][phase]) for phase in ("denoise", "total")]
        cells = [f"{ratio.median:.2f} ({ratio.min:.2f} to {ratio.max:.2f})" for ratio in ratios]
        rows.append([count, str(of["tokens"]), *cells, f"{100 * of['encoding']:.1f} %"])
    head = [
        "references",
        "tokens",
        "denoising, overview / dropping",
        "whole call",
        "encoding the overviews, of the call",
    ]
    return f"{table(head, rows)}\n\n{machine(result)}"


TABLES = {"overview_speed": overview_speed}


def figures_of(turns: Sequence[Mapping[str, Mapping[str, float]]], tokens: int) -> dict[str, Any]:
    """The ratios of each turn's times, and what encoding takes more, as a share of the call without an overview."""
    ratios = {
        phase: asdict(Spread.of([turn["overview"][phase] / turn["dropping"][phase] for turn in turns]))
        for phase in ("denoise", "total")
    }
    more = [turn["overview"]["encode"] - turn["dropping"]["encode"] for turn in turns]
    whole = median(turn["dropping"]["total"] for turn in turns)
    return {"tokens": tokens, "ratios": ratios, "encoding": round(median(more) / whole, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description="What an overview costs.")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "overview_speed.json")
    parser.add_argument("--table", action="store_true", help="only draw the tables of results/ again, from the JSON")
    arguments = parser.parse_args()
    checkout()  # of the code that runs, whatever is committed meanwhile
    if arguments.table:
        return draw(TABLES)

    engine = Engine(ModelSpec(device="cpu", lora=OVERVIEW_LORA), bar=False)
    examples, figures = {example["name"]: example for example in read_examples()}, {}
    for count, name in SCENES.items():
        example = examples[name]
        requests = {
            way: Request(
                example["prompt"],
                example["references"],
                SparseContextConfig(keep=arguments.keep, task=example["tasks"], overview=overview),
            )
            for way, overview in (("dropping", None), ("overview", FACTOR))
        }
        kept = {way: engine(request).selection for way, request in requests.items()}
        tokens = {selection.kept for selection in kept.values() if selection is not None}
        if len(tokens) > 1:
            raise SystemExit(f"overview_speed: {sorted(tokens)} tokens are compared, which are not equally many.")
        turns = []
        for turn in tqdm(range(arguments.turns), desc=f"{count} references", unit="turn"):
            ways = list(requests) if turn % 2 else list(reversed(requests))
            times = {way: asdict(engine(requests[way]).times) for way in ways}
            turns.append(times)
        figures[str(count)] = figures_of(turns, tokens.pop())
    config = {"turns": arguments.turns, "keep": arguments.keep, "factor": FACTOR, "scenes": SCENES}
    write_result(arguments.output, "overview_speed", config, figures)
    draw(TABLES)
    print(overview_speed())


if __name__ == "__main__":
    main()
