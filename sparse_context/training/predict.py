"""What a step of training takes before it is made: tokens, operations, and memory by part, from shapes alone.

The transformer is built on the meta device with its LoRA, and a forward and backward are run dry (`pipelines.dry`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from ..families import FAMILIES
from ..families.host import Host
from ..families.shape import Tokens
from ..pipelines.dry import DryRun
from ..pipelines.predict import ROOM, Parts, Predictor
from ..pipelines.quantization import SKIPPED
from ..selectors.cells import Grid
from .attention import LARGEST
from .config import TrainConfig
from .trainable import prepare

BITS = {"int8": (8, 0), "nf4": (4, 64)}
"""Of quantised weights: how many bits each has, and how many share a scale of float32 (0: a row, in the type of the
rest)."""


@dataclass(frozen=True)
class Plan:
    """What decides the memory of a run beside its config.

    quantization: of the transformer. encoders_first: whether the encoders are let go before it is loaded.
    validates: whether there are validation pictures, for which the VAE stays. mixed: the type of mixed precision, or
    None. device: the kind that it runs on. batch: samples.
    """

    quantization: str | None = None
    encoders_first: bool = False
    validates: bool = False
    mixed: torch.dtype | None = None
    device: str = "cuda"
    batch: int = 1


@dataclass(frozen=True)
class StepPrediction:
    """What a step takes, in bytes, and its operations.

    weights: the frozen ones and those of all parts that are loaded beside them, by part. trained: the LoRA in float32
    with its average (with `full`, the average alone, for the weights are float32 themselves). optimiser: what it
    remembers. activations: the most that a forward and backward hold beside all this, gradients included, or the
    encoders where they work in between. before: what the encoders take in the pass before the run. tokens, flops: of
    one batch with one set of tokens.
    """

    tokens: Tokens
    flops: int
    weights: Mapping[str, int]
    trained: int
    optimiser: int
    activations: int
    before: int = 0

    @property
    def peak(self) -> int:
        """The most bytes on the device at once."""
        return max(sum(self.weights.values()) + self.trained + self.optimiser + self.activations, self.before)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tokens": {"text": self.tokens.text, "output": self.tokens.output, "references": self.tokens.references},
            "flops": self.flops,
            "weights": dict(self.weights),
            "trained": self.trained,
            "optimiser": self.optimiser,
            "activations": self.activations,
            "before": self.before,
            "peak": self.peak,
        }


class StepPredictor:
    """Predicts steps of one run. parts: of the pipeline, on the meta device; they are this object's own afterwards."""

    def __init__(self, parts: Parts, class_name: str, config: TrainConfig, plan: Plan) -> None:
        """class_name: of the pipeline. Raises ValueError as `prepare` does, and for one that cannot be trained."""
        self.parts, self.config, self.plan = parts, config, plan
        transformer = parts.modules["transformer"]
        if plan.quantization is not None:
            _pack(transformer, plan.quantization)
        frozen = dict(parts.weights) | {"transformer": _bytes(transformer)}
        trained = prepare(host_of(class_name, transformer), config)
        transformer.to("meta")  # a LoRA is drawn on the CPU
        if config.full:
            frozen["transformer"] = _bytes(transformer)
        self.trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        assert len(self.trained) == sum(1 for _ in trained.parameters())
        count = sum(parameter.numel() for parameter in self.trained)
        self._held = 4 * count * ((not config.full) + bool(config.ema))
        self._optimiser = sum(_moments(parameter, config.use_8bit_adam) for parameter in self.trained)
        self._gradients = 4 * count
        beside = {name: size for name, size in frozen.items() if name != "transformer"}
        self._encoders, self._encoders_weigh = Predictor(parts), sum(beside.values())
        if plan.encoders_first:
            beside = {name: size for name, size in beside.items() if name == "vae" and plan.validates}
        self._weights = {"transformer": frozen["transformer"], **beside}

    def __call__(self, references: Sequence[Grid], keep: float | int, output: Grid) -> StepPrediction:
        """A step about references with these grids, of whose tokens a share or a count is kept. output: its grid."""
        total = sum(rows * columns for rows, columns in references)
        kept = keep if isinstance(keep, int) else max(len(references), round(keep * total))
        tokens = Tokens(self.parts.shape.text, output[0] * output[1], min(kept, total))
        held, flops = self._step(tokens)
        held = max(held, 2 * self._gradients)
        encoding, before = self._encoders.encoding([*references, output]), 0
        if self.plan.encoders_first:  # one picture at a time
            before = self._encoders_weigh + encoding
        else:
            held = max(held, self.plan.batch * encoding)
        return StepPrediction(tokens, flops, self._weights, self._held, self._optimiser, held, before)

    def _step(self, tokens: Tokens) -> tuple[int, int]:
        """Bytes and operations of a forward and backward of all samples of a batch."""
        parts, plan = self.parts, self.plan
        transformer, shape = parts.modules["transformer"], parts.shape
        mode = "extract" if parts.kv and tokens.references else None
        with self._like_the_run() as autocast:
            given = shape.kind.arguments(transformer, shape, tokens, mode)
            with DryRun() as run, autocast():
                if self.config.gradient_checkpointing:
                    transformer.enable_gradient_checkpointing(partial(_checkpoint, run, autocast))
                velocity = transformer(**given, return_dict=False)[0]
                loss = velocity.float().square().mean()
                del velocity
                torch.autograd.backward(loss)
        transformer.zero_grad(set_to_none=True)
        inputs = sum(value.nbytes for value in given.values() if isinstance(value, torch.Tensor))
        return plan.batch * (run.peak + inputs + self._scores(tokens)), plan.batch * run.flops

    def _scores(self, tokens: Tokens) -> int:
        """What attention by matrix products keeps, which takes the place of the fused one in bfloat16 on a CPU."""
        shape, config = self.parts.shape, self.config
        narrow = torch.bfloat16 in (self.plan.mixed, self.parts.modules["transformer"].dtype)
        if self.plan.device != "cpu" or not narrow or config.gradient_checkpointing or config.compile:
            return 0
        layer = 2 * shape.heads * tokens.total**2
        return layer * (shape.double_blocks + shape.single_blocks) if layer <= LARGEST else 0

    @contextlib.contextmanager
    def _like_the_run(self) -> Iterator[Callable[[], contextlib.AbstractContextManager[Any]]]:
        """Mixed precision as it is in the run; gives what makes its context."""
        from peft.helpers import disable_input_dtype_casting

        if self.plan.mixed is None:
            yield contextlib.nullcontext
            return
        with disable_input_dtype_casting(self.parts.modules["transformer"]):
            yield lambda: _Autocast(self.plan.device)


