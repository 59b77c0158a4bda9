"""The example workflows of the ComfyUI nodes: graphs in the API's format, and for the front end, with thumbnails.

    python runs/comfyui_workflows.py                                  # the API's, integrations/comfyui/api_workflows
    COMFYUI_DIR=/path/to/ComfyUI python runs/comfyui_workflows.py --front-end FOLDER
    COMFYUI_DIR=/path/to/ComfyUI python runs/comfyui_workflows.py --pictures FOLDER

The second one opens each graph in a real front end, which puts it into its own format. The third one runs one there by
hand, with tiny models, for the pictures of the page docs/guide/comfyui.md. Both need Chromium; FOLDER is for what the
server writes.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfyui_core import PACK, ROOT

API = PACK / "api_workflows"
UI = PACK / "example_workflows"


class Graph:
    """Nodes in the API's format. Each is at a column and, below one another, at a row."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}
        self.columns: dict[str, int] = {}

    def add(self, column: int, kind: str, title: str = "", **inputs: Any) -> list:
        """A node, as a link to its first output. A point in the name of an input is written as two underscores."""
        number = str(len(self.nodes) + 1)
        self.columns[number] = column
        self.nodes[number] = {
            "class_type": kind,
            "inputs": {name.replace("__", "."): value for name, value in inputs.items()},
            "_meta": {"title": title or kind},
        }
        return [number, 0]


def output(link: list, number: int) -> list:
    """Another output of the same node."""
    return [link[0], number]


def klein(size: str, references: int, kv: bool = False, mask: str = "") -> Graph:
    """FLUX.2 klein, distilled, with one or several references.

    mask: "painted" or "phrase", for one that says what to keep of each.
    """
    graph = Graph()
    mode = "-kv" if kv else ""
    encoder = {"4b": "qwen_3_4b.safetensors", "9b": "qwen_3_8b_fp8mixed.safetensors"}[size]
    model = graph.add(
        0, "UNETLoader", "Load Model", unet_name=f"flux-2-klein-{size}{mode}-fp8.safetensors", weight_dtype="default"
    )
    clip = graph.add(0, "CLIPLoader", "Load Text Encoder", clip_name=encoder, type="flux2", device="default")
    vae = graph.add(0, "VAELoader", "Load VAE", vae_name="flux2-vae.safetensors")
    text = {
        1: "Change the background to a sandy beach.",
        2: "The thing from image 1 in the scene of image 2.",
        4: "The things from all four images on one table.",
    }[references]
    prompt = graph.add(0, "CLIPTextEncode", "Prompt", text=text, clip=clip)
    pictures, masks = {}, {}
    for i in range(1, references + 1):
        loaded = graph.add(1, "LoadImage", f"Reference {i}", image="example.png")
        picture = loaded
        if mask != "painted":  # one that is painted is as large as the picture in its file
            picture = graph.add(
                1,
                "ImageScaleToTotalPixels",
                f"Scale Reference {i}",
                image=loaded,
                upscale_method="lanczos",
                megapixels=1.0,
                resolution_steps=16,
            )
        latent = graph.add(2, "VAEEncode", f"Encode Reference {i}", pixels=picture, vae=vae)
        prompt = graph.add(2, "ReferenceLatent", f"Add Reference {i}", conditioning=prompt, latent=latent)
        pictures[f"images__image{i}"] = picture
        if mask:
            marked = output(loaded, 1) if mask == "painted" else find(graph, picture)
            masks[f"masks__mask{i}"] = graph.add(2, "SparseContextMask", mask=marked, meaning="keep here", reference=i)
    sparse = graph.add(3, "SparseContext", **settings(), model=model, **pictures, **masks)
    cached = graph.add(3, "FluxKVCache", model=sparse) if kv else sparse
    size_of = graph.add(3, "GetImageSize", image=pictures["images__image1"])
    width, height = size_of, output(size_of, 1)
    guider = graph.add(4, "BasicGuider", model=cached, conditioning=prompt)
    noise = graph.add(4, "RandomNoise", noise_seed=1)
    sampler = graph.add(4, "KSamplerSelect", sampler_name="euler")
    sigmas = graph.add(4, "Flux2Scheduler", steps=4, width=width, height=height)
    empty = graph.add(4, "EmptyFlux2LatentImage", width=width, height=height, batch_size=1)
    made = graph.add(
        5, "SamplerCustomAdvanced", noise=noise, guider=guider, sampler=sampler, sigmas=sigmas, latent_image=empty
    )
    finish(graph, 5, sparse, made, vae)
    return graph


