"""Settings as JSON: what a face writes, every face reads back."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_context import SparseContextConfig, blend, mask
from sparse_context.pipelines import ModelSpec, Request
from sparse_context.pipelines.settings_file import (
    ALL_KEYS,
    REQUEST_KEYS,
    Settings,
    parse_settings,
    read_settings,
    write_settings,
)

VALUES = {
    "model": "a/b",
    "dtype": "float32",
    "device": "cpu",
    "cpu_offload": "model",
    "lora": "none",
    "lora_scale": 0.5,
    "kv": True,
    "quantization": "int8",
    "vae": "channels-last",
    "keep": [0.1, 12, "auto"],
    "selector": [None, "edges", {"saliency": 0.7, "edges": 0.3}],
    "task": ["edit", "global", "subject"],
    "overview": [4, None, "trained"],
    "overview_layout": "spread",
    "coverage": 0.1,
    "share": "joint",
    "floor": 2,
    "multiple_of": 8,
    "merge": 0.0,
    "mass": 0.5,
    "psnr": 30.0,
    "reference_max_pixels": 2_000_000,
    "phrases": ["the red car", None, None],
    "text_model": "c/d",
    "prompt": "the cat, кот",
    "seed": 7,
    "steps": 4,
    "height": 64,
    "width": 96,
    "guidance_scale": 2.5,
    "negative_prompt": "blur",
}


def test_every_field_without_pictures_is_a_key_of_one_meaning():
    assert sorted(VALUES) == sorted(set(ALL_KEYS)) == sorted(ALL_KEYS)
    of_config = {each.name for each in fields(SparseContextConfig)} - {"seed"}
    of_request = {each.name for each in fields(Request)} - {"references", "inpaint", "config"}
    assert set(ALL_KEYS) == {each.name for each in fields(ModelSpec)} | of_config | of_request


def test_what_is_written_is_read_back(tmp_path):
    settings = parse_settings(VALUES)
    assert settings.spec == ModelSpec("a/b", "float32", "cpu", "model", "none", 0.5, True, "int8", "channels-last")
    assert settings.request.config.keep == [0.1, 12, "auto"] and settings.request.seed == 7
    assert settings.request.config.seed == 0
    write_settings(settings, tmp_path / "settings.json")
    assert read_settings(tmp_path / "settings.json") == settings
    assert "кот" in (tmp_path / "settings.json").read_text(encoding="utf-8")


def test_defaults_are_left_out_but_for_keep():
    assert Settings().to_dict() == {"keep": 0.2}
    assert parse_settings(VALUES).to_dict() == {key: value for key, value in VALUES.items() if key != "merge"}
    assert parse_settings({"overview": None}).to_dict() == {"keep": 0.2, "overview": None}


def test_values_go_over_a_base_and_the_base_stays():
    base = parse_settings({"keep": 0.1, "task": "subject", "steps": 4, "kv": True})
    changed = parse_settings({"keep": 0.3, "seed": 1}, base, REQUEST_KEYS)
    assert changed.to_dict() == {"kv": True, "keep": 0.3, "task": "subject", "seed": 1, "steps": 4}
    assert base.request.config.keep == 0.1 and base.request.seed == 0


def written(**config):
    return Settings(request=Request("", config=SparseContextConfig(**config))).to_dict()


def test_selectors_and_numbers_of_python_become_json():
    masks = mask([np.zeros((4, 4), np.uint8)])
    assert written(selector=masks)["selector"] == "mask"
    assert written(selector={masks: 1, "edges": 3})["selector"] == {"mask": 1.0, "edges": 3.0}
    assert written(selector=blend({"saliency": 1, "edges": 1}))["selector"] == {"saliency": 0.5, "edges": 0.5}
    assert written(selector=(None, "edges"))["selector"] == [None, "edges"]
    assert json.dumps(written(keep=np.array([0.25, 0.5]), floor=np.int64(3))) == '{"keep": [0.25, 0.5], "floor": 3}'


def user_function(image, grid, generator):
    return np.zeros(grid, np.float32)


@pytest.mark.parametrize("selector", [user_function, {user_function: 1.0}, blend({blend({"edges": 1}): 1})])
def test_a_function_cannot_be_written(selector):
    with pytest.raises(ValueError, match="is a function, which no file can hold: name one of the package's.$"):
        written(selector=selector)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kep": 0.1}, "'kep' is no setting here. Did you mean 'keep'?"),
        ({"qqq": 1}, "'qqq' is no setting here. Leave it out."),
        ({"references": []}, "'references' is no setting here."),
        ({"config": {}}, "'config' is no setting here. Leave it out."),
        ({"keep": "lots"}, "keep is 'lots': pass a ratio above 0"),
        ({"keep": 10**400, "floor": -(10**400)}, "floor is -1000"),
        ({"keep": True}, "keep is True: pass a ratio above 0"),
        ({"selector": "edgs"}, "Did you mean 'edges'?"),
        ({"steps": "4"}, "steps is '4': pass a whole number or null."),
        ({"steps": True}, "steps is True: pass a whole number or null."),
        ({"steps": 4.5}, "steps is 4.5: pass a whole number or null."),
        ({"seed": None}, "seed is None: pass a whole number."),
        ({"guidance_scale": "4"}, "guidance_scale is '4': pass a number or null."),
        ({"kv": 1}, "kv is 1: pass true or false."),
        ({"model": 3}, "model is 3: pass text or null."),
        ({"prompt": ["a"]}, r"prompt is ['a']: pass text."),
        ({"dtype": "int4"}, "dtype is 'int4': choose auto,"),
    ],
)
def test_what_no_setting_takes_is_one_sentence(values, says):
    with pytest.raises(ValueError) as raised:
        parse_settings(values)
    assert says in str(raised.value)


def test_what_comes_from_elsewhere_names_no_model():
    with pytest.raises(ValueError, match="^'lora' is no setting here. "):
        parse_settings({"lora": "a.safetensors"}, keys=REQUEST_KEYS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["edges", "auto"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("edges"), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(ALL_KEYS) | st.text(max_size=6), JSON, max_size=3))
def test_any_json_is_taken_or_refused(values):
    try:
        settings = parse_settings(values)
    except ValueError:
        return
    assert parse_settings(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("text", "says"),
    {
        "{": "cannot be read",
        "[1]": "hold no JSON object",
        '{"keep": 0}': "settings.json: keep is 0: pass",
        '{"stepz": 0}': "settings.json: 'stepz' is no setting here. Did you mean 'steps'?",
        "[" * 100_000: "cannot be read",
    }.items(),
)
def test_a_file_that_holds_no_settings(tmp_path, text, says):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match="^The settings ") as raised:
        read_settings(tmp_path / "settings.json")
    assert says in str(raised.value)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match="gone.json cannot be read .No such file or directory.: name a JSON file.$"):
        read_settings(tmp_path / "gone.json")


def test_a_request_is_made_of_settings():
    request = replace(parse_settings({"keep": 0.1, "prompt": "a cat"}).request, references=[])
    assert (request.prompt, request.config.keep, request.references) == ("a cat", 0.1, ())
