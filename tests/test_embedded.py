"""The embedded model as it is shipped: its weights, its adapters and its demo."""

import json

import cv2
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from recipes.mini.loss import position_ids
from sparse_context import SparseContextConfig
from sparse_context.embedded import demo
from sparse_context.embedded.demo import psnr, read_examples, run_demo, table
from sparse_context.evaluation import metrics
from sparse_context.pipelines.embedded import ADAPTERS, OVERVIEW, WEIGHTS, read_call_settings
from sparse_context.pipelines.engine import Engine
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec, Request
from sparse_context.trained import trained_for


@pytest.fixture(scope="module")
def pipe():
    """The dense base."""
    return load(ModelSpec(device="cpu", lora="none"))


def test_plain_diffusers_loads_what_is_shipped(pipe):
    plain = Flux2KleinPipeline.from_pretrained(WEIGHTS)
    plain.set_progress_bar_config(disable=True)
    assert type(plain) is type(pipe) and plain.config.is_distilled
    example, settings = read_examples()[0], read_call_settings(WEIGHTS)
    taken = ("height", "width", "max_sequence_length", "text_encoder_out_layers", "num_inference_steps")
    image = plain(
        image=example["references"],
        prompt=example["prompt"],
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        **{k: settings[k] for k in taken},
    ).images[0]
    made = Engine(pipe=pipe)(Request(example["prompt"], example["references"], SparseContextConfig(keep=1.0)))
    assert np.array_equal(image, made.image)
    assert not list(WEIGHTS.rglob("*.bin"))
    assert sum(f.stat().st_size for f in WEIGHTS.rglob("*")) < 34 * 2**20
    assert sum(weight.numel() for weight in pipe.transformer.parameters()) <= 12e6
    # With shifting that goes by the picture's size the last of eight steps would jump from half of the noise to none
    assert (pipe.scheduler.config.use_dynamic_shifting, pipe.scheduler.config.shift) == (False, 2.0)
    assert not any("checkpoints" in file.read_text() for file in WEIGHTS.rglob("*.json"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, pipe):
    """A LoRA of the base, as training leaves it, with weights by chance."""
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    transformer = load(ModelSpec(device="cpu", lora="none")).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "to_qkv_mlp_proj"]))
    layers = {name: 0.1 * torch.randn_like(weight) for name, weight in get_peft_model_state_dict(transformer).items()}
    folder = tmp_path_factory.mktemp("adapter")
    Flux2KleinPipeline.save_lora_weights(folder, transformer_lora_layers=layers, weight_name="a.safetensors")
    return folder / "a.safetensors"


@pytest.mark.parametrize("kv", [False, True])
def test_an_adapter_in_the_package_is_the_default(pipe, adapter, monkeypatch, kv):
    """Folded into the weights it says what plain diffusers makes of the file."""
    files = {mode: adapter if (mode == "kv") == kv else adapter.with_name("no") for mode in ADAPTERS}
    monkeypatch.setattr("sparse_context.pipelines.load.ADAPTERS", files)
    tuned, base = load(ModelSpec(device="cpu", kv=kv)), load(ModelSpec(device="cpu", lora="none"))
    assert type(tuned).__name__ == ("Flux2KleinKVPipeline" if kv else "Flux2KleinPipeline")
    plain = Flux2KleinPipeline.from_pretrained(WEIGHTS)
    plain.load_lora_weights(adapter.parent, weight_name=adapter.name, use_safetensors=True)
    assert not getattr(tuned.transformer, "peft_config", None)  # no layers beside the layers, which would take time
    call = dict(
        hidden_states=torch.rand(1, 40, 32),
        encoder_hidden_states=torch.rand(1, 8, 128),
        timestep=torch.tensor([0.7]),
        img_ids=position_ids(5, 8, 0),
        txt_ids=torch.zeros(8, 4),
    )
    with torch.no_grad():
        dense, none, folded, beside = (
            each.transformer(**call, return_dict=False)[0] for each in (pipe, base, tuned, plain)
        )
    torch.testing.assert_close(folded, beside, rtol=1e-3, atol=1e-4)
    assert torch.equal(dense, none) and (folded - dense).abs().max() > 0.01


def slopes(picture):
    """The differences of neighbouring grey levels, across and down: outlines and detail, whatever the colours."""
    grey = np.asarray(picture, float).mean(-1)
    return np.concatenate([np.diff(grey, axis=0).ravel(), np.diff(grey, axis=1).ravel()])


