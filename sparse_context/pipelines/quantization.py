"""Transformers with quantised weights, as diffusers' own configs load them.

Only the transformer is quantised: it is by far the largest part of FLUX.2 and Qwen-Image-Edit, and the text encoder of
each is of a library of its own.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .spec import ModelSpec

SKIPPED = ["time_embedder", "timestep_embedder", "time_guidance_embed"]
"""Modules that bitsandbytes leaves alone: they ask for the dtype of their own weights, which would be an integer's."""


@dataclass(frozen=True)
class QuantizedTransformer:
    """The transformer's weights are quantised as they are loaded. config: diffusers' own."""

    config: Any

    def of_pipeline(self) -> Any:
        """The config as a whole pipeline takes it."""
        from diffusers import PipelineQuantizationConfig

        return PipelineQuantizationConfig(quant_mapping={"transformer": self.config})


@dataclass(frozen=True)
class GgufTransformer:
    """The transformer comes from a GGUF file; its shape from the model's own config."""

    file: Path

    def load(self, model: str, dtype: torch.dtype, local: bool, transformer: Any = None) -> Any:
        """The transformer of the folder or hub id `model`; its class is asked of the index where none is given.

        Raises ValueError for a class that diffusers does not read from one file.
        """
        import diffusers

        if transformer is None:
            index = diffusers.DiffusionPipeline.load_config(model, local_files_only=local)
            transformer = getattr(diffusers, index["transformer"][1])
        if not hasattr(transformer, "from_single_file"):
            raise ValueError(f"diffusers reads no {transformer.__name__} from a GGUF file")
        try:
            return transformer.from_single_file(
                str(self.file),
                quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
                config=model,
                subfolder="transformer",
                dtype=dtype,
                local_files_only=local,
            )
        except Exception as error:  # the reader raises many kinds, also for a file that is no GGUF
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.file} is no GGUF file of its transformer: {reason}") from error


@dataclass(frozen=True)
class Nf4OnCpu:
    """The transformer's linear layers become nf4 once it is loaded, for diffusers loads none where there is no GPU.

    dtype: what they compute in.
    """

    dtype: torch.dtype

    def place(self, transformer: Any) -> None:
        """Replace the layers, but for `SKIPPED` and those that the model keeps in float32."""
        from bitsandbytes.nn import Linear4bit, Params4bit

        kept = {*SKIPPED, *(getattr(transformer, "_keep_in_fp32_modules", None) or ())}
        for name, layer in list(transformer.named_modules()):
            if type(layer) is not torch.nn.Linear or kept & set(name.split(".")):
                continue
            with torch.device("meta"):
                placed = Linear4bit(
                    layer.in_features, layer.out_features, compute_dtype=self.dtype, compress_statistics=False
                )
            weight = Params4bit(layer.weight.data, quant_type="nf4", compress_statistics=False, module=placed)
            placed.weight, placed.bias = weight.to("cpu"), layer.bias
            # Else a forward in evaluation mode packs the weights for the CPU's own instructions, after which every
            # gradient through them is lost without an error
            placed.support_avx512bf16_for_cpu = False
            transformer.set_submodule(name, placed)
        transformer.requires_grad_(False)
        transformer.is_loaded_in_4bit = True  # by which peft knows such layers


Quantized = QuantizedTransformer | GgufTransformer | Nf4OnCpu


def find_quantization(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Quantized | None:
    """How the transformer of `spec` is quantised; None if it is not.

    Raises ValueError, before anything is loaded, where a package or a GPU that it needs is not there.
    """
    name = spec.quantization
    if name is None:
        return None
    if spec.gguf is not None:
        _check_installed(name, "gguf")
        return GgufTransformer(spec.gguf)
    if name == "int8":
        _check_installed(name, "torchao")
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return QuantizedTransformer(TorchAoConfig(Int8WeightOnlyConfig()))
    if device.type not in (("cuda", "xpu", "cpu") if name == "nf4" else ("cuda", "xpu")):
        raise ValueError(f"quantization is {name!r}, which needs a GPU, and the device is {device}: choose int8.")
    _check_installed(name, "bitsandbytes")
    if device.type == "cpu":
        return Nf4OnCpu(dtype)
    from diffusers import BitsAndBytesConfig

    if name == "nf4":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    else:
        settings = {"load_in_8bit": True}
    return QuantizedTransformer(BitsAndBytesConfig(**settings, llm_int8_skip_modules=SKIPPED))


def _check_installed(quantization: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"quantization is {quantization!r}, which needs {package}: pip install 'sparse-context[quantization]'."
        )
