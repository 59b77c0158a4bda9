"""The one table of the README: seconds, memory and quality side by side, from results that other runs have written.

Seconds and memory are those of the shape of klein-9B with four references on a GPU (runs/bench_gpu.sh). Quality is that
of the embedded model's test split, with the package's LoRA for dropped tokens or for KV mode: runs/mini_curves.py, and
for the rows with KV runs/kv.py, which has the first of the same scenes.

    python runs/headline.py
"""

import argparse

from tables import SCORES, difference, draw, read, read_bench, score_of, table

ROWS = {
    "all tokens": ("dense", None),
    "KV cache": ("kv", None),
    "`keep=0.2`": ("sparse", 0.2),
    "`keep=0.1`": ("sparse", 0.1),
    "`keep=0.1` + KV": ("sparse_kv", 0.1),
}
"""What is shown -> the method and keep of the benchmark."""


def headline() -> str:
    timed = {
        (row.method, row.keep): row
        for row in read_bench("bench_gpu_klein-9b").rows
        if row.references == 4 and row.size == 1024
    }
    curves, kv = read("mini_curves_test")["figures"]["against_dense_base"], read("kv_test")["figures"]
    rows = []
    for name, (method, keep) in ROWS.items():
        row = timed[method, keep]
        speedup = f" ({row.speedup['total'].median:.1f}x)" if method != "dense" else ""
        seconds = f"{row.seconds['total'].median:.2f} s{speedup}"
        cells = [name, seconds, f"{row.memory['denoise'] / 2**30:.1f} GiB"]
        for group in ("subjects", "edits"):
            if method == "dense":
                cells.append(f"{score_of(curves[group], 'dense', SCORES[group])['mean']:.1f} dB")
                continue
            setting = f"KV, fine-tuned, {'all tokens' if keep is None else f'keep {keep:g}'}"
            found = (kv, setting) if method.endswith("kv") else (curves, f"auto-{keep:g}")
            cells.append(f"{difference(score_of(found[0][group], found[1], SCORES[group]), interval=False)} dB")
        rows.append(cells)
    return table(["", "time per image", "memory", "subjects", "edits"], rows)


TABLES = {"headline": headline}


def main() -> None:
    argparse.ArgumentParser(description="Draw the README's table.").parse_args()
    draw(TABLES)


if __name__ == "__main__":
    main()