def test_aligned_edits_of_unseen_objects_show_the_object_and_its_detail(pipe):
    """Dense outputs follow the outlines and the detail of their own truth, and of no other scene's.

    A flat or blurred patch of the right colour has next to no slopes to agree with, and fails.
    """
    examples = [e for e in read_examples() if e["task"].startswith("edit")]
    assert {"edit_background", "edit_negative", "edit_grey"} <= {e["task"] for e in examples}
    for example in examples:
        made = slopes(
            Engine(pipe=pipe)(Request(example["prompt"], example["references"], SparseContextConfig(keep=1.0))).image
        )
        assert np.corrcoef(made, slopes(example["truth"]))[0, 1] > 0.6, example["name"]
        others = [e for e in read_examples() if not np.array_equal(e["references"][0], example["references"][0])]
        assert max(np.corrcoef(made, slopes(other["truth"]))[0, 1] for other in others) < 0.3, example["name"]


@pytest.mark.parametrize(
    "name, keep", [("side-by-side", 1.0), ("in-front", 1.0), ("side-by-side", 0.2), ("quarters", 0.2)]
)
def test_unseen_objects_that_move_keep_their_detail(pipe, name, keep):
    """With all tokens by the dense base, with a fifth as the package has it; a blur of the truth does not follow it."""
    examples = {example["name"]: example for example in read_examples()}
    example = examples.pop(name)
    config = SparseContextConfig(keep=keep, task=example["tasks"])
    model = pipe if keep == 1 else load(ModelSpec(device="cpu"))
    made = slopes(Engine(pipe=model)(Request(example["prompt"], example["references"], config)).image)
    truth = slopes(example["truth"])
    assert np.corrcoef(made, truth)[0, 1] > 0.6
    assert max(np.corrcoef(made, slopes(other["truth"]))[0, 1] for other in examples.values()) < 0.2
    assert np.corrcoef(slopes(cv2.GaussianBlur(np.asarray(example["truth"]), (0, 0), 3)), truth)[0, 1] < 0.6


def test_four_references_at_a_fraction_of_the_tokens(pipe):
    example = next(e for e in read_examples() if len(e["references"]) == 4)
    config = SparseContextConfig(keep=0.15, task="subject")
    made = Engine(pipe=pipe)(Request(example["prompt"], example["references"], config))
    assert made.selection.total == 4 * 576 and made.selection.kept == 4 * round(0.15 * 576)
    assert made.image.size == (128, 128)


def test_weights_for_overviews_are_loaded_on_request_and_say_so():
    plain, shows = load(ModelSpec(device="cpu")), load(ModelSpec(device="cpu", lora="overview"))
    assert trained_for(plain.transformer).factors == () and trained_for(shows.transformer).factors == (2, 4)
    blocks = [len(pipe.transformer.single_transformer_blocks) for pipe in (plain, shows)]
    assert blocks == [8, 12] == [pipe.transformer.config.num_single_layers for pipe in (plain, shows)]
    assert {weight.dtype for weight in shows.transformer.parameters()} == {torch.float32}
    assert OVERVIEW.stat().st_size < 7 * 2**20


@pytest.mark.parametrize(
    "other, said",
    [
        ({"model": "some/model"}, "^lora is 'overview', which the embedded model alone has: .* one of some/model"),
        ({"kv": True}, "weights for overviews were not trained for KV mode: leave kv out, or the overview"),
        ({"lora_scale": 0.5}, "weights for overviews have no scale, and lora_scale is 0.5: leave it out"),
        ({"quantization": "int8"}, "weights for overviews are not quantised, and quantization is 'int8': leave it out"),
    ],
)
def test_weights_for_overviews_are_refused_where_they_do_not_belong(other, said):
    with pytest.raises(ValueError, match=said):
        load(ModelSpec(device="cpu", lora="overview", **other))
    if "model" not in other and "kv" not in other:  # and in a request that needs them
        with pytest.raises(ValueError, match=said):
            Engine(ModelSpec(device="cpu", **other)).pipe(SparseContextConfig(overview=4))


