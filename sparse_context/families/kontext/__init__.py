"""FLUX.1 Kontext, its inpainting, and LongCat image edit."""
