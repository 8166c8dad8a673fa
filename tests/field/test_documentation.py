"""docs/checkpoints.md is made of the cases: run this file to write it anew."""

from __future__ import annotations

from pathlib import Path

from tests.field.cases import CASES

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoints.md"
BEGIN, END = "<!-- made of tests/field/cases.py -->", "<!-- end -->"


def table() -> str:
    """One row for each kind of checkpoint."""
    rows = ["| what you have | what happens | what to do | reported in |", "| --- | --- | --- | --- |"]
    for what in dict.fromkeys(case.what for case in CASES):
        cases = [case for case in CASES if case.what == what]
        met = ", ".join(dict.fromkeys(case.met for case in cases if case.met))
        do = next((case.do for case in cases if case.do != "nothing"), "nothing")
        rows.append(f"| {what} | {cases[0].outcome} | {do} | {met} |")
    return "\n".join(rows)


def test_the_table_in_the_documentation_is_that_of_the_tests() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == table()


def test_one_kind_has_one_outcome() -> None:
    outcomes = {what: {case.outcome for case in CASES if case.what == what} for what in {case.what for case in CASES}}
    assert [what for what, found in outcomes.items() if len(found) > 1] == []


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