def test_weights_for_overviews_that_are_missing_or_broken_are_an_error_in_a_sentence(tmp_path, monkeypatch):
    broken = tmp_path / "overview.safetensors"
    for module in ("load", "engine"):
        monkeypatch.setattr(f"sparse_context.pipelines.{module}.OVERVIEW", broken)
    with pytest.raises(ValueError, match="are incomplete, .*overview.safetensors missing: install"):
        load(ModelSpec(device="cpu", lora="overview"))
    engine = Engine(ModelSpec(device="cpu"))
    assert engine.pipe(SparseContextConfig(overview=4)) is engine.pipe()  # with none, what there is
    tensors = load_file(OVERVIEW)
    name = "single_transformer_blocks.4.attn.to_out.weight"
    for content, said in (
        ({key: tensor for key, tensor in tensors.items() if key != name}, f"{name} is missing"),
        (tensors | {name: torch.zeros(3, 3)}, "size"),
        (tensors | {"what": torch.zeros(3)}, "what"),
    ):
        save_file(content, broken, {"sparse_context": "{}"})
        with pytest.raises(ValueError, match=rf"overview.safetensors cannot be read \(.*{said}"):
            load(ModelSpec(device="cpu", lora="overview"))
    broken.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"overview.safetensors cannot be read \("):
        load(ModelSpec(device="cpu", lora="overview"))
    with pytest.raises(ValueError, match=r"overview.safetensors cannot be read \(.*\): save or fetch it anew"):
        Engine(ModelSpec(device="cpu")).pipe(SparseContextConfig(keep=1.0, overview=4))  # asks what it was trained for


def test_an_engine_takes_the_weights_that_a_request_needs():
    engine = Engine(ModelSpec(device="cpu"), bar=False)
    needs = {
        "overview": SparseContextConfig(keep=0.2, overview=4),
        None: SparseContextConfig(keep=0.2),
        "none": SparseContextConfig(keep=1.0, overview=4),
    }
    for lora, config in needs.items():
        wanted = load(ModelSpec(device="cpu", lora=lora)).transformer.state_dict()
        found = engine.pipe(config).transformer.state_dict()
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    example = next(example for example in read_examples() if example["name"] == "grey")
    assert (
        engine.select(Request(example["prompt"], example["references"], needs["overview"])).overviews[0].layout
        == "spread"
    )
    shows = Engine(ModelSpec(device="cpu", lora="overview"), bar=False)
    whole = SparseContextConfig(keep="auto", task="global")  # with an overview, not all tokens
    assert len(shows.pipe(whole).transformer.single_transformer_blocks) == 12
    assert engine.pipe(whole) is engine.pipe(needs["none"])
    kv = Engine(ModelSpec(device="cpu", kv=True), bar=False)
    assert len(kv.pipe(needs["overview"]).transformer.single_transformer_blocks) == 8


def test_the_demo_leaves_its_pictures_and_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "OVERVIEW", tmp_path / "missing")
    examples = read_examples()
    first = [next(e for e in examples if e["tasks"] == ["global"]), examples[-1]]
    monkeypatch.setattr("sparse_context.embedded.demo.read_examples", lambda: first)
    run_demo(tmp_path / "demo", keep=0.25)
    toned, name = (example["name"] for example in first)
    files = ["demo.png", "report.json", f"{toned}.png", f"{name}.png"]
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == sorted(files)
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report[0]["sparse"]["selection"]["kept"] == report[0]["sparse"]["selection"]["total"] == 256
    with Image.open(tmp_path / "demo" / f"{toned}.png") as sheet:
        dense, sparse = (np.asarray(sheet.crop((left, 0, left + 192, 192))) for left in (2 * 200, 3 * 200))
    assert np.array_equal(dense, sparse)  # with all tokens without the adapter
    kept = report[1]["sparse"]["selection"]
    assert kept["kept"] == round(0.25 * kept["total"])
    assert report[1]["sparse kv"]["selection"]["kept"] == kept["kept"]
    assert set(report[1]["speedup"]) == {"sparse", "sparse kv"}
    assert [line.split()[0] for line in table(report).splitlines()] == ["scene", toned, name]
    with Image.open(tmp_path / "demo" / f"{name}.png") as sheet:
        assert sheet.width == 8 * 192 + 7 * 8  # four references, the truth, three outputs


