"""Quality against the tokens kept.

metrics.py compares two pictures, networks.py has the nets behind some metrics, evaluate.py runs a grid of settings over
samples, plots.py draws what came of it, and benchmarks.py names the benchmarks that are read: each has a file.
"""