def _checkpoint(run: DryRun, autocast: Callable, module: nn.Module, *args: Any) -> Any:
    """What diffusers does for a block, with the modes of a dry run in its second forward as well."""

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        with run.attention(), autocast():
            yield

    return checkpoint(
        module.__call__, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again())
    )


def host_of(class_name: str, transformer: Any) -> Host:
    """The host of a transformer without its pipeline: enough to put a LoRA on it. Raises ValueError for a class of
    pipelines that cannot be trained."""
    family = FAMILIES[class_name]
    if family.host is None:
        raise ValueError(f"{class_name} cannot be trained here.")
    kind = getattr(import_module(f"..families.{family.folder}.train", __package__), family.host)
    host: Host = kind.__new__(kind)
    host.transformer = transformer
    return host


class _Autocast(TorchFunctionMode):
    """Autocast to bfloat16 as a device has it, for the meta device, which has none."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._wide = () if device == "cpu" else (functional.layer_norm, functional.rms_norm)

    def __torch_function__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (functional.linear, torch.matmul, functional.scaled_dot_product_attention):
            args, kwargs = _as(torch.bfloat16, (args, kwargs))
        elif function in self._wide:
            args, kwargs = _as(torch.float32, (args, kwargs))
        return function(*args, **kwargs)


def _as(dtype: torch.dtype, values: Any) -> Any:
    return tree_map(
        lambda value: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value, values
    )


class _Packed(nn.Linear):
    """A linear layer of quantised weights on the meta device."""

    def __init__(self, layer: nn.Linear, quantization: str) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=False)
            bits, block = BITS[quantization]
            count = layer.in_features * layer.out_features
            self.weight = nn.Parameter(torch.empty(count * bits // 8, dtype=torch.uint8), requires_grad=False)
            scales = torch.empty(-(-count // block)) if block else layer.weight.new_empty(layer.out_features)
            self.register_buffer("scales", scales)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Unpacked.apply(x, self)


class _Unpacked(torch.autograd.Function):
    """Unpacks the weight in the forward and again in the backward, as frozen.py and bitsandbytes do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: _Packed) -> torch.Tensor:
        ctx.size = layer.out_features, layer.in_features
        return functional.linear(x, x.new_empty(ctx.size), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ gradient.new_empty(ctx.size), None


def _pack(transformer: nn.Module, quantization: str) -> None:
    """Have the linear layers quantised that a load would quantise."""
    kept = set(SKIPPED) if quantization == "nf4" else set()
    for name, layer in list(transformer.named_modules()):
        if type(layer) is nn.Linear and not kept & set(name.split(".")):
            transformer.set_submodule(name, _Packed(layer, quantization))


def _moments(parameter: torch.Tensor, eight_bit: bool) -> int:
    """Bytes of the two moments that AdamW keeps of a parameter."""
    return parameter.numel() * (2 if eight_bit and parameter.numel() >= 4096 else 8)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


Change = tuple[str, Callable[[TrainConfig, Plan], tuple[TrainConfig, Plan]]]

CHANGES: Sequence[Change] = (
    ("gradient_checkpointing=true", lambda config, plan: (replace(config, gradient_checkpointing=True), plan)),
    ("cache_latents=true cache_text=true", lambda config, plan: (config, replace(plan, encoders_first=True))),
    ("use_8bit_adam=true", lambda config, plan: (replace(config, use_8bit_adam=True), plan)),
    ("quantization=int8", lambda config, plan: (config, replace(plan, quantization="int8"))),
    ("quantization=nf4", lambda config, plan: (config, replace(plan, quantization="nf4"))),
    ("train_batch_size=1", lambda config, plan: (config, replace(plan, batch=1))),
)
"""What makes a run smaller, in the order in which it is advised: what costs the least first."""


def fits(prediction: StepPrediction, memory: int) -> bool:
    """Whether a step stays within `memory` bytes of a device."""
    return prediction.peak <= memory * ROOM


def settings_that_fit(
    predict: Callable[[TrainConfig, Plan], StepPrediction],
    config: TrainConfig,
    plan: Plan,
    memory: int,
    encoders_can_come_first: bool = True,
) -> list[str] | None:
    """The names of `CHANGES` with which a run would fit, none of them in vain; None where all of them do not help.

    predict: of a config and a plan, the largest step. encoders_can_come_first: whether this pipeline can be built
    without its transformer. What does not go together with the config is not tried.
    """

    def with_changes(changes: Sequence[Change]) -> tuple[TrainConfig, Plan]:
        changed = config, plan
        for _, change in changes:
            changed = change(*changed)
        return changed

    def is_refused(changed: Plan) -> bool:
        quantised = changed.quantization != plan.quantization and (config.full or config.compile)
        return quantised or (changed.encoders_first and not encoders_can_come_first)

    tried: list[Change] = []
    for each in CHANGES:
        if config.fsdp and each[0].startswith(("use_8bit_adam", "quantization")):  # which do not go together
            continue
        changed = with_changes([*tried, each])
        if changed == with_changes(tried) or is_refused(changed[1]):
            continue
        tried.append(each)
        if fits(predict(*changed), memory):
            break
    else:
        return None
    for each in reversed(tried[:-1]):  # what costs the most is left out first
        fewer = [other for other in tried if other is not each]
        if fits(predict(*with_changes(fewer)), memory):
            tried = fewer
    return [name for name, _ in tried]
