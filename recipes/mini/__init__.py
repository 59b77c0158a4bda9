"""How the embedded model is trained: `python -m recipes.mini --help`."""
