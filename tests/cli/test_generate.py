"""`sparse-context generate` as its users meet it: what it says and writes."""

import errno
import io
import json
import shutil

import numpy as np
import pytest
import torch
from call import CALL
from PIL import Image
from safetensors.torch import load_file, save_file
from test_lora import DOWN_UP, ORIGINAL, flat, make
from tiny import picture, tiny_transformer

from cli.shared import coloured_cells, colourful, listing, odd_pictures, pixels
from sparse_context.pipelines.embedded import ADAPTERS


def overview_by(factor, layout):
    """What a report says of the overview of a reference of 8 x 8 tokens."""
    side = 8 // factor
    return {"factor": factor, "layout": layout, "grid": [side, side], "kept": side * side, "psnr": None}


OUTPUTS = ["out.png", "tokens.jpg", "both.webp"]


@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("before", [None, b"an older file"])
def test_a_write_that_fails_leaves_no_half_file(command, tmp_path, monkeypatch, failing, before):
    save, calls = Image.Image.save, []

    def full_disk(image, file, **options):
        calls.append(file)
        if len(calls) <= failing:
            return save(image, file, **options)
        whole = io.BytesIO()
        save(image, whole, **options)
        file.write(whole.getvalue()[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    if before is not None:
        for name in OUTPUTS:
            (tmp_path / name).write_bytes(before)
    monkeypatch.setattr(Image.Image, "save", full_disk)
    code, out, err = command(
        "generate",
        "-m",
        "{model}",
        "--image",
        "{in}/a.png",
        "--prompt",
        "x",
        "--output",
        OUTPUTS[0],
        "--show-tokens",
        OUTPUTS[1],
        "--compare",
        OUTPUTS[2],
    )
    assert (code, out) == (2, "")
    expected = f"sparse-context: '{OUTPUTS[failing]}' could not be written (No space left on device); free some space"
    assert err.splitlines()[-1] == expected
    assert "Traceback" not in err
    for name in OUTPUTS[:failing]:
        assert pixels(tmp_path / name).any()
    if before is None:
        assert listing(tmp_path) == sorted(OUTPUTS[:failing])
    else:
        assert listing(tmp_path) == sorted(OUTPUTS)
        assert {(tmp_path / name).read_bytes() for name in OUTPUTS[failing:]} == {before}


def test_the_bar_of_the_steps_is_all_that_stderr_has(command):
    code, out, err = command("generate", "-m", "{model}", "--image", "{in}/a.png", "--prompt", "x", "--keep", "16")
    assert code == 0
    assert "2/2" in err and all(
        "it/s]" in line or "0/2" in line for line in err.replace("\r", "\n").split("\n") if line
    )
    lines = out.splitlines()
    assert lines[0] == "reference 1: 16 of 64 tokens (25 %) by 0.5 edges + 0.5 saliency, 10 % of them spread evenly"
    assert lines[1].startswith("total: 16 of 64 tokens (25 %), task auto, in ")
    assert lines[2].startswith("took ")
    assert all(f"{phase} " in lines[2] for phase in ("text", "encode", "selection", "denoise", "decode"))
    assert lines[3:] == ["wrote out.png"]


def test_odd_pictures_make_a_picture(command, tmp_path):
    (tmp_path / "odd").mkdir()
    paths = odd_pictures(tmp_path / "odd")
    for first in range(0, len(paths), 3):
        options = [o for path in paths[first : first + 3] for o in ("--image", path)]
        code, out, err = command(
            "generate",
            "-m",
            "{model}",
            "--prompt",
            "ein Kätzchen 猫 😀\n\t‮",
            *options,
            "--output",
            f"ün {first} 猫.png",
            "--show-tokens",
            f"t {first}.png",
            "--steps",
            "1",
        )
        assert code == 0, err
        assert pixels(f"ün {first} 猫.png").shape == (64, 64, 3)
        assert f"wrote ün {first} 猫.png, t {first}.png" in out


def test_no_references_and_no_prompt_to_speak_of(generate, command):
    report = generate()
    assert report["selection"] is None
    assert pixels("out.png").shape == (64, 64, 3)
    code, out, _ = command("generate", "-m", "{model}", "--prompt", "", "--image", "{in}/a.png", "--output", "b.jpeg")
    assert code == 0 and out.endswith("wrote b.jpeg\n")
    assert pixels("b.jpeg").shape == (64, 64, 3)


def test_the_size_of_the_output(generate):
    assert generate("--image", "{in}/a.png", "--height", "96", "--width", "72")["size"] == [72, 96]
    assert pixels("out.png").shape == (96, 72, 3)


def test_the_result_is_that_of_the_pipeline_itself(generate, tiny_model, inputs, tmp_path):
    from diffusers import Flux2KleinPipeline

    from sparse_context import apply_sparse_context, last_selection

    options = ["--image", "{in}/a.png", "--image", "{in}/b.png", "--seed", "5", "--dtype", "float32"]
    report = generate(*options, "--keep", "0.3", "--selector", "edges=0.6,uniform=0.4", "--compare", "both.png")

    pipe = Flux2KleinPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {key: value for key, value in CALL.items() if key not in ("reference_size", "max_references")}

    def direct():
        references = [colourful(0), colourful(1)]
        seeded = torch.Generator().manual_seed(5)
        return np.asarray(
            pipe(image=references, prompt="the cat", generator=seeded, guidance_scale=1.0, **call).images[0]
        )

    dense = direct()
    apply_sparse_context(pipe, keep=0.3, selector={"edges": 0.6, "uniform": 0.4})
    sparse = direct()
    assert not np.array_equal(dense, sparse)
    assert np.array_equal(pixels("out.png"), sparse)

    sheet = pixels("both.png")
    assert sheet.shape[1] == 64 + 8 + 64
    assert np.array_equal(sheet[:64, :64], dense)
    assert np.array_equal(sheet[:64, 72:], sparse)
    assert (sheet[64:] != 255).any()  # the times

    selection = last_selection(pipe).to_dict()
    told = report["selection"]
    assert {**told, "seconds": 0} == {**selection, "seconds": 0}
    assert report["dense"]["selection"]["kept"] == report["dense"]["selection"]["total"] == 128
    assert set(report["seconds"]) == {"text", "encode", "selection", "denoise", "decode", "total"}
    assert 0 < told["seconds"] == report["seconds"]["selection"] < report["seconds"]["total"]


def test_each_reference_with_all_tokens_is_all_tokens(command):
    for name, keep in (("one.png", ("1",)), ("each.png", ("1.0", "1"))):
        code, _, err = command(
            "generate",
            "--prompt",
            "the object of image 1",
            "--image",
            "{in}/a.png",
            "--image",
            "{in}/b.png",
            *(part for value in keep for part in ("--keep", value)),
            "--steps",
            1,
            "--output",
            name,
        )
        assert code == 0, err
    assert np.array_equal(pixels("one.png"), pixels("each.png"))


def test_with_all_tokens_the_embedded_model_runs_without_its_adapter(command):
    for keep in ("1", "0.2", "auto"):
        for name, lora in (("own", ()), ("none", ("--lora", "none"))):
            code, _, err = command(
                "generate",
                "--prompt",
                "the object of image 1",
                "--image",
                "{in}/a.png",
                "--keep",
                keep,
                "--steps",
                1,
                "--output",
                f"{name}-{keep}.png",
                "--compare",
                f"{name}-{keep}-both.png",
                "--task",
                "global",
                *lora,
            )
            assert code == 0, err
    assert ADAPTERS["plain"].is_file()
    assert np.array_equal(pixels("own-1.png"), pixels("none-1.png"))
    assert np.array_equal(pixels("own-auto.png"), pixels("none-1.png"))  # which keeps all of a global edit
    assert not np.array_equal(pixels("own-0.2.png"), pixels("none-0.2.png"))
    assert np.array_equal(pixels("own-0.2-both.png")[:128, :128], pixels("none-1.png"))
    assert np.array_equal(pixels("own-0.2-both.png")[:128, -128:], pixels("own-0.2.png"))


def test_a_part_of_the_embedded_models_own_adapter(command):
    options = ("--prompt", "the object of image 1", "--image", "{in}/a.png", "--steps", 1)
    for name, more in (
        ("whole", ()),
        ("half", ("--lora-scale", 0.5, "--compare", "both.png")),
        ("nothing", ("--lora-scale", 0)),
        ("none", ("--lora", "none")),
        ("dense", ("--lora-scale", 0.5, "--keep", 1)),
    ):
        code, _, err = command("generate", *options, *more, "--output", f"{name}.png")
        assert code == 0, err
    assert np.array_equal(pixels("nothing.png"), pixels("none.png"))
    assert not np.array_equal(pixels("half.png"), pixels("none.png"))
    assert not np.array_equal(pixels("half.png"), pixels("whole.png"))
    assert np.array_equal(pixels("both.png")[:128, :128], pixels("dense.png"))
    code, _, err = command("generate", *options, "--keep", 1, "--lora-scale", -1, "--output", "bad.png")
    assert code == 2 and "lora-scale is -1.0: pass a number of 0 or more" in err


def test_a_seed_makes_the_same_picture_again_and_another_another(generate):
    for seed, name in ((3, "a.png"), (3, "b.png"), (4, "c.png"), (0, "d.png")):
        generate("--image", "{in}/a.png", "--seed", seed, "--output", name)
    generate("--image", "{in}/a.png", "--output", "e.png")
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))
    assert np.array_equal(pixels("d.png"), pixels("e.png"))  # the default


