"""Qwen-Image-Edit, its inpainting, and Edit-Plus."""