def test_the_demo_shows_an_overview_beside_dropping_where_the_whole_picture_is_edited(tmp_path, monkeypatch):
    """The figures are those of the pictures; in KV mode there are no weights for overviews, and all tokens are kept."""
    by_name = {example["name"]: example for example in read_examples()}
    monkeypatch.setattr("sparse_context.embedded.demo.read_examples", lambda: [by_name["grey"], by_name["placed"]])
    grey, placed = report = run_demo(tmp_path / "demo")
    ways = ("dropping", "sparse", "sparse kv")
    assert [grey[way]["selection"]["kept"] for way in ways] == [round(0.2 * 256), round(0.2 * 256), 256]
    assert set(grey["speedup"]) == set(ways) and "dropping" not in placed
    example, made = by_name["grey"], {}
    for way, overview in (("dropping", None), ("sparse", 4)):
        config = SparseContextConfig(keep=0.2, task="global", overview=overview)
        made[way] = Engine(ModelSpec(device="cpu"))(Request(example["prompt"], example["references"], config))
        assert made[way].selection.kept == 51 and bool(made[way].selection.overviews) == (way == "sparse")
        assert grey["psnr"][way] == pytest.approx(metrics.psnr(made[way].image, example["truth"]), abs=2e-3)
    assert psnr(example["truth"], example["truth"]) == 100
    dense = grey["psnr"]["dense"]
    assert dense > grey["psnr"]["dropping"] and grey["psnr_to_dense"].keys() == set(ways)
    head, line = table(report).splitlines()[-2:]
    assert head.split()[:2] == ["PSNR", "dense"]
    figures = [dense, *(grey[of][way] for way in ("dropping", "sparse") for of in ("psnr", "psnr_to_dense"))]
    assert [float(word) for word in line.split()[1::2]] == [round(value, 1) for value in figures]
    with Image.open(tmp_path / "demo" / "grey.png") as sheet:
        assert sheet.width == 6 * 192 + 5 * 8  # what was kept, the truth, all tokens, dropping, the overview, and KV
        dropped, shown = (np.asarray(sheet.crop((left, 0, left + 192, 192))) for left in (3 * 200, 4 * 200))
    for tile, way in ((dropped, "dropping"), (shown, "sparse")):
        assert np.array_equal(tile, np.asarray(made[way].image.resize((192, 192), Image.Resampling.LANCZOS)))


AHEAD = 6.0  # dB


def test_every_edit_of_the_whole_picture_is_shown_beside_dropping():
    assert {each["name"] for each in read_examples() if each["tasks"] == ["global"]} == {"grey", "sepia", "negative"}


@pytest.mark.parametrize("name", ["grey", "sepia", "negative"])
def test_an_overview_is_ahead_of_dropping_where_the_whole_picture_is_edited(name):
    """On each scene of the demo, with a fifth of the tokens, against the truth."""
    engine = Engine(ModelSpec(device="cpu"))
    example = next(example for example in read_examples() if example["name"] == name)
    reached = []
    for overview in (None, 4):
        config = SparseContextConfig(keep=0.2, task="global", overview=overview)
        made = engine(Request(example["prompt"], example["references"], config))
        reached.append(psnr(made.image, example["truth"]))
    assert reached[1] - reached[0] >= AHEAD, reached


def test_the_demo_keeps_of_each_reference_what_its_task_needs(tmp_path, monkeypatch):
    examples = [example for example in read_examples() if example["name"] == "in-front"]
    monkeypatch.setattr("sparse_context.embedded.demo.read_examples", lambda: examples)
    (row,) = run_demo(tmp_path / "demo")
    assert examples[0]["tasks"] == ["subject", "edit"]
    for way in ("sparse", "sparse kv"):
        kept = [reference["kept"] for reference in row[way]["selection"]["references"]]
        assert kept == [round(0.2 * 576), round(0.5 * 256)]
    assert row["dense"]["selection"]["kept"] == 576 + 256
    with Image.open(tmp_path / "demo" / "in-front.png") as file:
        sheet = np.asarray(file.convert("RGB"))
    shown = [sheet[:192, left : left + 192] for left in range(2 * 200, 6 * 200, 200)]  # truth, dense, sparse, KV
    made = {}
    for keep, adapter in ((1.0, "none"), ([0.2, 0.5], None)):
        config = SparseContextConfig(keep=keep, task=examples[0]["tasks"])
        model = load(ModelSpec(device="cpu", lora=adapter))
        image = Engine(pipe=model)(Request(examples[0]["prompt"], examples[0]["references"], config)).image
        made[adapter] = np.asarray(image.resize((192, 192), Image.Resampling.LANCZOS))
    assert np.array_equal(shown[1], made["none"]) and np.array_equal(shown[2], made[None])  # with its adapter


def test_the_demo_refuses_a_bad_keep_before_it_starts(tmp_path):
    with pytest.raises(ValueError, match="keep is 1.5"):
        run_demo(tmp_path / "demo", keep=1.5)
    assert not (tmp_path / "demo").exists()
