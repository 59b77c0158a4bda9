"""FLUX.3, base and step-distilled."""
