"""Every kind of wrong checkpoint on three students, and every fault of the program: what finds it, as a table.

    python benchmarks/mutations.py [--out benchmarks/MUTATIONS.md]

Some five minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

HEAD = """# What the checks find

Written by `python benchmarks/mutations.py`; `tests/test_mutations.py` tries a part of it in every run of the tests.

## Wrong checkpoints

{count} kinds of wrong checkpoint, each made of three right students ({students}),
{made} in all, on 16 random tokens. The columns say which checks fail: of the one that runs after `init-from-teacher`
and the one that runs after a conversion (both know what had to be written); of `verify STUDENT --against TEACHER`
with the student's record, which says it is untrained, and without one, where only attention may have changed; and of
`verify STUDENT` alone. `refused`: it does not open as a model. A dash: no check fails on one of the models at least.
Digests are left out: with them, `verify` also knows a changed config.json, and `verify --digests` every changed byte.

{missed}

| kind | models | after init | after a conversion | --against, record | --against | alone |
|---|--:|---|---|---|---|---|
"""

FAULTS_HEAD = """
## Faults of the program

Each is one edit of the program; then the command runs, and its check has to end it with exit code 1 (or it ends in
a failed assertion), or the named tests have to fail.

| fault | file | found by |
|---|---|---|
"""


def kinds_table() -> tuple[str, list[str]]:
    """(rows, kinds that a check after an operation has missed)."""
    import torch
    from mutations.kinds import KINDS
    from mutations.run import CHECKS, students

    torch.set_num_threads(1)
    rows, missed, made, names = [], [], 0, []
    with tempfile.TemporaryDirectory() as folder:
        everyone = list(students(Path(folder)))
        names = [student.name for student in everyone]
        for number, kind in enumerate(KINDS):
            found: dict[str, list[str]] = {}
            count = 0
            for student in everyone:
                mutant = Path(folder) / f"{number}-{student.name}"
                if not student.mutant(kind, mutant):
                    continue
                count += 1
                for check, failing in student.judged(mutant).items():
                    found[check] = failing if not failing else found.get(check, failing)
                    if not failing and check.startswith("after"):
                        missed.append(f"* {check}, {student.name}: {kind.name}. {kind.unknowable or 'NOT FOUND'}")
            made += count
            cells = [", ".join(found.get(check, [])[:2]) or "-" for check in CHECKS]
            rows.append(f"| {kind.name} | {count} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    told = (
        "What the two checks after an operation do not know:\n\n" + "\n".join(missed) if missed else "None is missed."
    )
    head = HEAD.format(count=len(KINDS), students="; ".join(names), made=made, missed=told)
    return head + "\n".join(rows) + "\n", missed


def faults_table() -> str:
    """Rows of the second table."""
    from mutations.program import FAULTS, notices, right_folder

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        right = right_folder(Path(folder))
        for number, fault in enumerate(FAULTS):
            place = Path(folder) / str(number)
            place.mkdir()
            found, said = notices(fault, place, right)
            by = f"`{fault.by}`" if found else f"NOT FOUND by {fault.by}: {said}"
            rows.append(f"| {fault.name} | {fault.file} | {by} |")
            print(rows[-1], flush=True)
    return FAULTS_HEAD + "\n".join(rows) + "\n"


def main() -> None:
    """Run them all and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("MUTATIONS.md"))
    arguments = parser.parse_args()
    arguments.out.write_text(kinds_table()[0] + faults_table())


if __name__ == "__main__":
    main()
