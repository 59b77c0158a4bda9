"""The command as its users meet it: what it says and writes, and that it writes nothing where something is wrong."""

import errno
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import CALL
from PIL import Image
from safetensors.torch import load_file, save_file
from test_lora import DOWN_UP, ORIGINAL, REFUSED, flat, make
from tiny import picture, tiny_transformer

from sparse_context.cli import main
from sparse_context.pipelines.embedded import ADAPTERS

COMMAND = [sys.executable, "-m", "sparse_context"]
EDGE = 384 // 8  # pixels of a token in a drawing of 8 x 8 tokens


# Inputs, made once ---------------------------------------------------------------------------------------------------


def colourful(seed=0):
    """64 x 64 pixels whose 8-pixel tokens each have a strong colour of their own."""
    generator = np.random.default_rng(seed)
    cells = generator.permuted(np.tile(np.array([20, 110, 240], np.uint8), (8, 8, 1)), axis=-1)
    return Image.fromarray(cells.repeat(8, 0).repeat(8, 1))


def png_header(width, height):
    """A PNG that says it is this large, and holds next to nothing."""
    chunks = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(100)))
    packed = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder of pictures, good and bad. Nothing may ever be written here."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, seed in (("a", 0), ("b", 1), ("c", 2), ("d", 3)):
        colourful(seed).save(folder / f"{name}.png")
    picture(96, 64).save(folder / "wide.png")
    data = (folder / "wide.png").read_bytes()
    (folder / "truncated.png").write_bytes(data[: len(data) // 2])
    (folder / "corrupt.png").write_bytes(data[:60] + bytes(255 - byte for byte in data[60:400]) + data[400:])
    (folder / "text.png").write_text("this is no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "a folder.png").mkdir()
    corner = np.zeros((64, 64), np.uint8)
    corner[32:, 32:] = 255
    Image.fromarray(corner).save(folder / "corner.png")
    Image.fromarray(corner[:, ::-1]).save(folder / "other corner.png")
    band = np.zeros((64, 96), np.uint8)
    band[:, :24] = 255
    Image.fromarray(band).save(folder / "band.png")
    return folder


@pytest.fixture(scope="session")
def models(tiny_model, tmp_path_factory):
    """Models that are no good, by what is wrong with them."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("models")

    def copy(name):
        return shutil.copytree(tiny_model, folder / name)

    (folder / "no index").mkdir()
    for name, index in (
        ("broken index", "{"),
        ("list index", "[]"),
        ("no class", "{}"),
        ("odd class", '{"_class_name": []}'),
    ):
        (folder / name).mkdir()
        (folder / name / "model_index.json").write_text(index)
    channels = {"block_out_channels": (8, 8), "norm_num_groups": 2, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    DDPMPipeline(UNet2DModel(sample_size=8, **channels, **blocks), DDPMScheduler()).save_pretrained(folder / "ddpm")
    index = json.loads((tiny_model / "model_index.json").read_text())
    (copy("inpaint") / "model_index.json").write_text(json.dumps(index | {"_class_name": "Flux2KleinInpaintPipeline"}))
    weights = "transformer/diffusion_pytorch_model.safetensors"
    (copy("no weights") / weights).unlink()
    truncated = copy("truncated weights") / weights
    truncated.write_bytes(truncated.read_bytes()[:-100])
    (copy("garbage weights") / weights).write_bytes(b"garbage" * 100)
    pickled = copy("pickled weights")
    torch.save(load_file(pickled / weights), pickled / "transformer" / "diffusion_pytorch_model.bin")
    (pickled / weights).unlink()
    partial = copy("partial weights") / weights
    kept = load_file(partial)
    del kept["norm_out.linear.weight"]
    save_file(kept, partial, metadata={"format": "pt"})
    (copy("no text weights") / "text_encoder" / "model.safetensors").unlink()
    (copy("no words") / "tokenizer" / "tokenizer.json").unlink()
    shutil.rmtree(copy("no vae") / "vae")
    (copy("broken settings") / "call.json").write_text("{")
    (copy("list settings") / "call.json").write_text("[1]")
    (copy("foreign settings") / "call.json").write_text(json.dumps(CALL | {"text_encoder_out_layers": [1, 9]}))
    return folder


@pytest.fixture(scope="session")
def loras(tmp_path_factory):
    """LoRAs by what they fit."""
    from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
    from peft import LoraConfig, get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("loras")

    def save(name, transformer):
        torch.manual_seed(1)
        transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_out.0"]))
        with torch.no_grad():
            for key, weight in transformer.named_parameters():
                if "lora_B" in key:
                    weight.normal_()
        layers = get_peft_model_state_dict(transformer)
        Flux2KleinPipeline.save_lora_weights(folder, transformer_lora_layers=layers, weight_name=name)

    save("fits.safetensors", tiny_transformer())
    settings = {**tiny_transformer().config, "num_attention_heads": 3}
    save("other width.safetensors", Flux2Transformer2DModel.from_config(settings))
    fitting = load_file(folder / "fits.safetensors")
    foreign = {key.replace("transformer_blocks", "layers"): weight for key, weight in fitting.items()}
    save_file(foreign, folder / "foreign.safetensors")
    save_file(fitting | {key: weight.clone() for key, weight in foreign.items()}, folder / "half foreign.safetensors")
    save_file({"head.weight": torch.ones(2, 2)}, folder / "no lora.safetensors")
    save_file({}, folder / "empty.safetensors")
    save_file({key: weight * torch.nan for key, weight in fitting.items()}, folder / "nan.safetensors")
    bare = {key.removeprefix("transformer."): weight for key, weight in fitting.items()}
    save_file(bare, folder / "no prefix.safetensors")
    block = "double_blocks.0.img_attn.proj"
    down, up = torch.ones(2, 32), torch.ones(32, 2)
    for name, first, second in (
        ("ai-toolkit", f"diffusion_model.{block}.lora_A.weight", f"diffusion_model.{block}.lora_B.weight"),
        ("peft", "base_model.model." + block + ".lora_A.weight", "base_model.model." + block + ".lora_B.weight"),
        ("kohya", *(f"lora_unet_{block.replace('.', '_')}.lora_{way}.weight" for way in ("down", "up"))),
    ):
        save_file({first: down, second: up}, folder / f"{name}.safetensors")
    torch.save(fitting, folder / "pickle.bin")
    torch.save(fitting, folder / "renamed pickle.safetensors")
    save_file(fitting, folder / "renamed.bin")
    return folder


# Running it ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(inputs, tiny_model, tmp_path, monkeypatch, capsys):
    """Run the command here, in an empty folder: exit code, stdout, stderr. {model} and {in} stand for their folders."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        filled = [str(a).replace("{model}", str(tiny_model)).replace("{in}", str(inputs)) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["sparse-context", *filled])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


@pytest.fixture
def generate(command):
    """Run `generate` with the tiny model, expecting success: its JSON report. Its picture is out.png."""

    def run(*arguments):
        code, out, err = command("generate", "-m", "{model}", "--prompt", "the cat", "--json", *arguments)
        assert code == 0, err
        return json.loads(out)

    return run


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def refused(command, inputs, tmp_path):
    """Run the command, expecting one sentence on stderr, exit code 2 and not a file more than before."""

    def run(*arguments):
        before = listing(tmp_path), listing(inputs)
        code, out, err = command(*arguments)
        assert code == 2
        assert out == ""
        assert err.startswith("sparse-context: ") and err.endswith("\n")
        assert err.count("\n") == 1 and "\r" not in err
        assert "Traceback" not in err
        assert (listing(tmp_path), listing(inputs)) == before
        return err.removeprefix("sparse-context: ").removesuffix("\n")

    return run


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# Bad input that needs no model: each is tried on `generate` and on `select` -------------------------------------------

PICTURES = {
    "missing.png": "does not exist",
    "truncated.png": "is damaged or cut short",
    "corrupt.png": "is damaged or cut short",
    "text.png": "is not a picture that can be read",
    "empty.png": "is empty",
    "bomb.png": "is too large (as its header says)",
    "a folder.png": "is a folder",
}
CHOICES = {
    "--keep 0": "keep is 0: pass a ratio above 0 and up to 1",
    "--keep 1.2": "keep is 1.2: pass a ratio",
    "--keep -1": "keep is -1: pass a ratio",
    "--keep -0.1": "keep is -0.1: pass a ratio",
    "--keep nan": "keep is nan: pass a ratio",
    "--keep inf": "keep is inf: pass a ratio",
    "--keep lots": "keep is 'lots': pass a ratio such as 0.2, a count such as 400, or auto.",
    "--keep 0.1 --keep 0.2 --keep 0.3": "--keep has 3 values for 1 references",
    "--selector nonsense": "There is no selector 'nonsense': choose one of random, uniform",
    "--selector edgs": "Did you mean 'edges'?",
    "--selector edges,saliency": "There is no selector 'edges,saliency'",
    "--selector edges=1,salience=1": "There is no selector 'salience'",
    "--selector edges=1,saliency": "write a blend as saliency=0.7,edges=0.3",
    "--selector edges=1,saliency=x": "write a blend as saliency=0.7,edges=0.3",
    "--selector edges=1,edges=2": "write a blend as saliency=0.7,edges=0.3",
    "--selector edges=1e308,detail=1e308": "The weights of the blend add up to inf: pass smaller ones",
    "--selector edges=-1": "The weight of 'edges' in the blend is -1.0: pass a number above 0",
    "--selector edges=nan": "The weight of 'edges' in the blend is nan",
    "--selector edges --selector uniform": "--selector has 2 values for 1 references",
    "--task paint": "task is 'paint': choose one of auto, edit, global, subject",
    "--coverage 2": "coverage is 2.0: pass a share from 0 to 1",
    "--coverage nan": "coverage is nan",
    "--merge 2": "merge is 2.0: pass the share of the budget for averages, from 0 to 1",
    "--share mine": "share is 'mine': choose 'joint' or 'equal'",
    "--floor -1": "floor is -1",
    "--mask {in}/band.png": "has 96x64 pixels but its picture has 64x64; resize the mask",
    "--mask {in}/corner.png --mask {in}/corner.png": "There are 2 masks for 1 references: pass one --mask for each.",
    "--mask {in}/missing.png": "does not exist",
    "--mask {in}/text.png": "is not a picture",
    "--mask {in}/corner.png --selector edges": "--mask was given, but --selector does not use it",
    "--mask {in}/corner.png --selector edges=1,uniform=1": "--mask was given, but --selector does not use it",
    "--output no/such/out.png": "does not exist; make it first",
    "--output .": "does not end in the name of a picture format",
    "--output out": "does not end in the name of a picture format",
    "--output out.gif": "end it in .png, .jpg, .jpeg, .webp",
    "--output {in}/text.png/out.png": "does not exist",
    "--nonsense": "No such option: --nonsense",
    "--keep": "requires an argument",
    "--floor many": "Invalid value for '--floor': ",
}


@pytest.mark.parametrize("face", ["generate", "select"])
@pytest.mark.parametrize(("name", "says"), PICTURES.items())
def test_a_bad_picture(refused, face, name, says):
    given = [f"{{in}}/{name}"] if face == "select" else ["--image", f"{{in}}/{name}", "--prompt", "x", "-m", "{model}"]
    message = refused(face, *given)
    assert says in message and name in message


@pytest.mark.parametrize("face", ["generate", "select"])
@pytest.mark.parametrize(("options", "says"), CHOICES.items())
def test_a_bad_choice(refused, face, options, says):
    given = ["{in}/a.png"] if face == "select" else ["--image", "{in}/a.png", "--prompt", "x", "-m", "{model}"]
    assert says in refused(face, *given, *options.split(" "))


@pytest.mark.parametrize(
    ("arguments", "says"),
    {
        "nonsense": "No such command 'nonsense'",
        "--nonsense": "No such option: --nonsense",
        "select": "Missing argument",
        "select {in}/a.png --token 0": "token is 0: pass its pixels a side, from 1 to 256.",
        "select {in}/a.png --token 200": "less than one token of 200 pixels",
        "select {in}/a.png {in}/b.png --keep 2 --floor 0 --selector mask": "neither a mask nor an alpha channel",
        "select {in}/a.png {in}/b.png {in}/c.png --keep 2": "makes 2 tokens for 3 references",
        "generate --image {in}/a.png": "Missing option '--prompt'",
        "generate --prompt": "requires an argument",
        "generate --prompt x --show-tokens t.png": "--show-tokens draws on the references, but there are none",
        "generate --prompt x --mask {in}/corner.png": "There are 1 masks for 0 references",
        "generate --prompt x --output a.png --compare a.png": "name the same file",
        "generate --prompt x --image {in}/a.png --output a.png --show-tokens ./a.png": "name the same file",
        "generate --prompt x --image {in}/a.png --output {in}/a.png": "a.png is read too, and would be written over",
        "generate --prompt x --image {in}/a.png --mask {in}/corner.png --compare {in}/corner.png": "is read too, and",
        "select {in}/a.png {in}/b.png --output {in}/b.png": "b.png is read too",
        "generate --prompt x --show-tokens no/t.png": "the folder",
        "generate --prompt x --compare c.bmp": "end it in .png",
    }.items(),
)
def test_bad_arguments(refused, arguments, says):
    assert says in refused(*arguments.split(" "))


def test_outputs_that_differ_in_capitals_alone_are_one_where_the_system_says_so(refused, monkeypatch):
    monkeypatch.setattr("os.path.normcase", lambda path: str(path).lower())  # as on Windows
    assert "name the same file" in refused(*"generate --prompt x --output a.png --compare A.png".split(" "))


def test_a_folder_as_output(refused, tmp_path):
    (tmp_path / "out.png").mkdir()
    assert "is a folder; give the name of a picture file inside it" in refused(
        "select", "{in}/a.png", "--output", "out.png"
    )


# Bad input that the model is asked about ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    {
        "--seed -1": "seed is -1: pass a number from 0",
        "--seed 9223372036854775808": "seed is 9223372036854775808: pass a number from 0 to 9223372036854775807.",
        "--seed x": "Invalid value for '--seed': ",
        "--steps 0": "steps is 0: pass a number above 0.",
        "--steps 99999999999999999999": "steps is 99999999999999999999: pass 1000 at most.",
        "--width 20000": "width is 20000: pass 16384 at most.",
        "--steps -3": "steps is -3",
        "--steps two": "Invalid value for '--steps': ",
        "--height 0": "height is 0: pass a number above 0.",
        "--width -8": "width is -8",
        "--height 65": "height is 65: this model makes multiples of 8, such as 64.",
        "--width 3": "width is 3: this model makes multiples of 8, such as 8.",
        "--height 800000000 --width 800000000": "height is 800000000: pass 16384 at most.",
        "--guidance-scale nan": "guidance_scale is nan",
        "--guidance-scale 4": "guidance_scale is 4.0, but this distilled model takes none: leave it out.",
        "--dtype float8": "dtype is 'float8': choose auto, float16",
        "--cpu-offload disk": "cpu-offload is 'disk': choose model or group.",
        "--device cuda:99": "device is 'cuda:99', but this machine has",
        "--device xpu:99": "device is 'xpu:99', but this machine has",
        "--device meta": "device is 'meta', but this machine has 0 of that kind",
        "--device banana": "device is 'banana': pass cpu, cuda, cuda:1, mps or xpu.",
        "--device cuda:99999999999": "device is 'cuda:99999999999'",
        "--image {in}/b.png --image {in}/c.png --image {in}/d.png": "There are 4 references, and this model takes",
        "--selector mask": "found neither a mask nor an alpha channel",
    }.items(),
)
def test_a_bad_option_of_generate(refused, options, says):
    message = refused("generate", "-m", "{model}", "--image", "{in}/a.png", "--prompt", "x", *options.split(" "))
    assert says in message


@pytest.mark.parametrize(
    "options", ["--steps 0", "--width 20000", "--seed -1", "--guidance-scale nan", "--image {in}/a.png"]
)
def test_what_no_model_takes_is_refused_before_one_is_loaded(refused, options, monkeypatch):
    monkeypatch.setattr("sparse_context.pipelines.load.load_pipeline", None)
    assert refused("generate", *["--image", "{in}/a.png"] * 4, "--prompt", "x", *options.split(" "))


@pytest.mark.parametrize(
    ("name", "says"),
    {
        "nowhere": "does not exist: pass a folder in the diffusers layout or a hub id.",
        "no index": "holds no model_index.json: pass a model in the diffusers layout.",
        "broken index": "is no diffusers model index",
        "list index": "is no diffusers model index",
        "no class": "is no diffusers model index",
        "odd class": "is a []; the supported pipelines are Flux2Pipeline, Flux2KleinPipeline",
        "ddpm": "is a DDPMPipeline; the supported pipelines are Flux2Pipeline, Flux2KleinPipeline",
        "ddpm/model_index.json": "is a file, the index of a model: pass the folder that holds it.",
        "inpaint": "paints into its first picture: pass --inpaint",
        "no weights": "does not load: Error no file named diffusion_pytorch_model.safetensors",
        "truncated weights": "does not load: ",
        "garbage weights": "does not load: ",
        "pickled weights": "does not load: Error no file named diffusion_pytorch_model.safetensors",
        "partial weights": "is incomplete: weights of its transformer are missing.",
        "no text weights": "does not load: Error no file named model.safetensors",
        "no words": "is incomplete: its tokenizer has no words.",
        "no vae": "does not load: ",
        "broken settings": "holds no call settings: ",
        "list settings": "holds no call settings: ",
        "foreign settings": "Flux2KleinPipeline failed: ",
    }.items(),
)
def test_a_bad_model(refused, models, name, says):
    message = refused("generate", "-m", models / name, "--image", "{in}/a.png", "--prompt", "x")
    assert says in message and (name in message or "failed" in message or "inpaint" in name)


def test_a_model_that_cannot_be_fetched(refused):
    message = refused("generate", "-m", "nobody/nothing", "--prompt", "x")
    assert "The model nobody/nothing is no folder here, and the hub does not give it: it is out of reach" in message


@pytest.mark.parametrize(
    ("name", "says"),
    {
        "missing.safetensors": "is not there: pass a .safetensors file.",
        ".": "is a folder: pass a .safetensors file.",
        "nan.safetensors": "does not fit this model: some of its weights are no finite numbers.",
        "pickle.bin": "is no safetensors file, and nothing else is read, for safety: its name ends in .bin.",
        "renamed.bin": "is no safetensors file, and nothing else is read",
        "renamed pickle.safetensors": "is no safetensors file, and nothing else is read",
        "other width.safetensors": "does not fit this model: ",
        "foreign.safetensors": "does not fit this model: Flux2Transformer2DModel has no ",
        "half foreign.safetensors": "does not fit this model: Flux2Transformer2DModel has no ",
        "no lora.safetensors": "does not fit this model: ",
        "empty.safetensors": "does not fit this model: it is empty.",
    }.items(),
)
def test_a_bad_lora(refused, loras, name, says):
    message = refused("generate", "-m", "{model}", "--image", "{in}/a.png", "--prompt", "x", "--lora", loras / name)
    assert says in message and name in message


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_lost_or_is_broken_is_one_sentence(kind, refused, tmp_path):
    tensors, says = REFUSED[kind]
    file = tmp_path / f"{kind}.safetensors"
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)
    message = refused("generate", "-m", "{model}", "--image", "{in}/a.png", "--prompt", "x", "--lora", file)
    assert says in message and str(file) in message and "does not fit this model" in message
    assert len(message) < 600 and "\n" not in message.strip()


