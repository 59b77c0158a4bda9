"""Every kind of pipeline that the command drives, as a tiny model in a folder, from the prompt to the picture."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import middle, picture
from whole import WHOLE, save_whole

from sparse_context import SparseContextConfig
from sparse_context.cli import main
from sparse_context.evaluation.grid import maker
from sparse_context.families import FAMILIES
from sparse_context.pipelines.engine import Engine
from sparse_context.pipelines.load import load
from sparse_context.pipelines.spec import ModelSpec, Request
from sparse_context.samples import Sample

# FLUX.2 dev needs a text encoder of Mistral's with a processor of its own; klein and klein-KV are in cli/ and
# test_generation.py.
ELSEWHERE = {"Flux2Pipeline", "Flux2ModularPipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a tiny model, by its class; made when it is asked for."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = save_whole(name, tmp_path_factory.mktemp(name) / "tiny model")
        return made[name]

    return folder


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run the command in a folder with two references and a mask: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    picture(96, 64).save("a.png")
    picture(64, 64, 1).save("b.png")
    middle((96, 64)).save("part.png")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sparse-context", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    return run


def usual(name):
    """Options with as many references as the pipeline takes, up to two."""
    family = FAMILIES[name]
    images = ["--image", "a.png"] + ([] if family.most == 1 else ["--image", "b.png"])
    return images + (["--inpaint", "part.png"] if family.paints else [])


def test_every_family_is_driven_somewhere():
    assert set(WHOLE) | ELSEWHERE == set(FAMILIES)
    assert not set(WHOLE) & ELSEWHERE


@pytest.mark.parametrize("name", WHOLE)
def test_the_command_drives_it(command, folders, name):
    options = ["--prompt", "the cat", "--dtype", "float32", "--device", "cpu", "--keep", "0.3", "--json"]
    code, out, err = command(
        "generate", "-m", folders(name), *usual(name), *options, "--output", "o.png", "--show-tokens", "t.png"
    )
    assert code == 0, err
    report = json.loads(out)
    selection = report["selection"]
    assert len(selection["references"]) == usual(name).count("--image")
    assert selection["kept"] == round(0.3 * selection["total"]) > 0
    assert all(seconds > 0 for seconds in report["seconds"].values()), report["seconds"]
    with Image.open("o.png") as made, Image.open("t.png") as drawn:
        assert list(made.size) == report["size"] and drawn.height > 384


LIMITS = {
    "FluxKontextPipeline": (2, False, "There are 2 references, and FluxKontextPipeline takes at most 1: pass fewer."),
    "LongCatImageEditPipeline": (0, False, "There are 0 references, and LongCatImageEditPipeline needs at least 1"),
    "QwenImageEditPipeline": (2, False, "takes at most 1: pass fewer."),
    "QwenImageEditPlusPipeline": (0, False, "needs at least 1: pass more."),
    "Flux3ModularPipeline": (11, False, "There are 11 references, and Flux3ModularPipeline takes at most 10"),
    "Flux2KleinInpaintPipeline": (
        1,
        False,
        "paints into its first reference: pass inpaint, a mask that is white where to paint.",
    ),
    "Flux2KleinModularPipeline": (1, True, "Flux2KleinModularPipeline does not paint into an image: leave inpaint"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_told_before_any_weights_are_read(command, tmp_path, name):
    count, inpaint, says = LIMITS[name]
    model = tmp_path / "model"
    model.mkdir()
    index = "modular_model_index.json" if FAMILIES[name].modular else "model_index.json"
    (model / index).write_text(json.dumps({"_class_name": name}))
    options = ["--image", "a.png"] * count + (["--inpaint", "part.png"] if inpaint else [])
    code, out, err = command("generate", "-m", model, "--prompt", "x", *options)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("LongCatImageEditPipeline", ["--height", "64"], "takes the shape of its reference: leave it out."),
        ("LongCatImageEditPipeline", ["--lora", "lora.safetensors"], "LongCatImageEditPipeline loads no LoRA"),
        ("Flux3DistilledModularPipeline", ["--guidance-scale", "2"], "takes none: leave it out."),
        (
            "Flux3DistilledModularPipeline",
            ["--cpu-offload", "model"],
            "which a modular pipeline does not have",
        ),
        ("Flux2KleinInpaintPipeline", ["--inpaint", "b.png"], "has 64x64 pixels but its picture has 96x64"),
    ],
)
def test_what_a_pipeline_does_not_take_is_one_sentence(command, folders, name, options, says):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(1)}, "lora.safetensors")
    code, out, err = command("generate", "-m", folders(name), *usual(name), "--prompt", "x", *options)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1


def test_evaluation_tells_limits_before_any_weights_are_read(command, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    rows = [{"references": names, "prompt": "x"} for names in (["a.png"], ["a.png", "b.png"])]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = command("evaluate", "--data", "samples.jsonl", "-m", model, "--metric", "psnr")
    assert (code, out) == (2, "") and "line 2 has 2 references, and the model takes at most 1: list fewer." in err


@pytest.mark.parametrize(
    "name, size", [("LongCatImageEditPipeline", None), ("Flux3DistilledModularPipeline", (64, 96))]
)
def test_a_sample_with_a_picture_of_another_size_is_evaluated(folders, name, size):
    pipe = loaded(folders(name))
    file = io.BytesIO()
    picture(70, 100).save(file, "png")
    sample = Sample("x", "the cat", (file.getvalue(),), file.getvalue())
    made = maker(pipe, steps=1)(sample, SparseContextConfig(), 0).image
    plain = Engine(pipe=pipe)(Request("the cat", sample.open_references(), steps=1)).image
    assert made.size == (size or plain.size)


def loaded(folder):
    pipe = load(ModelSpec(str(folder), dtype="float32", device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_kontext_makes_the_size_that_was_asked_for(folders):
    pipe = loaded(folders("FluxKontextPipeline"))
    assert Engine(pipe=pipe)(Request("the cat", [picture(96, 64)], steps=1, height=128, width=192)).image.size == (
        192,
        128,
    )


def test_guidance_goes_to_the_guider_of_a_modular_pipeline_for_one_call(folders):
    pipe = loaded(folders("Flux2KleinBaseModularPipeline"))
    forwards = []
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(pipe.guider.guidance_scale))
    before = pipe.guider
    Engine(pipe=pipe)(Request("the cat", [picture(96, 64)], steps=1, guidance_scale=1.0))
    assert forwards == [1.0]
    Engine(pipe=pipe)(Request("the cat", [picture(96, 64)], steps=1, guidance_scale=3.0))
    assert forwards == [1.0, 3.0, 3.0]
    assert pipe.guider is before


def test_guidance_is_true_guidance_where_the_host_has_that(folders):
    pipe = loaded(folders("QwenImageEditPipeline"))
    forwards = []
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    Engine(pipe=pipe)(Request("the cat", [picture(96, 64)], steps=1, height=64, width=64, guidance_scale=1.0))
    assert len(forwards) == 1
    Engine(pipe=pipe)(Request("the cat", [picture(96, 64)], steps=1, height=64, width=64))
    assert len(forwards) == 3


def test_what_is_not_painted_over_stays(folders):
    """Where the mask is black, the source's own latents are blended back at the end."""
    pipe = loaded(folders("Flux2KleinInpaintPipeline"))
    source, nothing = picture(64, 64), Image.new("L", (64, 64))
    kept = [Engine(pipe=pipe)(Request("the cat", [source], seed=seed, inpaint=nothing)).image for seed in (0, 1)]
    assert np.array_equal(*kept)
    painted = [
        Engine(pipe=pipe)(Request("the cat", [source], seed=s, inpaint=Image.new("L", (64, 64), 255))).image
        for s in (0, 1)
    ]
    assert not np.array_equal(*painted)