def find(graph: Graph, picture: list) -> list:
    """ComfyUI's own mask of what a phrase names."""
    detector = graph.add(0, "CheckpointLoaderSimple", "Load SAM 3", ckpt_name="sam3.1_multiplex_fp16.safetensors")
    phrase = graph.add(0, "CLIPTextEncode", "Phrase", text="the swords", clip=output(detector, 1))
    ways = {"threshold": 0.5, "refine_iterations": 2, "individual_masks": False}
    return graph.add(2, "SAM3_Detect", **ways, model=detector, image=picture, conditioning=phrase)


def kontext() -> Graph:
    """FLUX.1 Kontext, with one reference."""
    graph = Graph()
    model = graph.add(
        0, "UNETLoader", "Load Model", unet_name="flux1-dev-kontext_fp8_scaled.safetensors", weight_dtype="default"
    )
    clip = graph.add(
        0,
        "DualCLIPLoader",
        "Load Text Encoders",
        clip_name1="clip_l.safetensors",
        clip_name2="t5xxl_fp8_e4m3fn_scaled.safetensors",
        type="flux",
        device="default",
    )
    vae = graph.add(0, "VAELoader", "Load VAE", vae_name="ae.safetensors")
    prompt = graph.add(0, "CLIPTextEncode", "Prompt", text="Make it look like an oil painting.", clip=clip)
    loaded = graph.add(1, "LoadImage", "Reference 1", image="example.png")
    picture = graph.add(1, "FluxKontextImageScale", "Scale Reference 1", image=loaded)
    latent = graph.add(2, "VAEEncode", "Encode Reference 1", pixels=picture, vae=vae)
    referenced = graph.add(2, "ReferenceLatent", "Add Reference 1", conditioning=prompt, latent=latent)
    guided = graph.add(2, "FluxGuidance", conditioning=referenced, guidance=2.5)
    nothing = graph.add(2, "ConditioningZeroOut", "Negative Prompt", conditioning=prompt)
    sparse = graph.add(3, "SparseContext", **settings(), model=model, images__image1=picture)
    made = graph.add(
        4, "KSampler", **sampling(20, 1.0), model=sparse, positive=guided, negative=nothing, latent_image=latent
    )
    finish(graph, 5, sparse, made, vae)
    return graph


def qwen() -> Graph:
    """Qwen-Image-Edit 2511, with two references and a negative prompt."""
    graph = Graph()
    model = graph.add(
        0, "UNETLoader", "Load Model", unet_name="qwen_image_edit_2511_fp8mixed.safetensors", weight_dtype="default"
    )
    clip = graph.add(
        0,
        "CLIPLoader",
        "Load Text Encoder",
        clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors",
        type="qwen_image",
        device="default",
    )
    vae = graph.add(0, "VAELoader", "Load VAE", vae_name="qwen_image_vae.safetensors")
    pictures = []
    for i in (1, 2):
        loaded = graph.add(1, "LoadImage", f"Reference {i}", image="example.png")
        pictures.append(graph.add(1, "FluxKontextImageScale", f"Scale Reference {i}", image=loaded))
    images = dict(clip=clip, vae=vae, image1=pictures[0], image2=pictures[1])
    positive, negative = (
        graph.add(2, "TextEncodeQwenImageEditPlus", title, prompt=text, **images)
        for title, text in (("Prompt", "The thing from image 1 in the scene of image 2."), ("Negative Prompt", ""))
    )
    latent = graph.add(2, "VAEEncode", "Size of the Output", pixels=pictures[1], vae=vae)
    shifted = graph.add(3, "ModelSamplingAuraFlow", model=model, shift=3.1)
    sparse = graph.add(
        3, "SparseContext", **settings(), model=shifted, images__image1=pictures[0], images__image2=pictures[1]
    )
    made = graph.add(
        4, "KSampler", **sampling(40, 3.0), model=sparse, positive=positive, negative=negative, latent_image=latent
    )
    finish(graph, 5, sparse, made, vae)
    return graph