def test_show_tokens_shows_the_kept_ones(generate, inputs):
    from sparse_context import SparseContextConfig
    from sparse_context.preview import select_pictures

    report = generate(
        "--image", "{in}/a.png", "--image", "{in}/b.png", "--selector", "random", "--show-tokens", "t.png"
    )
    shown = coloured_cells("t.png", references=2)
    assert sum(map(len, shown)) == report["selection"]["kept"] == 26
    assert [len(s) for s in shown] == [r["kept"] for r in report["selection"]["references"]]
    references = [colourful(0), colourful(1)]
    expected = select_pictures(references, SparseContextConfig(selector="random"), token=8).references
    for cells, reference in zip(shown, expected, strict=True):
        assert np.array_equal(cells, reference.index)


def test_each_reference_has_its_own_keep_and_selector(generate):
    report = generate(
        "--image",
        "{in}/a.png",
        "--image",
        "{in}/b.png",
        "--image",
        "{in}/c.png",
        "--keep",
        "0.5",
        "--keep",
        "7",
        "--keep",
        "1.0",
        "--selector",
        "uniform",
        "--selector",
        "auto",
        "--selector",
        "edges=2,random=2",
    )
    references = report["selection"]["references"]
    assert [r["kept"] for r in references] == [32, 7, 64]
    assert [r["selector"] for r in references] == ["uniform", "subject", "all"]


