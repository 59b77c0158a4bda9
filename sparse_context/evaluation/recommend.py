"""Which keep is safe for these pictures? Dense once, then fewer and fewer tokens on the same noise, until it shows.

For each way to choose tokens (a task's rule, with or without an overview) the keeps are tried downward, and the last
one whose pictures all stay within a tolerance of dense is what this way can do. The way that needs the fewest tokens is
recommended. Every call is kept in the output folder as an evaluation (evaluate.py) keeps it: what was stopped goes on
there, and another tolerance asks for no call again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from ..config import SparseContextConfig
from ..images import save_picture
from ..pipelines.engine import Engine, Generation
from ..pipelines.memory import Peak
from ..pipelines.settings_file import Settings, write_settings
from ..pipelines.spec import Request
from ..result import write_result
from ..samples import Sample
from .evaluate import engine_fingerprint, evaluate
from .grid import DENSE, Cell, grid
from .metrics import METRICS, find_metrics
from .recommendation import Recommendation, Tried, Way, Won, draw_sheet
from .tolerance import Tolerance

KEEPS = (0.75, 0.5, 0.35, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05)
TASKS = ("edit", "global", "subject")
TURNS = 2  # of dense and the recommended one, to measure what is won


def recommend(
    settings: Settings,
    samples: Sequence[Sample],
    tolerance: Tolerance,
    folder: Path,
    *,
    keeps: Sequence[float] = KEEPS,
    tasks: Sequence[str] = TASKS,
    overviews: Sequence[int | str | None] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Recommendation:
    """Find the fewest tokens within `tolerance` of dense, and write into `folder` what was found: settings.json,
    sheet.png, recommendation.json, and every call that was made.

    settings: model, seed and all that is not tried. keeps, tasks, overviews: what is tried, each task with each
    overview; overviews None: without one, and by a factor that suits each budget, of those that the weights were
    trained for, or else by 4. say: is told what the search costs, before it begins.

    Raises ValueError for values that do not fit, and what an engine raises.
    """
    for keep in keeps:
        if not 0 < keep < 1:
            raise ValueError(f"keep is {keep:g}: pass ratios above 0 and below 1.")
    keeps = sorted(set(keeps), reverse=True)
    engine = Engine(settings.spec, bar=False)
    shown: Sequence[int | str | None] = [None, *_overviews_of(engine)] if overviews is None else overviews
    most = len(samples) * (1 + len(keeps) * len(tasks) * len(shown)) + 2 * TURNS
    say(f"at most {most} calls of the model for {len(samples)} scene{'s' * (len(samples) > 1)}")
    dense = SparseContextConfig(keep=1.0, task=tasks[0] if len(tasks) == 1 else "auto")
    search = Search(settings, engine, samples, tolerance, folder, dense, most)
    with search.bar:
        seconds = search.dense()
        say(f"a call with all tokens takes {seconds:.1f} s, so at most {_duration(seconds * search.bar.total)} in all")
        ways = []
        for task in tasks:
            for overview in shown:
                try:
                    ways.append(Way(task, overview, search.downward(task, overview, keeps)))
                except ValueError:
                    if overview is None or overviews is not None:
                        raise
                    search.skip(len(keeps))  # this pipeline takes no overviews
        best = min((way.best for way in ways if way.best), key=lambda each: (each.kept, each.name), default=None)
        won = None if best is None else search.measure(best)
    found = Recommendation(ways, best, won)
    write_settings(replace(settings, request=_recommended(settings.request, best)), folder / "settings.json")
    save_picture(draw_sheet(found, search.samples, folder), folder / "sheet.png")
    write_result(folder / "recommendation.json", "recommendation", search.about | asdict(tolerance), found.to_dict())
    return found


def _recommended(request: Request, best: Tried | None) -> Request:
    """What is recommended, for any prompt."""
    return replace(request, prompt="", config=best.config if best else replace(request.config, keep=1.0))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _overviews_of(engine: Engine) -> list[int | str]:
    """Overviews that a model is tried with: of what its weights were trained for, or else by 4."""
    try:
        trained = engine.trained(SparseContextConfig(overview="auto"))
    except ValueError:  # the embedded model's weights for overviews do not go with, say, its quantisation
        return []
    return ["auto"] if trained is not None and trained.factors else [4]


class Search:
    """The calls of a recommendation, kept in a folder as an evaluation."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        samples: Sequence[Sample],
        tolerance: Tolerance,
        folder: Path,
        dense: SparseContextConfig,
        most: int,
    ) -> None:
        self._dense = dense
        self.settings, self.engine, self.tolerance, self.folder = settings, engine, tolerance, folder
        self.samples = [replace(sample, image=None, mask=None) for sample in samples]  # dense is the truth here
        self.bar = tqdm(total=most, desc="recommend", unit="call")
        self._metrics = find_metrics(list(tolerance.bounds))
        given = settings.to_dict()
        dials = (
            "model",
            "lora",
            "lora_scale",
            "kv",
            "dtype",
            "quantization",
            "steps",
            "height",
            "width",
            "guidance_scale",
            "negative_prompt",
            "vae",
        )
        self.about = {"weights": engine_fingerprint(engine), **{key: given.get(key) for key in dials}}

    def dense(self) -> float:
        """Make what all are compared with; seconds of a call."""
        if not self._is_there(DENSE):
            self.engine.warm_up(self._request(self.samples[0], self._dense, self.settings.request.seed))
        self._run({})
        return median(row["seconds"] for row in self._rows(DENSE))

    def downward(self, task: str, overview: int | str | None, keeps: Sequence[float]) -> list[Tried]:
        """Try keeps, most tokens first, down to the first that is not within the tolerance."""
        tried: list[Tried] = []
        for i, keep in enumerate(keeps):
            name, cell = self._cell(keep, task, overview)
            self._run({name: cell})
            tried.append(self._judge(name, cell.config))
            if not tried[-1].holds:
                self.skip(len(keeps) - i - 1)
                break
        return tried

    def measure(self, best: Tried) -> Won:
        """What a setting wins, on the first sample, in turns with dense."""
        seconds: dict[str, list[float]] = {DENSE: [], best.name: []}
        memory: dict[str, list[int | None]] = {DENSE: [], best.name: []}
        for _ in range(TURNS):
            for name, config in ((DENSE, self._dense), (best.name, best.config)):
                peak = Peak(self.engine.pipe(config)._execution_device)
                seconds[name].append(self._call(self.samples[0], config, self.settings.request.seed).times.total)
                memory[name].append(peak.read())
        most = [max(known) for found in memory.values() if (known := [each for each in found if each is not None])]
        taken = (most[0], most[1]) if len(most) == 2 else None
        return Won((median(seconds[DENSE]), median(seconds[best.name])), taken)

    def skip(self, settings: int) -> None:
        """So many settings need no call."""
        self.bar.total -= settings * len(self.samples)
        self.bar.refresh()

    def _cell(self, keep: float, task: str, overview: int | str | None) -> tuple[str, Cell]:
        """A setting and its name."""
        config = self.settings.request.config
        others: dict[str, Any] = {
            key: getattr(config, key)
            for key in ("overview_layout", "share", "floor", "multiple_of", "phrases", "text_model")
        }
        if overview is not None:  # without one, nothing shows the whole of a larger picture
            others["reference_max_pixels"] = config.reference_max_pixels
        ways: dict[str, Any] = {
            "tasks": [task],
            "coverages": [config.coverage],
            "merges": [config.merge],
            "overviews": [overview],
        }
        (found,) = (
            (name, cell) for name, cell in grid([keep], [config.selector], **ways, **others).items() if name != DENSE
        )
        return found

    def _is_there(self, name: str) -> bool:
        return (self.folder / "cells" / f"{name}.json").is_file()

    def _run(self, cells: Mapping[str, Cell]) -> None:
        """Make what is not there of these settings, and of dense."""
        if all(self._is_there(name) for name in cells or (DENSE,)):
            self.skip(1)
        seed = self.settings.request.seed
        cells = {DENSE: Cell(self._dense), **cells}
        evaluate(self._call, self.samples, cells, self._metrics, self.folder, seed=seed, about=self.about, bar=False)

    def _request(self, sample: Sample, config: SparseContextConfig, seed: int) -> Request:
        references = sample.open_references()
        return replace(self.settings.request, prompt=sample.prompt, references=references, config=config, seed=seed)

    def _call(self, sample: Sample, config: SparseContextConfig, seed: int) -> Generation:
        def progress(step: int, steps: int) -> None:
            self.bar.set_postfix_str(f"step {step} of {steps}")

        generation = self.engine(self._request(sample, config, seed), progress=progress)
        self.bar.update()
        return generation

    def _rows(self, name: str) -> list[dict[str, Any]]:
        record = json.loads((self.folder / "cells" / f"{name}.json").read_text(encoding="utf-8"))
        return record["figures"]["samples"]

    def _judge(self, name: str, config: SparseContextConfig) -> Tried:
        rows = self._rows(name)
        scores: dict[str, float | None] = {}
        for metric in self.tolerance.bounds:
            values = [row["scores"][f"{metric}_to_dense"] for row in rows]
            worst = max if METRICS[metric].better == "lower" else min
            scores[f"{metric}_to_dense"] = None if None in values else worst(values)
        kept, total = (sum(row[key] for row in rows) for key in ("kept", "total"))
        seconds = median(row["seconds"] for row in rows)
        return Tried(name, config, kept, total, scores, seconds, self.tolerance.holds(scores))
