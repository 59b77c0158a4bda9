"""The settings of a run from a file, from `field=value` and from flags, each checked against its dataclass.

A field is one of `TrainConfig` or `RunConfig`; those of `Dropping` are written `dropping.<field>`. As text:

    --set ema=0.99  --set gradient_checkpointing=true  --set shift=none  --set lora_layers=to_q,to_v
    --set dropping.dense=0.2  --set dropping.coverage=0,0.1  --set dropping.mix=random=0.5,blobs=0.5

In a file (JSON) they are `{"ema": 0.99, "dropping": {"dense": 0.2, "mix": {"random": 0.5, "blobs": 0.5}}}`. The
`config.json` of a run is such a file, and also names its model and its data. A flag goes before --set, --set before the
file, and the file before the defaults; of two --set of one field the last one counts.
"""

import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..samples import source_of
from ..texts import TwiceError, once_each
from .card import EMBEDDED
from .config import TrainConfig
from .dropping import Dropping

DEFAULTS = {"validation_steps": 500}
"""Where the command's defaults differ from those of the dataclasses, which are for runs without validation data."""

RECORDED = {"base_weights", "batch", "samples", "source", "processes", "version"}
"""What the record of a run holds beside its settings; nothing is read of it here."""


TRAINED_ON = ("int8", "nf4")
"""Quantised weights that a LoRA is trained on top of."""


@dataclass(frozen=True)
class RunConfig:
    """What a run reads, in which sizes and types, and what it reports. Raises ValueError that names the field.

    Of the data: `split` and `dataset_config_name` say which part of a data set is read, `image_column`,
    `cond_image_column` and `caption_column` by which columns. Larger targets are scaled down to `resolution` pixels a
    side, larger references to `reference_resolution` (None: the same).

    `mixed_precision`: "no" or "bf16" (None: what accelerate launch says, else bf16 on an accelerator). `dtype`: of the
    frozen weights, "auto", "bfloat16" or "float32". `quantization`: of the transformer's, "int8" or "nf4", as in
    `ModelSpec`; what is trained stays float32. `train_batch_size`: samples a batch and process.
    `dataloader_num_workers`: processes that open images and choose tokens ahead of the steps; 0 is a thread.

    The first `num_validation_images` samples of `validation_data`, of its `validation_split` (None: `split`), are drawn
    during the run. `cache_latents`, `cache_text`: keep what the encoders make on disk, in `cache_dir` (None: `cache`
    in the run's folder). With both, all of it is made before the first step, and no text encoder is loaded beside the
    transformer. `report_to`: "tensorboard", beside log.jsonl.
    """

    train_batch_size: int = 1
    resolution: int = 512
    reference_resolution: int | None = None
    mixed_precision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    dataloader_num_workers: int = 0
    split: str = "train"
    dataset_config_name: str | None = None
    image_column: str = "image"
    cond_image_column: str = "references"
    caption_column: str = "prompt"
    validation_data: str | None = None
    validation_split: str | None = None
    num_validation_images: int = 4
    cache_latents: bool = False
    cache_text: bool = False
    cache_dir: Path | None = None
    report_to: str | None = None

    def __post_init__(self) -> None:
        if self.mixed_precision not in (None, "no", "bf16"):
            raise ValueError(f"mixed_precision is {self.mixed_precision!r}: choose no or bf16.")
        if self.report_to not in (None, "tensorboard"):
            raise ValueError(f"report_to is {self.report_to!r}: pass tensorboard, or leave it out.")
        if self.dtype in ("float16", "fp16"):
            raise ValueError(f"dtype is {self.dtype!r}, in which gradients vanish: choose auto, bfloat16 or float32.")
        if self.quantization not in (None, *TRAINED_ON):
            raise ValueError(f"quantization is {self.quantization!r}: choose {' or '.join(TRAINED_ON)}.")
        for name, side in self.sides.items():
            if side < 64:
                raise ValueError(f"{name} is {side}: pass 64 or more pixels.")
        for name in ("train_batch_size", "num_validation_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass a whole number, 1 or more.")
        if self.dataloader_num_workers < 0:
            raise ValueError(
                f"dataloader_num_workers is {self.dataloader_num_workers}: pass a number of processes, or 0."
            )
        if self.validation_split is not None and self.validation_data is None:
            raise ValueError(
                f"validation_split is {self.validation_split!r}, but there is no data for it: name it with "
                "validation_data, which may be the same as data."
            )

    @property
    def sides(self) -> dict[str, int]:
        """Pixels a side that targets and references are scaled down to."""
        reference = self.resolution if self.reference_resolution is None else self.reference_resolution
        return {"resolution": self.resolution, "reference_resolution": reference}

    @property
    def source(self) -> dict[str, Any]:
        """Which part of a data set is read, and by which columns: keywords of `samples.read_samples`."""
        return source_of(
            self.dataset_config_name, self.split, self.image_column, self.cond_image_column, self.caption_column
        )


