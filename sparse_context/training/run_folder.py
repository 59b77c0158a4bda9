"""The folder of a run: what it may hold, and whether a run continues there."""

import json
from dataclasses import asdict
from pathlib import Path

from .checkpoints import Checkpoints, has_begun, newest_step
from .config import TrainConfig
from .export import LORA_FILE
from .schedules import SCHEDULES


def check_folder(output: Path, resume: bool, steps: int) -> None:
    """Raise ValueError or OSError where a run of so many steps cannot begin, or cannot be continued, in `output`."""
    step = newest_step(output) if output.is_dir() else 0
    there = next(place for place in (output, *output.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"The output {output} {'is' if there == output else 'lies below'} a file: name a folder.")
    Checkpoints(output).check_names()
    if step and not resume:
        raise ValueError(
            f"The folder {output} holds a run at step {step}: continue it with resume='latest', or name another folder."
        )
    if step:
        read_record(output)  # now, and not after a model was loaded
    if step > steps:
        raise ValueError(
            f"The run in {output} is at step {step}, and max_train_steps is {steps}: pass at least as many, or name "
            "another folder."
        )
    if not step:
        foreign = [name for name in (LORA_FILE, "transformer", "README.md") if (output / name).exists()]
        recorded = (output / "config.json").exists()
        if recorded and "dropping" not in read_record(output):
            foreign.append("config.json")
        if not recorded:  # what a run that was killed before its first checkpoint leaves, it leaves beside one
            foreign += [
                path.name for name in ("log.jsonl", "validation", "step-*.partial") for path in output.glob(name)
            ]
        if foreign:
            raise ValueError(
                f"The folder {output} holds {foreign[0]} and no checkpoint, and a run would write over it: name "
                "another folder."
            )
    for name, kind in WRITTEN.items():
        if (output / name).exists() and (output / name).is_dir() != (kind == "folder"):
            raise ValueError(f"{output / name} is no {kind}, and a run writes one of that name: move it away.")


WRITTEN = {
    "config.json": "file",
    "log.jsonl": "file",
    "README.md": "file",
    LORA_FILE: "file",
    "transformer": "folder",
    "validation": "folder",
}
"""What a run writes beside its checkpoints."""


FREE = (
    "base",
    "run",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "validation_steps",
    "validation_keep",
    "gradient_checkpointing",
    "fsdp",
    "version",
)
"""What may change when a run is resumed: its length, and what does not decide its weights (the base is told by its own,
not by its name; what of `run` decides them has a place of its own in the record). Its length may not where a step that
was taken would have had another learning rate. So may a warm-up, where no step that
is left tells, and the number of processes, where `gradient_accumulation_steps` makes up for it."""


ALWAYS = {"base_weights": str, "data": str, "processes": int, "mixed_precision": str, "dropping": dict}
"""What every record of a run has, and of which kind it is. What came later and lacks there is the default."""


def check_same(output: Path, record: dict, resume: bool) -> None:
    """Raise ValueError where a run that is resumed in `output` had other settings than `record`."""
    if not resume or not has_begun(output):
        return
    if not newest_step(output) and not (output / "config.json").exists():
        return  # the start that `checkpoints.start_from` writes has seen no settings
    earlier = read_record(output)
    if not all(isinstance(earlier.get(name), kind) for name, kind in ALWAYS.items()):
        raise ValueError(f"{output / 'config.json'} is no record of a run: put the run's own back, or begin anew.")
    defaults = json.loads(json.dumps(asdict(TrainConfig())))  # of a run begun before a setting was there
    earlier = {name: earlier.get(name, defaults.get(name, record[name])) for name in record}
    earlier["dropping"] = defaults["dropping"] | earlier["dropping"]
    changed = [name for name in record if name not in FREE and record[name] != earlier[name]]
    if "lr_warmup_steps" in changed:
        rate, steps = SCHEDULES[record["lr_scheduler"]], record["max_train_steps"]
        ahead = range(newest_step(output), steps)
        if all(
            rate(step, steps, earlier["lr_warmup_steps"]) == rate(step, steps, record["lr_warmup_steps"])
            for step in ahead
        ):
            changed.remove("lr_warmup_steps")
    if record["max_train_steps"] != earlier["max_train_steps"] and "lr_scheduler" not in changed:
        rate, taken = SCHEDULES[record["lr_scheduler"]], range(newest_step(output))
        ends, warmup = (earlier["max_train_steps"], record["max_train_steps"]), earlier["lr_warmup_steps"]
        if any(rate(step, ends[0], warmup) != rate(step, ends[1], warmup) for step in taken):
            changed.append("max_train_steps")
    mixes = [list(settings["dropping"].get("mix", ())) for settings in (earlier, record)]
    if mixes[0] != mixes[1] and "dropping" not in changed:  # kinds are drawn by their place
        changed.append("dropping")
    each = earlier["processes"] * earlier["gradient_accumulation_steps"]
    if record["processes"] * record["gradient_accumulation_steps"] == each:  # the same batches, in the same steps
        changed = [name for name in changed if name not in ("processes", "gradient_accumulation_steps")]
    elif "processes" in changed and each % record["processes"] == 0:
        raise ValueError(
            f"The run in {output} takes {each} batches a step, on {earlier['processes']} processes until now: on "
            f"{record['processes']}, pass gradient_accumulation_steps={each // record['processes']}."
        )
    if changed:
        says = "; ".join(f"{name} was {earlier.get(name)!r} and is now {record[name]!r}" for name in changed)
        raise ValueError(f"The run in {output} was started with other settings: {says}. Resume it with its own.")


def read_record(output: Path) -> dict:
    """The settings of the run in `output`; empty where its config.json is of something else. Raises ValueError where
    that is gone or damaged."""
    file = output / "config.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read ({error.strerror}), so nothing tells whether the run goes on as it was begun: put "
            "it back, or name another folder."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read, so the run cannot be continued as it was: {error}.") from error
    return record if isinstance(record, dict) else {}
