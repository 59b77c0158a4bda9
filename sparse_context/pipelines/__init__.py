"""Pipelines that answer requests: how one is found, loaded and called."""
