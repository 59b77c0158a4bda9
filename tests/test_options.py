"""The settings of a training run: flags over --set over a file over defaults, each checked against its dataclass."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from sparse_context.training.config import TrainConfig
from sparse_context.training.dropping import Dropping
from sparse_context.training.options import RunConfig, field_kinds, read_settings


def test_nothing_said_is_the_defaults():
    settings = read_settings()
    assert settings.config == TrainConfig(validation_steps=500) and settings.run == RunConfig()
    assert (settings.model, settings.data) == (None, None)


def test_no_field_has_two_meanings():
    names = [field.name for record in (TrainConfig, RunConfig) for field in fields(record)]
    assert len(set(names)) == len(names)


def test_a_flag_goes_before_set_and_set_before_the_file(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"rank": 8, "ema": 0.5, "seed": 3, "resolution": 256, "dropping": {"dense": 0.3}}))
    settings = read_settings(file, ["ema=0.9", "seed=4"], {"seed": None, "rank": 16})
    assert (settings.config.rank, settings.config.ema, settings.config.seed) == (16, 0.9, 4)
    assert settings.run.resolution == 256
    assert settings.config.dropping.dense == 0.3 and settings.config.dropping.keep_min == 0.05
    assert read_settings(file, ["seed=4", "seed=5"]).config.seed == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"rank": 8, "rank": 16}', "has 'rank' twice: write it once."),
        ("[" * 100_000, "is no JSON file"),
    ],
)
def test_a_file_that_says_a_thing_twice_or_too_deeply_is_refused(tmp_path, text, said):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=f"^The config {tmp_path / 'c.json'} {said}"):
        read_settings(tmp_path / "c.json")
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"rank": 8}')  # as Windows writes it
    assert read_settings(tmp_path / "c.json").config.rank == 8


def test_a_flag_and_a_set_that_differ_are_refused():
    assert read_settings(sets=["rank=8"], flags={"rank": 8}).config.rank == 8
    with pytest.raises(ValueError, match="^rank is 16, and the setting rank=8 differs: leave one of the two out.$"):
        read_settings(sets=["rank=8"], flags={"rank": 16})


@pytest.mark.parametrize(
    ("text", "value"),
    {
        "ema=0.99": 0.99,
        "lora_alpha=16": 16.0,
        "shift=none": None,
        "shift=2": 2.0,
        "gradient_checkpointing=true": True,
        "full=False": False,
        "lora_layers=to_q, to_v": ("to_q", "to_v"),
        "lora_layers=none": None,
        "lr_scheduler=cosine": "cosine",
        "cache_dir=a/b=c": Path("a/b=c"),
        "dropping.dense=0.2": 0.2,
        "dropping.coverage=0,0.1": (0.0, 0.1),
        "dropping.overview_factors=2, 4": (2, 4),
        "dropping.overview_factors=none": (),
        "dropping.overview_layout=reference": "reference",
        "dropping.mix=random=0.5,blobs=0.5": {"random": 0.5, "blobs": 0.5},
    }.items(),
)
def test_a_text_becomes_the_value_of_its_field(text, value):
    settings = read_settings(sets=[text])
    name = text.partition("=")[0].removeprefix("dropping.")
    owner = next(o for o in (settings.run, settings.config, settings.config.dropping) if hasattr(o, name))
    assert getattr(owner, name) == value and type(getattr(owner, name)) is type(value)


WRONG = {
    "rank=many": "rank is 'many': pass a whole number.",
    "rank=1.5": "rank is '1.5': pass a whole number.",
    "rank=none": "rank is 'none': pass a whole number.",
    "shift=far": "shift is 'far': pass a number, or none.",
    "full=maybe": "full is 'maybe': pass true or false.",
    "dropping.coverage=0,x": "dropping.coverage is '0,x': pass numbers, separated by commas, or none.",
    "dropping.overview_factors=2,2.5": "dropping.overview_factors is '2,2.5': pass whole numbers, separated by commas,",
    "dropping.mix=random": "dropping.mix is 'random': pass shares by name, such as random=0.5,blobs=0.5.",
    "dropping.mix=random=1,random=2": "dropping.mix is 'random=1,random=2': pass shares by name",
    "ema": "The setting ema has no value: write it as field=value, such as ema=0.99.",
    "learning_rte=1": "There is no field 'learning_rte': did you mean learning_rate",
    "lora-alpha=1": "There is no field 'lora-alpha': did you mean lora_alpha",
    "dense=1": "There is no field 'dense': did you mean dropping.dense?",
    "dropping.keep=1": "There is no field 'dropping.keep': did you mean ",
    "dropping=0.5": "dropping has fields of its own: set one of them, such as dropping.keep_min.",
    "xyzzy=1": "There is no field 'xyzzy': choose one of train_batch_size, resolution, ",
}


@pytest.mark.parametrize(("text", "says"), WRONG.items())
def test_a_wrong_field_or_value_is_one_sentence(text, says):
    with pytest.raises(ValueError) as caught:
        read_settings(sets=[text])
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    {
        "{": "is no JSON file",
        "[1]": "holds no fields",
        '{"rank": "many"}': "rank is 'many': pass a whole number.",
        '{"rank": true}': "rank is True: pass a whole number.",
        '{"rank": 1.5}': "rank is 1.5: pass a whole number.",
        '{"full": 1}': "full is 1: pass true or false.",
        '{"lora_layers": "to_q"}': "lora_layers is 'to_q': pass texts, separated by commas, or none.",
        '{"ranks": 1}': "There is no field 'ranks': did you mean rank?",
        '{"dropping": {"dens": 1}}': "There is no field 'dropping.dens': did you mean dropping.dense?",
        '{"dropping": 1}': "dropping has fields of its own",
        '{"dropping": {"overview_factors": [2.5]}}': "dropping.overview_factors is 2.5: pass a whole number.",
        '{"run": {"resolutio": 1}}': "There is no field 'resolutio': did you mean resolution",
        '{"base": 3}': "model is 3",
    }.items(),
)
def test_a_file_that_is_no_config_is_one_sentence(tmp_path, content, says):
    file = tmp_path / "settings.json"
    file.write_text(content)
    with pytest.raises(ValueError) as caught:
        read_settings(file)
    assert says in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be read .No such file or directory.: name another file.$"):
        read_settings(tmp_path / "none.json")


def test_every_field_can_be_set_from_a_record_of_all_of_them(tmp_path):
    dropping = Dropping(overview_factors=(2, 4))
    config = TrainConfig(lora_layers=("to_q",), shift=2.0, dropping=dropping, teach=0.1, teach_heads=("1.0", "1.1"))
    run = RunConfig(cache_dir=Path("x"))
    record = json.dumps(
        asdict(config) | {"run": asdict(run)} | {"version": "1", "base": "a/b", "data": "c"}, default=str
    )
    file = tmp_path / "config.json"
    file.write_text(record)
    settings = read_settings(file)
    assert (settings.model, settings.data) == ("a/b", "c")
    assert json.loads(json.dumps(asdict(settings.config))) == json.loads(json.dumps(asdict(config)))
    assert settings.run == run
    assert set(field_kinds()) >= {"dropping.mix", "rank", "report_to"}


def test_the_records_are_names_of_the_package():
    import sparse_context.training

    assert sparse_context.training.TrainConfig is TrainConfig and sparse_context.training.RunConfig is RunConfig
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        sparse_context.training.Trainer  # noqa: B018
