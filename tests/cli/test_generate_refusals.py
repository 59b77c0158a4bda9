"""`sparse-context generate`: models, LoRAs and options that it refuses in one sentence."""

import pytest
from safetensors.torch import save_file
from test_lora import REFUSED


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
        "--height 65": "height is 65: this model needs a multiple of 8, such as 64.",
        "--width 3": "width is 3: this model needs a multiple of 8, such as 8.",
        "--height 800000000 --width 800000000": "height is 800000000: pass 16384 at most.",
        "--guidance-scale nan": "--guidance-scale is nan",
        "--guidance-scale 4": "--guidance-scale is 4.0, but this distilled model takes none: leave it out.",
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
    monkeypatch.setattr("sparse_context.pipelines.engine.load", None)
    assert refused("generate", *["--image", "{in}/a.png"] * 4, "--prompt", "x", *options.split(" "))


@pytest.mark.parametrize(
    ("name", "says"),
    {
        "nowhere": "does not exist: pass a folder in the diffusers layout or a hub id.",
        "no index": "holds no model_index.json: pass a model in the diffusers layout.",
        "broken index": "is not a diffusers model index",
        "list index": "is not a diffusers model index",
        "no class": "is not a diffusers model index",
        "odd class": "is a []; the supported pipelines are Flux2Pipeline, Flux2KleinPipeline",
        "ddpm": "is a DDPMPipeline; the supported pipelines are Flux2Pipeline, Flux2KleinPipeline",
        "ddpm/model_index.json": "is a file, the index of a model: pass the folder that holds it.",
        "inpaint": "paints into its first reference: pass inpaint",
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
    assert (
        "The model nobody/nothing is not a local folder, and the hub does not provide it: it cannot be reached"
        in message
    )


@pytest.mark.parametrize(
    ("name", "says"),
    {
        "missing.safetensors": "is not there: pass a .safetensors file.",
        ".": "is a folder: pass a .safetensors file.",
        "nan.safetensors": "does not fit this model: some of its weights are no finite numbers.",
        "pickle.bin": "is not a safetensors file, and for safety nothing else is read: its name ends in .bin.",
        "renamed.bin": "is not a safetensors file, and for safety nothing else is read",
        "renamed pickle.safetensors": "is not a safetensors file, and for safety nothing else is read",
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
        "single.safetensors": "is a single file, not a pipeline: pass a folder in the diffusers layout or a hub id.",
        "model.gguf": "is a single file, not a pipeline",
        "nobody/file": "is a single file, not a pipeline",
        tiny_model / "model_index.json": "is a file, the index of a model: pass the folder that holds it.",
        "gone": "is a link to nothing: pass a folder",
        "/dev/null": "is neither a folder nor a file: pass a folder",
        "./nowhere/at/all": "does not exist: pass a folder in the diffusers layout or a hub id.",
    }.items():
        message = refused("generate", "-m", name, "--image", "{in}/a.png", "--prompt", "x")
        assert f"The model {name} {says}" in message


@pytest.mark.parametrize(
    "options, says",
    [
        (["--lora", "none", "--lora-scale", "0.5"], "lora-scale is 0.5, but there is no LoRA: name one as lora"),
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


def test_a_prompt_that_is_no_text(refused):
    message = refused("generate", "-m", "{model}", "--prompt", "a\udcff", "--image", "{in}/a.png")
    assert message == "The prompt 'a\\udcff' contains bytes that are not text: write it in UTF-8."