@pytest.mark.parametrize(
    ("options", "expected"),
    {
        "--keep 1": {"kept": [64, 64]},
        "--keep 11 --selector uniform": {"kept": [6, 5]},
        "--keep 20 --share joint --floor 9 --selector mask=1,random=1 --mask {in}/corner.png --mask {in}/nothing.png": {
            "kept": [11, 9]
        },
        "--keep auto --selector uniform": {"kept": [36, 36]},
        "--coverage 0.5": {"coverage": [0.5, 0.5], "selector": ["subject"] * 2},
        "--task edit": {"coverage": [0.1, 0.1], "selector": ["0.5 edges + 0.5 saliency"] * 2},
        "--keep 0.5 --selector uniform --merge 0.25": {"kept": [32, 32], "averages": [9, 9]},
        "--keep 0.5 --overview 2": {"kept": [32, 32], "overview": [overview_by(2, "reference")] * 2},
        "--overview none --overview 4 --overview-layout spread": {"overview": [None, overview_by(4, "spread")]},
        "--overview trained": {"overview": [None, None]},
        "--task edit --overview auto": {
            "selector": ["0.5 residual + 0.5 subject"] * 2,
            "overview": [overview_by(4, "reference")] * 2,
        },
        "--task subject --coverage 0": {"coverage": [0.0, 0.0], "selector": ["subject"] * 2},
        "--selector saliency=3,edges=1": {"coverage": [0.0, 0.0], "selector": ["0.75 saliency + 0.25 edges"] * 2},
    }.items(),
)
def test_options_reach_the_selection(command, inputs, tmp_path, options, expected):
    Image.new("L", (64, 64)).save(tmp_path / "nothing.png")
    options = options.replace("{in}/nothing.png", "nothing.png").split(" ")
    told = []
    for face in (
        ["select", "{in}/a.png", "{in}/b.png", "--token", "8"],
        ["generate", "-m", "{model}", "--prompt", "x", "--image", "{in}/a.png", "--image", "{in}/b.png"],
    ):
        code, out, err = command(*face, *options, "--json", "--output", "o.png")
        assert code == 0, err
        report = json.loads(out)
        told.append({**report.get("selection", report), "seconds": 0})
    assert told[0] == told[1]
    for key, values in expected.items():
        assert [r[key] for r in told[0]["references"]] == values


