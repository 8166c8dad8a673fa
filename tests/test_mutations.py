"""Wrong checkpoints and faults of the program are found: a small dose; all of them by benchmarks/mutations.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations.kinds import KINDS
from mutations.program import FAULTS, notices, right_folder
from mutations.run import Student, biased_teacher, students

GOLDEN = Path(__file__).parent / "golden"
DOSE = KINDS[::9]
"""Every ninth kind."""
QUICK = ("decay ramp from -3", "gate and up exchanged in the .pth", "theta doubled in config.json")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = tmp_path_factory.mktemp("students")
    return Student("all biases", biased_teacher(folder / "teacher"), folder / "student", (2,))


def test_the_right_student_passes_every_check(student: Student) -> None:
    assert set(map(tuple, student.judged(student.folder).values())) == {()}


@pytest.mark.parametrize("kind", DOSE, ids=lambda kind: kind.name)
def test_wrong_checkpoints_are_found(student: Student, kind, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    if not student.mutant(kind, tmp_path / "mutant"):
        pytest.skip("this student has nothing of that kind")
    found = student.judged(tmp_path / "mutant", ("after init", "after a conversion", "--against, record"))
    assert found.pop("--against, record") or "dtype of one tensor" in kind.name
    assert all(found.values()) or kind.unknowable


@pytest.mark.slow
def test_every_wrong_checkpoint_of_three_models_is_found(tmp_path: Path) -> None:
    missed, number = [], 0
    for student in students(tmp_path):
        for kind in KINDS:
            number += 1
            folder = tmp_path / f"mutant-{number}"
            if student.mutant(kind, folder):
                found = student.judged(folder, ("after init", "after a conversion"))
                missed += [
                    (student.name, kind.name) for failing in found.values() if not failing and not kind.unknowable
                ]
    assert missed == []


def test_every_fault_still_finds_its_place_in_the_program() -> None:
    assert [fault.name for fault in FAULTS if not fault.applies()] == []
    assert len(KINDS) >= 60 and len(FAULTS) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.name in QUICK], ids=lambda fault: fault.name)
def test_faults_of_the_program_are_found(fault, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found, said = notices(fault, tmp_path, right_folder(tmp_path))
    assert found, said


@pytest.mark.parametrize("expect", ["untrained", "attention-trained"])
def test_one_tensor_in_another_dtype_is_no_copy(cli, golden, tmp_path, expect):
    from safetensors.torch import load_file, save_file

    teacher, student = golden / "reka_tiny" / "teacher", tmp_path / "s"
    assert cli("init-from-teacher", teacher, student, "--gqa-layers", "1", "--no-verify", "-q") == 0
    assert cli("verify", student, "--against", teacher, "--expect", expect, "-q") == 0
    weights = load_file(student / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] = weights["model.layers.2.mlp.up_proj.weight"].half()
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    assert cli("verify", student, "--against", teacher, "--expect", expect, "-q") == 1
