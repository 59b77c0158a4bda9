"""How to fine-tune."""

import math
import re
from dataclasses import dataclass, field

from ..config import SparseContextConfig
from .dropping import Dropping
from .schedules import SCHEDULES


@dataclass(frozen=True)
class TrainConfig:
    """How to fine-tune. Raises ValueError that names the field and its value.

    What is trained: a LoRA of `rank` and `lora_alpha` on `lora_layers` (module names or their endings; None: the host's
    own), or with `full` all weights of the transformer. `kv`: for pipelines that cache the references.

    The loss: `dropping` says which tokens batches keep; with `subsets` each batch is taken that many times, from one
    noise with other tokens; encoders and teacher run once for all. `caption_dropout` is the share of prompts emptied;
    `distillation` in [0, 1] is the share of the loss that compares with the dense prediction of the same weights
    without LoRA. With a `preservation` above 0, batches that keep all tokens compare with that alone, and count that
    many times: a target without noise holds what the model knew, and training on it anew would blur it. An output token
    inside a sample's `mask` counts 1 + `focus` times: as much as it did where the base was trained, or else the object
    loses what the background gains. One whose `source` is known and dropped, with no overview of it, counts `unseen`
    times as much as others, since it can only be guessed. Noise levels are logit-normal (Esser et al. 2024) or, with
    weighting_scheme "none", uniform, moved by `shift` (None: the scheduler's own).

    With a weight `teach` above 0, the heads of `teach_heads` learn where to look, by cross-entropy, in samples that say
    which reference token each output token shows: at that one if it is sharp, else at the overview token that covers
    it, else at no reference. A head is "block.head" of FLUX.2's single blocks, both counted from 0.

    The optimiser: AdamW, or where `muon_learning_rate` is given Muon at that rate on the matrices inside the
    transformer's blocks and AdamW on the rest; with `use_8bit_adam` AdamW is that of bitsandbytes, whose state takes a
    quarter of the memory; `lr_scheduler` is a name of `SCHEDULES`; `ema` is the decay of the
    weights' average, of which the result is made (0: of the last weights). A step is `gradient_accumulation_steps`
    batches, with all their subsets.

    `compile`: run the transformer's blocks compiled, which takes a minute or more first (compiled.py); not with
    `teach`. `fsdp`: several processes share the transformer's weights, and what is trained of them, instead of each
    holding all (FSDP2, sharding.py); not with `compile` or `use_8bit_adam`.
    """

    rank: int = 4
    lora_alpha: float = 4
    lora_layers: tuple[str, ...] | None = None
    full: bool = False
    kv: bool = False
    dropping: Dropping = field(default_factory=Dropping)
    subsets: int = 1
    caption_dropout: float = 0.0
    distillation: float = 0.0
    preservation: float = 0.0
    focus: float = 0.0
    unseen: float = 1.0
    teach: float = 0.0
    teach_heads: tuple[str, ...] = ()
    weighting_scheme: str = "logit_normal"
    shift: float | None = None
    max_train_steps: int = 1000
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-4
    muon_learning_rate: float | None = None
    use_8bit_adam: bool = False
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 100
    adam_weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema: float = 0.0
    gradient_checkpointing: bool = False
    compile: bool = False
    fsdp: bool = False
    seed: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    validation_steps: int = 0
    validation_keep: float = 0.2

    def __post_init__(self) -> None:
        for name in (
            "rank",
            "subsets",
            "max_train_steps",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
        ):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: pass a whole number, 1 or more.")
        if not self.seed < 2**63:
            raise ValueError(f"seed is {self.seed!r}: pass a whole number below 2**63.")
        for name in (
            "preservation",
            "focus",
            "teach",
            "lr_warmup_steps",
            "adam_weight_decay",
            "validation_steps",
            "seed",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}: pass a number of 0 or more.")
        for name in ("caption_dropout", "distillation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: pass a share from 0 to 1.")
        if not 0 < self.unseen <= 1:
            raise ValueError(f"unseen is {self.unseen!r}: pass a share above 0 and up to 1.")
        for name in ("learning_rate", "muon_learning_rate", "lora_alpha", "max_grad_norm", "shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value!r}: pass a number above 0.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema!r}: pass a decay from 0 up to, not including, 1.")
        if self.lr_scheduler not in SCHEDULES:
            raise ValueError(f"lr_scheduler is {self.lr_scheduler!r}: choose one of {', '.join(SCHEDULES)}.")
        if self.weighting_scheme not in ("logit_normal", "none"):
            raise ValueError(f"weighting_scheme is {self.weighting_scheme!r}: choose logit_normal or none.")
        for name in ("distillation", "preservation"):
            if self.full and getattr(self, name):
                raise ValueError(
                    f"{name} takes the weights without the LoRA as its teacher, and a full fine-tuning keeps no such "
                    "copy: leave one of the two out."
                )
        self._check_teaching()
        self._check_sharding()
        SparseContextConfig(keep=self.validation_keep)

    def _check_teaching(self) -> None:
        if bool(self.teach) != bool(self.teach_heads):
            raise ValueError(
                f"teach is {self.teach!r} and teach_heads {', '.join(self.teach_heads) or 'empty'}: pass a weight and "
                "heads, such as teach=0.1 and teach_heads=12.3, or leave both out."
            )
        for head in self.teach_heads:
            if not re.fullmatch(r"\d+\.\d+", head, re.ASCII):
                raise ValueError(f"teach_heads has {head!r}: write block and head, counted from 0, such as 12.3.")
        if self.compile and self.teach_heads:
            raise ValueError(
                "compile is True and teach_heads has entries, but compiled blocks do not show where their heads look: "
                "leave one of the two out."
            )

    def _check_sharding(self) -> None:
        whole = {
            "use_8bit_adam": "whose state in 8 bits cannot be parted",
            "compile": "which compiles blocks that hold all their weights",
        }
        for name, reason in whole.items():
            if self.fsdp and getattr(self, name):
                raise ValueError(f"fsdp is True and so is {name}, {reason}: leave one of the two out.")

    @property
    def heads(self) -> list[tuple[int, int]]:
        """`teach_heads` as (block, head)."""
        return [(int(block), int(head)) for block, head in (each.split(".") for each in self.teach_heads)]