def test_a_larger_size_reaches_the_selection(command):
    """The tiny model's references are 64 pixels wide, whatever is asked for."""
    asked = ["--overview", "4", "--reference-max-pixels", "40000", "--output", "o.png"]
    code, out, err = command("generate", "-m", "{model}", "--prompt", "x", "--image", "{in}/a.png", *asked)
    assert code == 0, err
    assert "reference 1 has its usual size, because it is no larger PIL picture" in out + err


def test_kept_tokens_lie_within_the_masks(generate):
    both = ["--image", "{in}/a.png", "--image", "{in}/b.png"]
    masks = ["--mask", "{in}/corner.png", "--mask", "{in}/other corner.png"]
    for selector in ([], ["--selector", "mask"], ["--selector", "mask", "--selector", "mask=1"]):
        report = generate(*both, *masks, *selector, "--keep", "20", "--show-tokens", "t.png")
        first, second = coloured_cells("t.png", references=2)
        assert report["selection"]["kept"] == len(first) + len(second) == 20
        assert len(first) and set(first) <= {row * 8 + column for row in range(4, 8) for column in range(4, 8)}
        assert len(second) and set(second) <= {row * 8 + column for row in range(4, 8) for column in range(4)}


def test_a_mask_is_scaled_with_its_picture(generate):
    """wide.png has 96 x 64 pixels and the model is given 96 x 64; 2000 x 20 becomes 512 x 64, padded."""
    report = generate("--image", "{in}/wide.png", "--mask", "{in}/band.png", "--keep", "24")
    assert report["selection"]["references"] == [
        {"grid": [8, 12], "kept": 24, "total": 96, "selector": "mask", "coverage": 0.0, "averages": 0, "overview": None}
    ]
    picture(2000, 20).save("wide.png")
    half = Image.new("L", (2000, 20))
    half.paste(255, (1000, 0, 2000, 20))
    half.save("half.png")
    generate("--image", "wide.png", "--mask", "half.png", "--keep", "20", "--show-tokens", "t.png")
    drawn = pixels("t.png")[:384]
    assert drawn.shape == (384, 3072, 3)
    framed = (drawn == (226, 76, 60)).all(-1).any(0)
    assert not framed[:1530].any() and framed[1530:].any()