def settings() -> dict[str, Any]:
    """The node's defaults."""
    return {
        "keep": 0.2,
        "task": "auto",
        "selector": "auto",
        "phrases": "",
        "text_model": "",
        "keep_each": "",
        "coverage": "auto",
        "overview": "trained",
        "selection_seed": 0,
    }


def sampling(steps: int, cfg: float) -> dict[str, Any]:
    return {"seed": 1, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}


def finish(graph: Graph, column: int, sparse: list, made: list, vae: list) -> None:
    report = graph.add(column, "SparseContextReport", model=sparse, latent=made)
    decoded = graph.add(column + 1, "VAEDecode", samples=report, vae=vae)
    graph.add(column + 1, "SaveImage", images=decoded, filename_prefix="sparse-context")


def small(nodes: dict[str, Any], side: int = 128, steps: int = 2) -> dict[str, Any]:
    """The same graph with references of the server's own, small pictures and few steps, for tiny models on a CPU."""
    made = json.loads(json.dumps(nodes))
    references = 0
    for node in made.values():
        if node["class_type"] == "LoadImage":
            references += 1
            node["inputs"]["image"] = f"reference-{references}.png"
        if node["class_type"] in ("ImageScaleToTotalPixels", "FluxKontextImageScale"):
            size = {"upscale_method": "area", "width": side, "height": side, "crop": "disabled"}
            node["class_type"], node["inputs"] = "ImageScale", {"image": node["inputs"]["image"], **size}
        if node["class_type"] in ("TextEncodeQwenImageEditPlus", "SAM3_Detect"):
            node["class_type"] = f"Tiny{node['class_type']}"
        if "steps" in node["inputs"]:
            node["inputs"]["steps"] = steps
    return made


WORKFLOWS: dict[str, Callable[[], Graph]] = {
    "FLUX.2 klein 4B - one reference": lambda: klein("4b", 1),
    "FLUX.2 klein 4B - two references": lambda: klein("4b", 2),
    "FLUX.2 klein 4B - four references": lambda: klein("4b", 4),
    "FLUX.2 klein 4B - painted mask": lambda: klein("4b", 1, mask="painted"),
    "FLUX.2 klein 4B - mask from a phrase": lambda: klein("4b", 1, mask="phrase"),
    "FLUX.2 klein 9B - one reference": lambda: klein("9b", 1),
    "FLUX.2 klein 9B - two references": lambda: klein("9b", 2),
    "FLUX.2 klein 9B - four references": lambda: klein("9b", 4),
    "FLUX.2 klein 9B KV - two references": lambda: klein("9b", 2, kv=True),
    "FLUX.1 Kontext - one reference": kontext,
    "Qwen-Image-Edit 2511 - two references": qwen,
}
"""By title, which is the name of their files."""


def main() -> None:
    parser = argparse.ArgumentParser(description="The example workflows of the ComfyUI nodes.")
    parser.add_argument("--front-end", type=Path, metavar="FOLDER", help="make those of the front end as well")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="make the pictures of the page about them")
    arguments = parser.parse_args()
    API.mkdir(exist_ok=True)
    for title, build in WORKFLOWS.items():
        (API / f"{title}.json").write_text(json.dumps(build().nodes, indent=2) + "\n", encoding="utf-8")
    if arguments.front_end is not None:
        from comfyui_front_end import draw_workflows

        draw_workflows(arguments.front_end, {title: build() for title, build in WORKFLOWS.items()}, UI)
    if arguments.pictures is not None:
        from comfyui_front_end import draw_pages

        graph = klein("4b", 2)
        draw_pages(arguments.pictures, graph, small(graph.nodes, 256), ROOT / "docs" / "images")


if __name__ == "__main__":
    main()