def test_a_part_from_elsewhere_is_not_fetched(folders, tmp_path):
    source = folders("Flux3DistilledModularPipeline")
    index = json.loads((source / "modular_model_index.json").read_text())
    index["transformer"][2]["pretrained_model_name_or_path"] = "somebody/else"
    for entry in source.iterdir():
        if entry.name not in ("modular_model_index.json", "transformer"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="its transformer is not in it but in somebody/else: load it from Python"):
        load(ModelSpec(str(tmp_path)))


def test_a_folder_that_was_moved_loads(folders, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(folders("Flux3DistilledModularPipeline"))
    assert type(load(ModelSpec(str(moved), device="cpu"))).__name__ == "Flux3DistilledModularPipeline"


def test_group_offloading_of_a_modular_pipeline_changes_nothing(folders):
    folder = folders("Flux2KleinModularPipeline")
    plain = Engine(pipe=loaded(folder))(Request("the cat", [picture(96, 64)])).image
    offloaded = load(ModelSpec(str(folder), dtype="float32", device="cpu", cpu_offload="group"))
    assert np.array_equal(plain, Engine(pipe=offloaded)(Request("the cat", [picture(96, 64)])).image)


def test_a_negative_prompt_reaches_a_pipeline_with_guidance(folders):
    engine = Engine(ModelSpec(str(folders("LongCatImageEditPipeline")), dtype="float32", device="cpu"), bar=False)

    def made(**more):
        request = Request("make the cat blue", [picture(96, 64)], steps=1, guidance_scale=4.0, **more)
        return np.asarray(engine(request).image)

    assert not np.array_equal(made(negative_prompt="make the cat red 0123"), made())
    assert np.array_equal(made(negative_prompt=""), made())
