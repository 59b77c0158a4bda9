"""FLUX.2: dev, klein, klein-KV and klein inpaint, as plain and as modular pipelines."""