def test_a_lora_changes_the_picture_as_it_does_in_diffusers(generate, loras, tiny_model, inputs):
    from diffusers import Flux2KleinPipeline

    from sparse_context import apply_sparse_context

    generate("--image", "{in}/a.png", "--output", "plain.png", "--dtype", "float32")
    generate(
        "--image", "{in}/a.png", "--output", "lora.png", "--dtype", "float32", "--lora", loras / "fits.safetensors"
    )
    assert not np.array_equal(pixels("plain.png"), pixels("lora.png"))
    pipe = Flux2KleinPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(loras, weight_name="fits.safetensors", use_safetensors=True)
    apply_sparse_context(pipe)
    call = {key: value for key, value in CALL.items() if key not in ("reference_size", "max_references")}
    seeded = torch.Generator().manual_seed(0)
    direct = pipe(image=[colourful(0)], prompt="the cat", generator=seeded, guidance_scale=1.0, **call)
    assert np.array_equal(pixels("lora.png"), np.asarray(direct.images[0]))
    options = ["--image", "{in}/a.png", "--dtype", "float32", "--lora", loras / "fits.safetensors"]
    generate(*options, "--lora-scale", "0.5", "--output", "half.png")
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    direct = pipe(image=[colourful(0)], prompt="the cat", generator=seeded.manual_seed(0), guidance_scale=1.0, **call)
    assert np.array_equal(pixels("half.png"), np.asarray(direct.images[0]))
    assert not np.array_equal(pixels("half.png"), pixels("lora.png"))
    generate(*options, "--lora-scale", "0", "--output", "none.png")
    assert np.array_equal(pixels("none.png"), pixels("plain.png"))


def test_kv_is_the_kv_pipeline_on_the_same_weights(generate, loras, tiny_model):
    from diffusers import Flux2KleinKVPipeline

    from sparse_context import apply_sparse_context

    options = ["--image", "{in}/a.png", "--dtype", "float32", "--lora", loras / "fits.safetensors"]
    generate(*options, "--output", "plain.png")
    generate(*options, "--kv", "--output", "kv.png")
    pipe = Flux2KleinKVPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(loras, weight_name="fits.safetensors", use_safetensors=True)
    apply_sparse_context(pipe)
    call = {key: value for key, value in CALL.items() if key not in ("reference_size", "max_references")}
    direct = pipe(image=[colourful(0)], prompt="the cat", generator=torch.Generator().manual_seed(0), **call)
    assert np.array_equal(pixels("kv.png"), np.asarray(direct.images[0]))
    assert not np.array_equal(pixels("kv.png"), pixels("plain.png"))


def test_kv_is_for_klein_models_without_guidance_and_for_loras_of_that_mode(refused, loras, tiny_model, tmp_path):
    def says(model, *options):
        return refused("generate", "-m", model, "--image", "{in}/a.png", "--prompt", "x", *options)

    index = json.loads((tiny_model / "model_index.json").read_text())
    models = {name: tmp_path / name for name in ("other", "guided", "kv")}
    changes = ({"_class_name": "FluxKontextPipeline"}, {"is_distilled": False}, {"_class_name": "Flux2KleinKVPipeline"})
    for folder, change in zip(models.values(), changes, strict=True):
        shutil.copytree(tiny_model, folder)
        (folder / "model_index.json").write_text(json.dumps(index | change))
    other = says(models["other"], "--kv")
    assert f"kv is for Flux2KleinPipeline, and {models['other']} is a FluxKontextPipeline: leave it out." in other
    assert f"kv has no guidance, which {models['guided']} needs" in says(models["guided"], "--kv")

    weights = load_file(loras / "fits.safetensors")
    for_kv, for_plain = tmp_path / "for-kv.safetensors", tmp_path / "for-plain.safetensors"
    for file in (for_kv, for_plain):
        save_file(weights, file, metadata={"sparse_context": json.dumps({"kv": file == for_kv})})
    assert f"The LoRA {for_kv} was trained for KV mode: pass kv" in says("{model}", "--lora", for_kv)
    for model, options in (("{model}", ["--kv"]), (models["kv"], [])):
        told = says(model, *options, "--lora", for_plain)
        assert f"The LoRA {for_plain} was not trained for KV mode: leave kv out" in told


