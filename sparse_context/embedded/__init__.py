"""The embedded model: its weights, the demo and the demo's scenes. `recipes/mini` trains it."""
