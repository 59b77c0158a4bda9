"""What weights were trained for: the record, what is in effect of it, and what a call makes of that."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import CASES, QUICK, build_flux2, cases

from sparse_context import SparseContextConfig, apply_sparse_context, last_selection
from sparse_context.context import Call, SparseContext
from sparse_context.families.flux2.drop import attach
from sparse_context.pipelines import embedded
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec
from sparse_context.tokens import ReferenceTokens
from sparse_context.trained import (
    FILE,
    KEY,
    Trained,
    combine,
    note_trained,
    read_folder,
    read_record,
    trained_for,
    write_record,
)

# Several adapters in one model are the purpose
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

BY_4 = Trained((4,), "spread", False, (0.05, 0.5))


@pytest.mark.parametrize(
    "trained",
    [
        Trained(),
        Trained((2, 4), "reference", True, (0.03, 1.0)),
        Trained((), "spread", False, (0.05, 1.0)),
        Trained((8,), kv=None),
        Trained((4,), tasks=("global", "edit")),
    ],
)
def test_a_record_is_read_as_it_was_written(trained):
    assert read_record(json.loads(json.dumps(write_record(trained)))) == trained


def test_a_record_of_before_knows_no_overviews():
    assert read_record({"steps": 10, "keep": [0.05, 1.0], "kv": True}) == Trained((), "spread", True, (0.05, 1.0))
    assert read_record({}) == Trained()


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"overview": {"factors": [1]}}, r"are by \[1\]: pass whole numbers from 2 to 16"),
        ({"overview": {"factors": ["4"]}}, r"are by \['4'\]"),
        ({"overview": {"factors": [4], "layout": "over"}}, "layout of overviews is 'over': choose one of spread, ref"),
        ({"overview": {"factors": 4}}, "cannot be read .*: save them anew"),
        (
            {"overview": {"factors": [4], "tasks": ["auto"]}},
            r"tasks of overviews are \['auto'\]: choose of edit, global",
        ),
        ({"overview": 4}, "cannot be read"),
        ({"keep": [0.1]}, "cannot be read"),
        ({"keep": "much"}, "could not convert|cannot be read"),
        ({"keep": [5, 7]}, r"kept runs from 5.0 to 7.0: pass two numbers from 0 to 1"),
        ({"keep": [0.4, 0.1]}, r"kept runs from 0.4 to 0.1: .*, the smaller one first"),
        ({"kv": "yes"}, "kv is 'yes': pass True or False"),
    ],
)
def test_a_record_that_says_it_in_another_way_is_refused(record, says):
    with pytest.raises(ValueError, match=says):
        read_record(record)


def test_of_several_weights_the_tasks_that_all_know_have_overviews():
    edits, subjects, every = (Trained((4,), tasks=tasks) for tasks in (("edit", "global"), ("edit", "subject"), ()))
    assert combine([edits, every]).tasks == ("edit", "global") and combine([edits, every]).factors == (4,)
    assert combine([edits, subjects]).tasks == ("edit",)
    assert combine([Trained((4,), tasks=("global",)), subjects]).factors == ()
    assert [edits.shows(task) for task in ("edit", "global", "subject")] == [True, True, False]
    assert every.shows("subject") and not Trained().shows("edit")


def test_factors_are_in_order_and_named_once():
    assert Trained((8, 2, 2)).factors == (2, 8)


# What is in effect ----------------------------------------------------------------------------------------------------


@pytest.fixture
def transformer():
    return CASES["klein"].build().transformer


def add(transformer, name, trained=None):
    transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]), adapter_name=name)
    if trained is not None:
        note_trained(transformer, trained, name)


def test_weights_of_which_nothing_is_noted_were_trained_for_nothing(transformer):
    assert trained_for(None) is None and trained_for(transformer) is None
    add(transformer, "style")
    assert trained_for(transformer) is None


def test_a_model_that_is_compiled_was_trained_for_the_same(transformer):
    note_trained(transformer, BY_4)
    assert trained_for(torch.compile(transformer, backend="eager")) == BY_4
    whole = torch.compile(CASES["klein"].build().transformer, backend="eager")
    note_trained(whole, BY_4)
    assert trained_for(whole._orig_mod) == BY_4


def test_an_adapter_counts_while_it_is_there(transformer):
    add(transformer, "overview", BY_4)
    assert trained_for(transformer) == BY_4
    transformer.disable_adapters()
    assert trained_for(transformer) is None
    transformer.enable_adapters()
    assert trained_for(transformer) == BY_4
    transformer.unload_lora()
    assert trained_for(transformer) is None
    add(transformer, "overview")  # another one of the same name
    assert trained_for(transformer) is None


def test_an_adapter_of_scale_0_does_not_count(transformer):
    add(transformer, "overview", BY_4)
    transformer.set_adapters(["overview"], [0.0])
    assert trained_for(transformer) is None
    transformer.set_adapters(["overview"], [0.5])
    assert trained_for(transformer) == BY_4


def test_a_merged_adapter_counts_until_it_is_unloaded(transformer):
    add(transformer, "overview", BY_4)
    transformer.fuse_lora()
    transformer.disable_adapters()
    assert trained_for(transformer) == BY_4
    transformer.enable_adapters()
    transformer.unfuse_lora()
    transformer.disable_adapters()
    assert trained_for(transformer) is None


def test_an_adapter_that_is_deleted_and_one_that_is_not_active_do_not_count(transformer):
    add(transformer, "overview", BY_4)
    add(transformer, "style")
    transformer.set_adapters(["style"])
    assert trained_for(transformer) is None
    transformer.set_adapters(["style", "overview"])
    assert trained_for(transformer) == BY_4
    transformer.delete_adapters("overview")
    assert trained_for(transformer) is None


def test_several_count_for_what_they_have_in_common(transformer):
    note_trained(transformer, Trained((2, 4, 8), keep=(0.02, 0.4)))
    assert trained_for(transformer) == Trained((2, 4, 8), kv=False, keep=(0.02, 0.4))
    add(transformer, "overview", BY_4)
    add(transformer, "dropping", Trained((), kv=False, keep=(0.1, 1.0)))
    assert trained_for(transformer) == Trained((), kv=False, keep=(0.1, 0.4))  # the one that is active
    transformer.set_adapters(["overview", "dropping"])
    assert trained_for(transformer) == Trained((), kv=False, keep=(0.1, 0.4))
    note_trained(transformer, Trained((4, 8), keep=(0.1, 1.0)), "dropping")
    assert trained_for(transformer) == Trained((4,), kv=False, keep=(0.1, 0.4))
    note_trained(transformer, Trained((2, 4, 8), keep=(0.5, 0.9)))  # which no share is within
    note_trained(transformer, Trained((4,), keep=(0.1, 0.4)), "dropping")
    assert trained_for(transformer) == Trained((4,), kv=False)
    note_trained(transformer, Trained((4,), "reference"), "overview")
    assert trained_for(transformer).factors == ()


def test_a_lora_may_teach_overviews_to_a_base_that_knows_none(transformer):
    note_trained(transformer, Trained(keep=(0.1, 1.0)))
    assert trained_for(transformer).factors == ()
    add(transformer, "overview", BY_4)
    assert trained_for(transformer).factors == (4,)


def test_what_was_trained_for_another_mode_does_not_count(transformer):
    add(transformer, "overview", replace(BY_4, kv=True))
    assert trained_for(transformer) is None
    assert trained_for(transformer, kv=True) == replace(BY_4, kv=True)
    note_trained(transformer, replace(BY_4, kv=None), "overview")
    assert trained_for(transformer).factors == trained_for(transformer, kv=True).factors == (4,)


# Calls ----------------------------------------------------------------------------------------------------------------


def overviews_of(pipe, case, **changes):
    """The overviews of a call, as (factor, layout)."""
    apply_sparse_context(pipe, **{"keep": 0.3, "selector": QUICK, **changes})
    case.call(pipe, case.references(2))
    return [(each.factor, each.layout) for each in last_selection(pipe).overviews.values()]


@pytest.mark.parametrize("name", cases("klein", "klein-modular", "klein-inpaint"))
def test_a_call_takes_what_the_weights_were_trained_for_by_then(name):
    case = CASES[name]
    pipe = case.build()
    assert overviews_of(pipe, case) == []
    add(pipe.transformer, "overview", BY_4)
    case.call(pipe, case.references(2))  # with what was applied before
    assert [each.factor for each in last_selection(pipe).overviews.values()] == [4, 4]
    assert str(last_selection(pipe)).endswith("the weights were trained for overviews by 4, laid out as 'spread'")
    assert overviews_of(pipe, case) == [(4, "spread")] * 2
    assert overviews_of(pipe, case, overview=None) == []
    assert overviews_of(pipe, case, overview=[None, "trained"]) == [(4, "spread")]
    assert overviews_of(pipe, case, overview=8) == [(8, "spread")] * 2
    assert overviews_of(pipe, case, overview_layout="reference") == [(4, "reference")] * 2
    pipe.transformer.unload_lora()
    assert overviews_of(pipe, case) == []
    assert overviews_of(pipe, case, overview=8) == [(8, "reference")] * 2


def test_kv_weights_count_in_a_kv_pipeline_alone():
    for name, factors in (("klein-kv", [4, 4]), ("klein", [])):
        pipe = CASES[name].build()
        note_trained(pipe.transformer, replace(BY_4, kv=True))
        assert [factor for factor, _ in overviews_of(pipe, CASES[name])] == factors


def test_where_a_pipeline_takes_no_overviews_none_is_by_default_and_one_that_is_named_is_refused():
    pipe = CASES["klein"].build()
    note_trained(pipe.transformer, BY_4)
    tokens = ReferenceTokens(torch.zeros(1, 64, 2), torch.zeros(64, 3))
    for overview in ("trained", None):
        call = Call(pipe, SparseContext(SparseContextConfig(keep=0.25, selector="uniform", overview=overview), attach))
        assert len(call.keep(lambda: tokens, [(8, 8)], lambda i, mask: None)) == 16 and call.selection.overviews == {}
    call = Call(pipe, SparseContext(SparseContextConfig(overview=4), attach))
    with pytest.raises(ValueError, match="overview is 4, but Flux2KleinPipeline takes none: leave it out"):
        call.keep(lambda: tokens, [(8, 8)], lambda i, mask: None)


def test_another_number_of_tokens_than_an_overview_has_is_refused():
    pipe = CASES["klein"].build()
    tokens = ReferenceTokens(torch.zeros(1, 64, 2), torch.zeros(64, 3))
    picture = np.zeros((64, 64, 3), np.uint8)
    call = Call(pipe, SparseContext(SparseContextConfig(overview=4), attach))
    with pytest.raises(ValueError, match="made 64 tokens of overviews that have 4.* pass overview=None, or restore"):
        call.keep(lambda: tokens, [(8, 8)], lambda i, mask: picture, encode_overviews=lambda overviews, tokens: tokens)


# Loading --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from diffusers import Flux2KleinPipeline

    folder = tmp_path_factory.mktemp("model")
    build_flux2(Flux2KleinPipeline, is_distilled=True).save_pretrained(folder)
    return folder


def save_adapter(path, trained):
    """A LoRA with this record, as training leaves it."""
    pipe = CASES["klein"].build()
    add(pipe.transformer, "default")
    pipe.save_lora_weights(path.parent, get_peft_model_state_dict(pipe.transformer), weight_name=path.name)
    record = {"steps": 1} | write_record(trained)
    save_file(load_file(path), path, {"format": "pt", KEY: json.dumps(record)})
    return str(path)


def test_a_lora_says_what_it_was_trained_for(model, tmp_path):
    lora = save_adapter(tmp_path / "lora.safetensors", BY_4)
    pipe = load(ModelSpec(str(model), lora=lora, dtype="float32", device="cpu"))
    assert trained_for(pipe.transformer) == BY_4
    off = load(ModelSpec(str(model), lora=lora, lora_scale=0.0, dtype="float32", device="cpu"))
    assert trained_for(off.transformer) is None
    pipe.unload_lora_weights()
    assert trained_for(pipe.transformer) is None


def test_a_lora_whose_record_cannot_be_read_is_refused_by_its_name(model, tmp_path):
    lora = save_adapter(tmp_path / "lora.safetensors", BY_4)
    save_file(load_file(lora), lora, {"format": "pt", KEY: json.dumps({"keep": ["m", 1]})})
    with pytest.raises(ValueError, match="lora.safetensors says in no known way what it was trained for: .*'m'"):
        load(ModelSpec(str(model), lora=lora, dtype="float32", device="cpu"))


def test_a_lora_in_kv_mode_says_so(model, tmp_path):
    lora = save_adapter(tmp_path / "lora.safetensors", replace(BY_4, kv=True))
    pipe = load(ModelSpec(str(model), lora=lora, kv=True, dtype="float32", device="cpu"))
    assert trained_for(pipe.transformer, kv=True) == replace(BY_4, kv=True)
    assert [factor for factor, _ in overviews_of(pipe, CASES["klein-kv"])] == [4, 4]


def test_a_checkpoint_says_what_it_was_trained_for_beside_its_weights(model):
    assert read_folder(model / "transformer") is None
    file = model / "transformer" / FILE
    try:
        file.write_text(json.dumps(write_record(BY_4)))
        pipe = load(ModelSpec(str(model), dtype="float32", device="cpu"))
        assert trained_for(pipe.transformer) == BY_4
        file.write_text("{")
        with pytest.raises(ValueError, match="says in no known way what weights were trained for"):
            load(ModelSpec(str(model), dtype="float32", device="cpu"))
    finally:
        file.unlink()


def test_a_checkpoint_that_diffusers_reads_says_it_too(tmp_path):
    """As a model of its own, from a pipeline's subfolder, and with a whole pipeline; what is noted by hand counts."""
    CASES["klein"].build().transformer.save_pretrained(tmp_path / "transformer")
    file = tmp_path / "transformer" / FILE
    for how in ({"pretrained_model_name_or_path": tmp_path / "transformer"}, {"subfolder": "transformer"}):
        pipe = CASES["klein"].build()
        pipe.transformer = Flux2Transformer2DModel.from_pretrained(**{"pretrained_model_name_or_path": tmp_path} | how)
        file.unlink(missing_ok=True)
        assert overviews_of(pipe, CASES["klein"]) == []
        file.write_text(json.dumps(write_record(BY_4)))
        assert [factor for factor, _ in overviews_of(pipe, CASES["klein"])] == [4, 4]
        assert "the weights were trained for overviews by 4" in str(last_selection(pipe))
        note_trained(pipe.transformer, Trained())
        assert overviews_of(pipe, CASES["klein"]) == []
    pipe = CASES["klein"].build()
    pipe.transformer = Flux2Transformer2DModel.from_pretrained(tmp_path / "transformer")
    file.write_text("{")
    with pytest.raises(ValueError, match="says in no known way what weights were trained for"):
        apply_sparse_context(pipe)


def test_the_embedded_models_own_adapter_is_noted_where_it_is_folded_in(tmp_path, monkeypatch):
    adapter = tmp_path / "own.safetensors"
    record = embedded.adapter_record(embedded.ADAPTERS["plain"]) | write_record(BY_4)
    save_file(load_file(embedded.ADAPTERS["plain"]), adapter, {"format": "pt", KEY: json.dumps(record)})
    monkeypatch.setitem(embedded.ADAPTERS, "plain", adapter)
    pipe = load(ModelSpec(device="cpu"))
    assert trained_for(pipe.transformer) == BY_4
    assert not any("lora" in name for name, _ in pipe.transformer.named_parameters())
    assert trained_for(load(ModelSpec(device="cpu", lora_scale=0.0)).transformer) is None
