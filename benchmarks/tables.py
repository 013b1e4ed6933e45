"""The README's figures, made from benchmarks/results: `python benchmarks/tables.py` writes them in."""

import json
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- made from benchmarks/results/cpu.json -->\n", "<!-- end -->"
ROWS = {
    "gndrp_forward_backward[{}-(8, 20, 32, 32)-float32]": "`gndrp`, forward and backward, (8, 20, 32, 32)",
    "gndrp_forward_backward[{}-(2, 80, 63, 84)-float32]": "`gndrp`, forward and backward, (2, 80, 63, 84)",
    "accumulate_cams[{}-20]": "`accumulate_cams`, 20 classes, 4 scales with mirrors, 375x500",
    "accumulate_cams_backward[{}]": "the same, forward and backward",
    "normalize_cams[{}]": "`normalize_cams`, 20 maps of 375x500",
}


def table() -> str:
    """Ratios against plain torch in one run."""
    result = json.loads((HERE / "results" / "cpu.json").read_text())
    rows = {row["name"]: row for row in result["benchmarks"]}
    lines = [
        f"Times faster than plain torch {result['versions']['torch']} in one run, on {result['machine']['cpu']} "
        f"({result['tier']}):\n",
        "| | one thread | two threads | asked |",
        "|---|---|---|---|",
    ]
    for pattern, label in ROWS.items():
        one, two = (rows[pattern.format(threads)] for threads in ("1 thread", "2 threads"))
        asked = "" if one["target"] is None else f"{one['target']:.0f}"
        lines.append(f"| {label} | {one['ratio']:.1f} | {two['ratio']:.1f} | {asked} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The README with its table made anew."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
