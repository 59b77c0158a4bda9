"""What the tests of the command share: it runs in the tests' own process, in an empty folder, on a tiny model."""

import json
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from call import CALL
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import picture, tiny_transformer

from cli.shared import colourful, listing
from sparse_context.cli import main


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