def test_a_model_that_is_no_folder_is_told_what_it_is(refused, tiny_model, tmp_path):
    (tmp_path / "single.safetensors").write_bytes(b"x")
    (tmp_path / "model.gguf").write_bytes(b"x")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "nobody").mkdir()
    (tmp_path / "nobody" / "file").write_bytes(b"x")  # which looks like an id of the hub
    for name, says in {
        "single.safetensors": "is a file, and a pipeline is many: pass a folder in the diffusers layout or a hub id.",
        "model.gguf": "is a file, and a pipeline is many",
        "nobody/file": "is a file, and a pipeline is many",
        tiny_model / "model_index.json": "is a file, the index of a model: pass the folder that holds it.",
        "gone": "is a link to nothing: pass a folder",
        "/dev/null": "is neither a folder nor a file: pass a folder",
        "./nowhere/at/all": "does not exist: pass a folder in the diffusers layout or a hub id.",
    }.items():
        message = refused("generate", "-m", name, "--image", "{in}/a.png", "--prompt", "x")
        assert f"The model {name} {says}" in message


# Writing -------------------------------------------------------------------------------------------------------------

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


# Odd input that works ------------------------------------------------------------------------------------------------


def odd_pictures(folder):
    rgb = picture(96, 64)
    grey = np.linspace(0, 65535, 96 * 64).reshape(64, 96)
    alpha = np.zeros((64, 96), np.uint8)
    alpha[16:48, 24:72] = 255
    cut_out = rgb.copy()
    cut_out.putalpha(Image.fromarray(alpha))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    cut_out.save(folder / "rgba.png")
    Image.fromarray(grey.astype(np.uint16)).save(folder / "16 bit.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.quantize(16).save(folder / "palette.png")
    rgb.save(folder / "animated.gif", save_all=True, append_images=[picture(96, 64, 5)])
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.convert("1").save(folder / "one bit.png")
    picture(5, 5).save(folder / "tiny.png")
    picture(2000, 20).save(folder / "very wide.png")
    picture(20, 2000).save(folder / "very tall.png")
    rgb.save(folder / "Кот, 猫 und Käse 😀.png")
    return sorted(path for path in folder.iterdir())


def test_odd_pictures_are_selected_and_drawn(command, tmp_path):
    (tmp_path / "odd").mkdir()
    paths = odd_pictures(tmp_path / "odd")
    code, out, err = command("select", *paths, "--output", "tökens 猫.png", "--json", "--token", "8")
    assert (code, err) == (0, "")
    grids = {path.name: tuple(r["grid"]) for path, r in zip(paths, json.loads(out)["references"], strict=True)}
    assert grids.pop("turned.jpg") == (12, 8)
    assert grids.pop("tiny.png") == (8, 8)
    assert grids.pop("very wide.png") == (31, 250)
    assert grids.pop("very tall.png") == (250, 31)
    assert set(grids.values()) == {(8, 12)}
    assert len(pixels("tökens 猫.png")) > 384


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


# What it does --------------------------------------------------------------------------------------------------------


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


def coloured_cells(path, references=1):
    """Which of the 8 x 8 tokens of each reference are drawn in their own colours."""
    drawn = pixels(path)[:384].astype(int)
    assert drawn.shape[1] == 384 * references + 8 * (references - 1)
    cells = []
    for left in range(0, drawn.shape[1], 392):
        centres = drawn[EDGE // 2 :: EDGE, left + EDGE // 2 : left + 384 : EDGE]
        cells.append(np.flatnonzero(np.ptp(centres, -1) > 60))
    return cells


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
        {"grid": [8, 12], "kept": 24, "total": 96, "selector": "mask", "coverage": 0.0, "averages": 0}
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


@pytest.mark.parametrize(
    "options, says",
    [
        (["--lora", "none", "--lora-scale", "0.5"], "lora-scale is 0.5, but there is no LoRA: name one with --lora"),
        (
            ["--lora", "{loras}/fits.safetensors", "--lora-scale", "-1"],
            "lora-scale is -1.0: pass a number of 0 or more",
        ),
        (
            ["--lora", "{loras}/fits.safetensors", "--lora-scale", "nan"],
            "lora-scale is nan: pass a number of 0 or more",
        ),
    ],
)
def test_a_scale_without_a_lora_or_out_of_range_is_refused(refused, loras, options, says):
    options = [option.format(loras=loras) for option in options]
    assert says in refused("generate", "-m", "{model}", "--image", "{in}/a.png", "--prompt", "x", *options)


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


def test_select_draws_what_it_tells(command):
    code, out, err = command("select", "{in}/a.png", "--token", "8", "--selector", "detail=1,uniform=1", "--keep", "13")
    assert (code, err) == (0, "")
    assert out.startswith("reference 1: 13 of 64 tokens (20 %) by 0.5 detail + 0.5 uniform\n")
    assert out.endswith("\nwrote tokens.png\n")
    assert [len(cells) for cells in coloured_cells("tokens.png")] == [13]


# What evaluate and train read of a data set ---------------------------------------------------------------------------


@pytest.fixture
def table(inputs, tmp_path):
    """A folder of the datasets library with columns of other names; two of its three splits hold the same row."""
    datasets = pytest.importorskip("datasets")
    features = {
        "source": datasets.List(datasets.Image()),
        "target": datasets.Image(),
        "instruction": datasets.Value("string"),
        "recaption": datasets.Value("string"),
    }
    for split, reference, target, prompt in (
        ("train", "a.png", "b.png", "the cat"),
        ("validation", "c.png", "d.png", "the dog"),
        ("test", "c.png", "d.png", "the dog"),
    ):
        row = {"source": [str(inputs / reference)], "target": str(inputs / target), "instruction": prompt}
        row["recaption"] = f"{prompt}, again"
        made = datasets.Dataset.from_list([row], datasets.Features(features))
        made.to_parquet(tmp_path / "table" / f"{split}.parquet")
    return tmp_path / "table"


NAMED = ["--image-column", "target", "--cond-image-column", "source", "--caption-column", "instruction"]


def sentence(err):
    """The one sentence of the command on stderr, where the datasets library has its bars too."""
    (said,) = [line for line in err.splitlines() if line.startswith("sparse-context: ")]
    assert "Traceback" not in err
    return said.removeprefix("sparse-context: ")


def test_evaluate_reads_the_split_and_the_columns_that_are_named(command, table, inputs, tmp_path):
    def measured(data, output, *options):
        code, _, err = command(
            "evaluate",
            "--manifest",
            data,
            "-m",
            "{model}",
            "--dtype",
            "float32",
            "--device",
            "cpu",
            "--metric",
            "psnr",
            "--keep",
            "0.5",
            "--selector",
            "random",
            "--output",
            output,
            *options,
        )
        assert code == 0, err
        record = json.loads((tmp_path / output / "result.json").read_text())
        figures = [cell["scores"] for cell in record["figures"]["all"].values()]
        return figures, [record["config"][key] for key in ("data_split", "data_config")]

    for name, reference, image, prompt in (
        ("first", "a.png", "b.png", "the cat"),
        ("other", "c.png", "d.png", "the dog"),
        ("again", "a.png", "b.png", "the cat, again"),
    ):
        row = {"references": [str(inputs / reference)], "image": str(inputs / image), "prompt": prompt}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    # a split does not matter to a manifest, and it is not in the record
    first, read = measured("first.jsonl", "1", "--split", "nonsense")
    other, again = (measured(f"{name}.jsonl", name)[0] for name in ("other", "again"))
    assert read == [None, None] and first != other and first != again
    assert measured("table", "2", *NAMED) == (first, ["train", "default"])
    assert measured("table", "3", *NAMED, "--split", "test") == (other, ["test", "default"])
    assert measured("table", "4", *NAMED, "--caption-column", "recaption") == (again, ["train", "default"])


def test_figures_of_another_split_are_not_gone_on_with(command, table, tmp_path):
    arguments = [
        "evaluate",
        "--manifest",
        "table",
        *NAMED,
        "-m",
        "{model}",
        "--device",
        "cpu",
        "--metric",
        "psnr",
        "--keep",
        "0.5",
        "--output",
        "out",
    ]
    assert command(*arguments, "--split", "test")[0] == 0
    files = {path: path.read_bytes() for path in (tmp_path / "out" / "cells").iterdir()}
    assert command(*arguments, "--split", "test")[0] == 0
    for split in ("validation", "train"):  # the first has the same samples
        code, _, err = command(*arguments, "--split", split)
        assert code == 2 and sentence(err).endswith(
            f"dense.json is of data_split 'test' and not '{split}': give another folder, or remove it."
        )
    assert {path: path.read_bytes() for path in (tmp_path / "out" / "cells").iterdir()} == files


@pytest.mark.parametrize("face", ["evaluate", "train"])
@pytest.mark.parametrize(
    ("options", "says"),
    {
        "--split tset": """The data set table does not load: Unknown split "tset". Should be one of ['train', """,
        "--dataset-config-name en": "does not load: BuilderConfig 'en' not found. Available: ['default'].",
        "--caption-column text": "has no column 'text' for the field 'prompt': its columns are source, target, instr",
        "--cond-image-column text": "has no column 'text' for the field 'references': its columns are source, target",
        "--image-column text": "has no column 'text' for the field 'image': its columns are source, target, instruct",
    }.items(),
)
def test_a_part_that_a_data_set_lacks(command, table, tmp_path, face, options, says):
    given = ["evaluate", "--manifest"] if face == "evaluate" else ["train", "--data"]
    output = "--output" if face == "evaluate" else "--output-dir"
    code, out, err = command(*given, "table", *NAMED, "-m", "{model}", output, "out", *options.split(" "))
    assert (code, out) == (2, "")
    assert says in sentence(err)
    assert not (tmp_path / "out").exists()


def test_validation_has_a_split_of_its_own(command, table, inputs, tmp_path, monkeypatch):
    def drawn(*options):
        """What ends the command: the prompt of the first sample that it opens for validation, or what is wrong."""
        code, out, err = command("train", "-m", "{model}", "--data", "table", *NAMED, "--output-dir", "out", *options)
        assert (code, out) == (2, "")
        assert not (tmp_path / "out").exists()
        return sentence(err)

    def stop(sample, *sides):
        raise ValueError(sample.prompt)

    monkeypatch.setattr("sparse_context.training.launch.open_example", stop)
    validated = ["--validation-data", "table"]
    assert drawn(*validated) == "the cat"
    assert drawn(*validated, "--validation-split", "test") == "the dog"
    assert drawn(*validated, "--split", "test") == "the dog"
    assert drawn(*validated, "--split", "test", "--validation-split", "train") == "the cat"
    row = {"source": [str(inputs / "a.png")], "target": str(inputs / "b.png"), "instruction": "the room"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert drawn("--validation-data", "rows.jsonl", "--validation-split", "tset") == "the room"
    assert "Unknown split \"tset\". Should be one of ['train', " in drawn(*validated, "--validation-split", "tset")
    assert drawn("--validation-split", "test") == (
        "validation_split is 'test', but there is no data for it: name it with --validation-data, which may be the "
        "same as --data."
    )


# The real command, in a process of its own ---------------------------------------------------------------------------


@pytest.mark.slow
def test_help_and_a_call_without_arguments(tmp_path):
    for arguments in (["--help"], []):
        done = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert all(name in done.stdout for name in ("generate", "select", "demo"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selector", "without"),
    [("contrast=1,edges=1,mask=1", "torch diffusers transformers"), ("saliency=1,mask=1", "diffusers transformers")],
)
def test_select_loads_torch_only_for_the_net(selector, without, inputs, tmp_path):
    code = f"""
import sys
from sparse_context.cli import main
from sparse_context.embedded import ADAPTERS
try:
    main()
except SystemExit as end:
    assert end.code == 0
assert not set({without.split()}) & set(sys.modules)
"""
    arguments = ["select", inputs / "wide.png", "--mask", inputs / "band.png", "--selector", selector]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert listing(tmp_path) == ["tokens.png"]


@pytest.mark.slow
def test_the_real_command_makes_a_picture_and_valid_json(tiny_model, inputs, tmp_path):
    arguments = ["generate", "-m", tiny_model, "--image", inputs / "a.png", "--prompt", "кот 😀", "--json"]
    done = subprocess.run(
        [*COMMAND, *arguments, "--output", "o 猫.png"], cwd=tmp_path, capture_output=True, timeout=120
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["output"] == "o 猫.png"
    bars = done.stderr.decode().replace("\r", "\n").split("\n")
    assert all("it/s]" in line or "0/2" in line for line in bars if line)
    assert listing(tmp_path) == ["o 猫.png"]


@pytest.mark.slow
def test_the_real_command_refuses_in_one_sentence(models, inputs, tmp_path):
    for arguments in (
        ["generate", "-m", models / "partial weights", "--image", inputs / "a.png", "--prompt", "x"],
        ["select", inputs / "truncated.png"],
    ):
        done = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("sparse-context: ") and done.stderr.count("\n") == 1
        assert listing(tmp_path) == []


@pytest.mark.slow
def test_names_and_prompts_that_the_terminal_cannot_show(inputs, tmp_path):
    """A terminal of ASCII only, and on Linux a name that is no text at all: the picture is written and told."""
    names = ["猫.png", *([os.fsdecode(b"\xff\xfe.png")] if sys.platform == "linux" else [])]
    for name in names:
        shutil.copy(inputs / "a.png", tmp_path / name)
        done = subprocess.run(
            [*COMMAND, "select", name, "--output", "to " + name],
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\nwrote to \\" in done.stdout
    assert len(listing(tmp_path)) == 2 * len(names)


def test_a_prompt_that_is_no_text(refused):
    message = refused("generate", "-m", "{model}", "--prompt", "a\udcff", "--image", "{in}/a.png")
    assert message == "The prompt 'a\\udcff' has bytes that are no text: write it in UTF-8."


@pytest.mark.slow
def test_an_interrupted_run_ends_quietly(tiny_model, inputs, tmp_path):
    arguments = ["generate", "-m", tiny_model, "--image", inputs / "a.png", "--prompt", "x", "--steps", "1000"]
    piped: dict = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def as_from_a_terminal() -> None:  # what was started in the background ignores interrupts, and so do its children
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen([*COMMAND, *arguments], preexec_fn=as_from_a_terminal, **piped) as run:
        try:
            shown = b""  # steps have to be under way: an interrupt in an import may be swallowed there
            while not re.search(rb" [1-9]\d*/1000", shown):
                byte = run.stderr.read(1)
                assert byte, shown
                shown += byte
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=300)
        finally:
            run.kill()
    assert run.returncode == 130
    assert out == b"" and b"Traceback" not in err
    assert listing(tmp_path) == []


@pytest.mark.parametrize("kv", [False, True])
def test_the_command_takes_it_as_python_does(command, tiny_model, tmp_path, kv):
    """By kohya's names with alphas, at half its scale, in one picture."""
    from sparse_context.pipelines.engine import generate
    from sparse_context.pipelines.load import load_pipeline

    transformer = tiny_transformer()
    tensors, changes = make(transformer, ORIGINAL["klein"], flat("lora_unet_"), DOWN_UP, (1.0, 3.0))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    options = ["-m", "{model}", "--image", "{in}/a.png", "--prompt", "the cat", "--dtype", "float32"]
    options += ["--lora", tmp_path / "a.safetensors", "--lora-scale", 0.5, *(["--kv"] if kv else [])]
    code, _, err = command("generate", *options)
    assert code == 0, err
    pipe = load_pipeline(str(tiny_model), dtype="float32", device="cpu", kv=kv)
    with torch.no_grad():
        for name, change in changes.items():
            pipe.transformer.get_submodule(name).weight += 0.5 * change
    made = pixels("out.png").astype(int)
    direct = np.asarray(generate(pipe, [colourful(0)], "the cat").image).astype(int)
    assert np.abs(made - direct).max() <= 1
