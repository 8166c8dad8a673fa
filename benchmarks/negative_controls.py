"""Write NEGATIVE_CONTROLS.md: what each mistake that this architecture invites does to the golden students.

python benchmarks/negative_controls.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from faults import FAULTS, measure

TABLE = Path(__file__).with_name("NEGATIVE_CONTROLS.md")

INTRODUCTION = """\
# Negative controls

Each mistake is made on purpose in one of two golden students (`tests/golden/`), and the result compared with the
right student by `hxaconv verify` in float64, on the golden tokens. The right student meets the golden logits to 1e-6;
`verify` names the layer in which the mistake sits by feeding every layer of both models the same input.

Written by `python benchmarks/negative_controls.py`; `tests/test_verify.py` holds it against new measurements.

| mistake | student | largest change of a logit | KL, nats per token | first layer named |
|---|---|---:|---:|---:|
"""


def main() -> None:
    """Measure all faults and write the table."""
    lines = []
    for fault in FAULTS:
        effect = measure(fault)
        numbers = f"{effect.max_difference:.2e} | {effect.kl:.2e} | {effect.first_layer}"
        lines.append(f"| {fault.name} | {fault.case} | {numbers} |\n")
    TABLE.write_text(INTRODUCTION + "".join(lines))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
