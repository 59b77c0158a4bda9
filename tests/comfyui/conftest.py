"""The nodes as a package, `sparse_context_nodes`. None of its parts that are imported here needs ComfyUI."""

from comfyui_core import load_pack

load_pack()
