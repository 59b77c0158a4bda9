"""Give the fields of results that were measured before their names were fixed the names that they have now.

    python runs/convert_results.py results/*.json

Some results cannot be measured again, such as those of a GPU that was lent. Only names of fields change; figures, and
names of settings such as "sparse, fine-tuned", stay as they are. A file that has the new names is left alone.
"""

import argparse
import re
from pathlib import Path

FIELDS = {
    # benchmarks
    "times faster": "speedup",
    "predicted": "flops_speedup",
    "of predicted": "share_of_flops",
    "of ceiling": "share_of_ceiling",
    "keep 1 to untouched": "patch_overhead",
    "memory above the weights": "memory_above_weights",
    "memory is reused": "memory_is_reused",
    "largest difference from one by one": "largest_difference",
    # evaluations
    "against dense": "against_dense",
    "over peers": "over_peers",
    "over random": "over_random",
    "to the dense base": "against_dense_base",
    "to sparse": "against_sparse",
    "won by fine-tuning": "gain_of_fine_tuning",
    "subjects by what was kept": "recognised_by_share_kept",
    "in part": "in_part",
    "all selectors": "all_selectors",
    # saliency
    "composite size": "composite_size",
    "composites of a held-out source": "held_out_composites",
    "saliency is better on": "saliency_is_better",
    "mean score without a subject": "mean_score_without_subject",
    "photographs with boxes, not chosen on": "photographs_not_chosen_on",
    "photographs with boxes, chosen on": "photographs_chosen_on",
    "each photograph": "each_photograph",
    "recall at 0.2": "recall_at_fifth",
    "objects kept whole": "objects_kept_whole",
    "ratio to edges": "ratio_to_edges",
}
"""The field's old name -> its new one, in any result."""

SCORES = re.compile(r"(?:psnr|recognised|taken for)\b[\w ,]*")
"""Names of scores of runs/base_quality.py, whose words are joined by underscores now."""


def convert(text: str, scores: bool) -> str:
    """The text of a JSON file with new names. scores: whether it is of runs/base_quality.py."""

    def renamed(match: re.Match) -> str:
        name = match[1]
        if scores and SCORES.fullmatch(name):
            name = re.sub(r"\W+", "_", name)
        return f'"{FIELDS.get(name, name)}":'

    return re.sub(r'"([^"\\]+)":', renamed, text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Give the fields of older results their present names.")
    parser.add_argument("results", type=Path, nargs="+")
    for path in parser.parse_args().results:
        text = path.read_text(encoding="utf-8")
        converted = convert(text, path.stem.startswith("base_quality"))
        if converted != text:
            path.write_text(converted, encoding="utf-8")
            print(f"converted {path}")


if __name__ == "__main__":
    main()
