"""How far a picture may be from the one with all tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .metrics import METRICS, find_metrics
from .networks import find_spec


@dataclass(frozen=True)
class Tolerance:
    """How far a picture may be from that with all tokens: bounds of metrics (metrics.METRICS), each one to hold."""

    name: str
    bounds: Mapping[str, float]

    def holds(self, scores: Mapping[str, float | None]) -> bool:
        """Whether a picture with these scores to dense is within it."""
        for metric, bound in self.bounds.items():
            score = scores[f"{metric}_to_dense"]
            if score is None or (score > bound if METRICS[metric].better == "lower" else score < bound):
                return False
        return True

    def __str__(self) -> str:
        sides = {"higher": "at least", "lower": "at most"}
        bounds = [f"{name} {sides[METRICS[name].better]} {bound:g}" for name, bound in self.bounds.items()]
        return f"{self.name}: {', '.join(bounds)}, against all tokens"


TOLERANCES = {
    "same-picture": {"psnr": 30.0, "st_lpips": 0.05, "ssim": 0.95},
    "same-content": {"psnr": 20.0, "st_lpips": 0.15, "ssim": 0.75},
}
"""Same picture: side by side, one has to search for a difference. Same content: the same things in the same places,
with details that differ. `ssim` counts where `st_lpips` is not installed."""


def find_tolerance(text: str) -> Tolerance:
    """A tolerance by its name, or as bounds: "psnr=28,st_lpips=0.1". Raises ValueError for another text.

    Of a named one, the bounds hold whose metrics are installed: PSNR, and ST-LPIPS or else SSIM.
    """
    if text in TOLERANCES:
        perceptual = next((name for name in ("st_lpips", "ssim") if _is_installed(name)), None)
        bounds = TOLERANCES[text]
        return Tolerance(text, {name: bounds[name] for name in ("psnr", perceptual) if name is not None})
    from ..selectors.registry import read_weights

    try:
        bounds = read_weights("tolerance", text, "psnr=28,st_lpips=0.1")
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}, or choose {' or '.join(TOLERANCES)}.") from None
    find_metrics(list(bounds))
    for name, bound in bounds.items():
        if METRICS[name].against != "truth" or METRICS[name].model is not None:
            raise ValueError(f"tolerance is {text!r}: {name} compares no two pictures without a model of its own.")
        if not math.isfinite(bound):
            raise ValueError(f"tolerance is {text!r}: pass numbers.")
    return Tolerance(text, bounds)


def _is_installed(metric: str) -> bool:
    packages = {"st_lpips": METRICS["st_lpips"].packages, "ssim": ("torchmetrics",)}[metric]
    return all(find_spec(package) is not None for package in packages)