def test_a_kv_model_is_what_it_is_with_and_without_kv(generate, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "kv")
    index = json.loads((tiny_model / "model_index.json").read_text())
    (tmp_path / "kv" / "model_index.json").write_text(json.dumps(index | {"_class_name": "Flux2KleinKVPipeline"}))
    options = ["--image", "{in}/a.png", "--dtype", "float32"]
    generate(*options, "--kv", "--output", "twin.png")
    for name, more in (("same", []), ("named", ["--kv"]), ("offloaded", ["--kv", "--cpu-offload", "group"])):
        generate("-m", tmp_path / "kv", *options, *more, "--output", f"{name}.png")
        assert np.array_equal(pixels(f"{name}.png"), pixels("twin.png"))


def test_loras_of_other_tools(generate, loras):
    generate("--image", "{in}/a.png", "--output", "plain.png")
    for name in ("ai-toolkit", "peft", "kohya", "no prefix"):
        generate("--image", "{in}/a.png", "--lora", loras / f"{name}.safetensors")
        assert not np.array_equal(pixels("plain.png"), pixels("out.png"))


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloading_changes_nothing(generate, offload):
    options = ["--image", "{in}/a.png", "--device", "cpu", "--dtype", "float32"]
    generate(*options, "--output", "a.png")
    generate(*options, "--output", "b.png", "--cpu-offload", offload)
    # weights that were moved lie elsewhere in memory, where sums may run in another order: a last bit
    assert np.abs(pixels("a.png").astype(int) - pixels("b.png")).max() <= 1


@pytest.mark.parametrize("kv", [False, True])
def test_the_command_takes_it_as_python_does(command, tiny_model, tmp_path, kv):
    """By kohya's names with alphas, at half its scale, in one picture."""
    from sparse_context.pipelines.engine import Engine
    from sparse_context.pipelines.load import load
    from sparse_context.pipelines.spec import ModelSpec, Request

    transformer = tiny_transformer()
    tensors, changes = make(transformer, ORIGINAL["klein"], flat("lora_unet_"), DOWN_UP, (1.0, 3.0))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    options = ["-m", "{model}", "--image", "{in}/a.png", "--prompt", "the cat", "--dtype", "float32"]
    options += ["--lora", tmp_path / "a.safetensors", "--lora-scale", 0.5, *(["--kv"] if kv else [])]
    code, _, err = command("generate", *options)
    assert code == 0, err
    pipe = load(ModelSpec(str(tiny_model), dtype="float32", device="cpu", kv=kv))
    with torch.no_grad():
        for name, change in changes.items():
            pipe.transformer.get_submodule(name).weight += 0.5 * change
    made = pixels("out.png").astype(int)
    direct = np.asarray(Engine(pipe=pipe)(Request("the cat", [colourful(0)])).image).astype(int)
    assert np.abs(made - direct).max() <= 1


# Settings from a file -------------------------------------------------------------------------------------------------


def test_settings_of_a_file_hold_where_no_option_is_given(command, generate, tmp_path, tiny_model):
    settings = {"model": str(tiny_model), "keep": 16, "selector": "edges", "seed": 5, "steps": 1, "prompt": "the cat"}
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"multiple_of": 4}))
    both = ["--image", "{in}/a.png", "--settings", "settings.json"]
    code, out, err = command("generate", *both, "--json", "--output", "file.png")
    assert code == 0, err
    kept = json.loads(out)["selection"]
    assert (kept["kept"], kept["references"][0]["selector"]) == (16, "edges")
    options = ["--image", "{in}/a.png", "--keep", "16", "--selector", "edges", "--seed", "5", "--steps", "1"]
    generate(*options, "--output", "options.png")
    assert np.array_equal(pixels(tmp_path / "file.png"), pixels(tmp_path / "options.png"))
    # options go before: also one that says what is the default
    kept = generate(*both, "--keep", "8", "--selector", "auto", "--seed", "0", "--output", "over.png")["selection"]
    assert (kept["kept"], kept["references"][0]["selector"]) == (8, "0.5 edges + 0.5 saliency")
    generate("--image", "{in}/a.png", "--keep", "8", "--steps", "1", "--output", "plain.png")
    assert np.array_equal(pixels(tmp_path / "over.png"), pixels(tmp_path / "plain.png"))