@dataclass(frozen=True)
class Settings:
    """A run's settings, read. model: None for the embedded one. data: None where nothing names any."""

    model: str | None
    data: str | None
    config: TrainConfig
    run: RunConfig


def field_kinds() -> dict[str, Any]:
    """Every field by its dotted name -> its type."""
    kinds: dict[str, Any] = {}
    for prefix, record in (("", RunConfig), ("", TrainConfig), ("dropping.", Dropping)):
        hints = typing.get_type_hints(record)
        kinds |= {prefix + field.name: hints[field.name] for field in fields(record)}
    return {name: kind for name, kind in kinds.items() if not is_dataclass(kind)}


def read_settings(
    file: Path | None = None, sets: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> Settings:
    """The settings of a run: `flags` over `sets` over `file` over the defaults.

    sets: texts as `field=value`. flags: by dotted field, and "model" and "data"; None stands for a flag that is not
    there. Raises ValueError, in one sentence, for a field that there is not (with the nearest names), for a value of
    another type, for a flag and a set of one field that differ, and for a file that cannot be read.
    """
    kinds = field_kinds()
    values = DEFAULTS | ({} if file is None else _read_file(file, kinds))
    texts: dict[str, str] = {}
    for text in sets:
        name, separator, value = text.partition("=")
        name = name.strip()
        if not separator:
            raise ValueError(f"The setting {text} has no value: write it as field=value, such as ema=0.99.")
        _check_name(name, kinds)
        values[name], texts[name] = from_text(name, value.strip(), kinds[name]), text
    for name, value in (flags or {}).items():
        if value is not None and name in texts and values[name] != value:
            raise ValueError(f"{name} is {value!r}, and the setting {texts[name]} differs: leave one of the two out.")
        if value is not None:
            values[name] = value
    dropping = {name.partition(".")[2]: value for name, value in values.items() if name.startswith("dropping.")}
    config, run = ({f.name: values[f.name] for f in fields(r) if f.name in values} for r in (TrainConfig, RunConfig))
    return Settings(
        model=values.get("model"),
        data=values.get("data"),
        config=TrainConfig(dropping=Dropping(**dropping), **config),
        run=RunConfig(**run),
    )


def _check_name(name: str, kinds: Mapping[str, Any]) -> None:
    if name in kinds:
        return
    inside = [known for known in kinds if known.startswith(f"{name}.")]
    if inside:
        raise ValueError(f"{name} has fields of its own: set one of them, such as {inside[0]}.")
    plain = {known.rpartition(".")[2]: known for known in kinds}
    near = difflib.get_close_matches(name.replace("-", "_").rpartition(".")[2], plain, 3, 0.6)
    hint = (
        f"did you mean {' or '.join(plain[each] for each in near)}?" if near else f"choose one of {', '.join(kinds)}."
    )
    raise ValueError(f"There is no field {name!r}: {hint}")


# Values ---------------------------------------------------------------------------------------------------------------

TAKES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    tuple: "texts, separated by commas",
    Sequence: "numbers, separated by commas, or none",
    Mapping: "shares by name, such as random=0.5,blobs=0.5",
}


def _base(kind: Any) -> tuple[Any, bool]:
    """A type without its None, and whether it had one."""
    if isinstance(kind, types.UnionType):
        inner = [each for each in typing.get_args(kind) if each is not types.NoneType]
        return inner[0], True
    return kind, False


def _wrong(name: str, value: Any, kind: Any) -> ValueError:
    base, optional = _base(kind)
    takes = TAKES[typing.get_origin(base) or base]
    takes = f"whole {takes}" if base == Sequence[int] else takes
    return ValueError(f"{name} is {value!r}: pass {takes}{', or none' if optional else ''}.")


def from_text(name: str, text: str, kind: Any) -> Any:
    """The value that `text` stands for, of the type of the field. Raises ValueError that says what the field takes."""
    base, optional = _base(kind)
    origin = typing.get_origin(base) or base
    if optional and text.lower() == "none":
        return None
    if origin is Sequence and text.lower() == "none":
        return ()
    try:
        if base is bool:
            return {"true": True, "false": False}[text.lower()]
        if origin is tuple:
            return tuple(part.strip() for part in text.split(","))
        if origin is Sequence:
            return tuple(typing.get_args(base)[0](part) for part in text.split(","))
        if origin is Mapping:
            pairs = [part.partition("=") for part in text.split(",")]
            shares = {key.strip(): float(share) for key, _, share in pairs}
            if len(shares) < len(pairs):
                raise ValueError("a name twice")
            return shares
        return base(text)
    except (ValueError, KeyError) as error:
        raise _wrong(name, text, kind) from error


def from_json(name: str, value: Any, kind: Any) -> Any:
    """`value` of a file as the field has it. Raises ValueError that says what the field takes."""
    base, optional = _base(kind)
    origin = typing.get_origin(base) or base
    if value is None and optional:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if origin is float and is_number:
        return value
    if origin is int and is_number and isinstance(value, int):
        return value
    if origin in (bool, str) and type(value) is origin:
        return value
    if origin is Path and isinstance(value, str):
        return Path(value)
    inner = typing.get_args(base)[0] if origin is Sequence else str
    if origin in (tuple, Sequence) and isinstance(value, list):
        return tuple(from_json(name, each, inner) for each in value)
    if origin is Mapping and isinstance(value, dict):
        return {key: from_json(name, share, float) for key, share in value.items()}
    raise _wrong(name, value, kind)


def _read_file(file: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a file sets, by dotted name, and "model" and "data" where it names them."""
    try:
        record = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=once_each)
    except OSError as error:
        raise ValueError(f"The config {file} cannot be read ({error.strerror}): name another file.") from error
    except TwiceError as error:
        raise ValueError(f"The config {file} {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The config {file} is no JSON file ({error}): name the config.json of a run.") from error
    if not isinstance(record, dict):
        raise ValueError(f"The config {file} holds no fields: write them as an object, such as {{'rank': 8}}.")
    record = {name: value for name, value in record.items() if name not in RECORDED}
    base = record.pop("base", None)
    values: dict[str, Any] = {} if base in (None, EMBEDDED) else {"model": base}
    values |= {name: record.pop(name) for name in ("model", "data") if name in record}
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} is {value!r} in {file}: pass a text.")
    if isinstance(record.get("run"), dict):  # as it was asked for, and not what it came to on that machine
        record = {name: value for name, value in record.items() if name not in record["run"]}
    nested = {"run": "", "dropping": "dropping."}  # what the record of a run groups
    for name, value in record.items():
        group = value if name in nested and isinstance(value, dict) else {name: value}
        prefix = nested.get(name, "") if group is value else ""
        for field, entry in group.items():
            try:
                _check_name(prefix + field, kinds)
                values[prefix + field] = from_json(prefix + field, entry, kinds[prefix + field])
            except ValueError as error:
                raise ValueError(f"In the config {file}: {error}") from error
    return values
