"""The commands as Python functions: keywords or groups, results that show themselves, errors that name arguments."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hxaconv
from hxaconv.calls import in_python, parameters_of
from hxaconv.commands import COMMANDS
from hxaconv.model.names import layer_kinds
from hxaconv.progress import Result

FUNCTIONS = [name.replace("-", "_") for name in COMMANDS]


@pytest.fixture
def student(tiny_teacher: Path, tmp_path: Path) -> Path:
    hxaconv.init_from_teacher(tiny_teacher, tmp_path / "student", gqa_layers=5, verify=False)
    return tmp_path / "student"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_has_the_public_name_and_every_option(name: str) -> None:
    function = getattr(hxaconv, name)
    assert (function.__module__, function.__name__, function.__qualname__) == ("hxaconv", name, name)
    assert pickle.loads(pickle.dumps(function)) is function
    text = inspect.getdoc(function) or ""
    assert "Raises:" in text
    for parameter in parameters_of(COMMANDS[name.replace("_", "-")]):
        assert parameter.name in inspect.signature(function).parameters
        assert f"    {parameter.name}: " in text
    assert not any(word in text.partition("Options, also as keywords")[2] for word in ("--", "call:"))


def test_the_package_lists_what_it_offers() -> None:
    assert set(FUNCTIONS) < set(dir(hxaconv)) == set(hxaconv.__all__)
    assert hxaconv.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hxaconv.nothing


def test_importing_the_package_is_light() -> None:
    heavy = ("torch", "numpy", "rich", "typer")
    code = f"import hxaconv, sys; dir(hxaconv); print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("layers", [[2, 5], "2,5", (5, 2), np.array([2, 5])])
def test_layers_are_numbers_or_text(tiny_teacher: Path, tmp_path: Path, layers: Any) -> None:
    planned = hxaconv.init_from_teacher(tiny_teacher, tmp_path / "a.pth", gqa_layers=layers, dry_run=True)
    assert planned.gqa_layers == (2, 5) and planned.format == "pth"


def test_layers_of_a_student_are_numbers_or_text(student: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    hxaconv.pick_gqa_layers(student, tmp_path / "p", layers=[4], teacher=tiny_teacher, verify=False)
    kinds = layer_kinds(hxaconv.open_checkpoint(tmp_path / "p").plan)
    assert [layer for layer, kind in kinds.items() if kind == "gqa"] == [4]
    hxaconv.pick_gqa_layers(student, tmp_path / "n", layers=[], teacher=tiny_teacher, verify=False)
    assert set(layer_kinds(hxaconv.open_checkpoint(tmp_path / "n").plan).values()) == {"rwkv"}


def test_options_are_keywords_groups_or_mappings(tiny_teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    ways: list[dict[str, Any]] = [
        {"overwrite": True, "verify": False, "seed": 3},
        {"write": hxaconv.Write(overwrite=True, verify=False), "values": {"seed": 3}},
        {"write": {"overwrite": True}, "verify": False, "values": hxaconv.Init(), "seed": np.int64(3)},
    ]
    made = []
    for way in ways:
        assert hxaconv.init_from_teacher(str(tiny_teacher), out, dtype=torch.bfloat16, **way).written
        made.append(out.read_bytes())
    assert made[1:] == made[:1] * 2
    assert hxaconv.init_from_teacher(tiny_teacher, out, overwrite=True, verify=False).written
    assert out.read_bytes() != made[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overwrite": "yes"}, "overwrite: 'yes' is not True or False"),
        ({"write": {"bogus": 1}}, "write has no such options"),
        ({"calibration": {"bogus": 1}}, "calibration has no such options"),
        ({"write": 3}, "write: 3 is neither a Write nor its options by name"),
        ({"seed": -1}, "seed: -1 is not possible, it takes 0 or more"),
        ({"seed": 2**63}, "seed: 9223372036854775808 is not possible"),
        ({"workers": 0}, "workers: 0 is not possible"),
        ({"workers": 0, "seed": -1}, "seed: -1 .*\n.*workers: 0 |workers: 0 .*\n.*seed: -1"),
        ({"gqa_layers": object()}, "gqa_layers: .* is neither text nor layer numbers"),
        ({"gqa_layers": True}, "gqa_layers: True is neither text nor layer numbers"),
        ({"gqa_layers": 1.9}, "gqa_layers: 1.9 is neither"),
        ({"gqa_layers": [1, 2.7]}, "gqa_layers: .* is neither"),
        ({"adapter": "a", "adapter_scale": True}, "adapter_scale: True is not a number"),
        ({"scale": {"value": "x"}}, "scale: 'x' is not a number"),
        ({"scale": {"valu": 1}}, "scale is not understood"),
        ({"gqa_layers": {2: 1}}, "gqa_layers: {2: 1} is neither"),
        ({"device": 3}, "device: 3 is not text, nor a path"),
        ({"scale": 0.4}, "scale: 0.4 is neither factors by name nor text such as value=0.4"),
        ({"write": {"overwite": True}}, r"'overwite' \(did you mean overwrite\?\)"),
        ({"preset": "openmose-stage3"}, r"did you mean openmose-stage2\?|did you mean openmose-stage1\?"),
        ({"dtype": b"float32"}, "dtype: b'float32' is not a dtype"),
        ({"rope_theta": 10**400}, "rope_theta: 10.* is not a number"),
        ({"revision": "a\0b"}, "revision: .* has a null byte"),
        ({"gqa_layers": 99}, "gqa_layers '99' of a model of 6 layers"),
        ({"dtype": torch.int8}, "unknown dtype 'int8'"),
        ({"scale": "value=x"}, "scale is not understood"),
        ({"tokens": 5}, 'tokens: for a calibration only\nAdd init="calibrated"'),
        ({"overwrites": True}, r"no such arguments:\n.*overwrites' \(did you mean overwrite\?\)"),
        ({"max_shard_size": "huge"}, "max_shard_size: 'huge' is not a size"),
        ({"format": "gguf"}, "format: 'gguf' is not known, it takes hf, pth, training"),
        ({"layer_map": "reka-flash-3", "gqa_layers": 1}, "layer_map and gqa_layers both choose the layers"),
    ],
)
def test_wrong_arguments_are_one_error_that_names_them(
    tiny_teacher: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(hxaconv.HxaconvError, match=message) as caught:
        hxaconv.init_from_teacher(tiny_teacher, tmp_path / "out", **options)
    assert "--" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ({"dtype": np.float32}, {"dtype": "float32"}),
        ({"dtype": np.dtype("float32")}, {"dtype": torch.float32}),
        ({"dtype": "torch.float16"}, {"dtype": "float16"}),
        ({"scale": {"value": 0.4, "key": np.float64(1)}}, {"scale": "value=0.4,key=1"}),
        ({"gqa_layers": np.int64(3)}, {"gqa_layers": 3.0}),
        ({"gqa_layers": torch.tensor([2, 3])}, {"gqa_layers": {"2", "3"}}),
    ],
)
def test_what_is_plain_is_taken(tiny_teacher: Path, tmp_path: Path, one: dict[str, Any], same: dict[str, Any]) -> None:
    plans = [
        hxaconv.init_from_teacher(tiny_teacher, tmp_path / "o", dry_run=True, **way).plan for way in (one, same, {})
    ]
    assert plans[0] == plans[1] != plans[2]


def test_a_bar_is_shown_on_request(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hxaconv.cli import console

    made: list[Told] = []
    monkeypatch.setattr(console, "Bars", lambda: made.append(Told()) or made[0])
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    hxaconv.to_pth(student, tmp_path / "a.pth", progress=False)
    assert not made
    hxaconv.to_pth(student, tmp_path / "b.pth", progress=True)
    assert made[0].titles


def test_groups_refuse_what_they_do_not_have() -> None:
    for wrong in ({"overwite": True}, {"overwrite": 1}):
        with pytest.raises(hxaconv.HxaconvError, match=r"did you mean overwrite\?|overwrite: 1 is not True or False"):
            hxaconv.Write(**wrong)
    assert pickle.loads(pickle.dumps(hxaconv.Write(overwrite=True))).overwrite


@pytest.mark.parametrize("name", ["", "a\0b", "n" * 300, None])
def test_what_no_file_can_be_called_is_not_opened(name: Any) -> None:
    with pytest.raises(hxaconv.HxaconvError, match="cannot be opened"):
        hxaconv.open_checkpoint(name)


def test_an_existing_target_is_refused_in_pythons_words(student: Path, tiny_teacher: Path) -> None:
    with pytest.raises(hxaconv.HxaconvError, match="add overwrite=True"):
        hxaconv.init_from_teacher(tiny_teacher, student)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("to_pth", {"source": "a", "out": "b", "copy_code": True}, "copy_code"),
        ("to_training", {"source": "a", "out": "b", "pad_ffn": 256}, "pad_ffn"),
        ("to_hf", {"source": "a", "out": "b", "all_tensors": True}, "all_tensors"),
        ("to_pth", {"source": "a", "out": "b", "write": hxaconv.Write(copy_code=True)}, "copy_code: it has no use"),
        ("calibrate", {"source": "a", "out": "b"}, "calibrate: .*'teacher'"),
        ("verify", {}, "verify: .*'source'"),
        ("to_hf", {"source": "a", "out": ""}, "out: it is empty"),
        ("to_pth", {"source": "a", "out": "b", "progress": 5}, "progress: 5 is no hxaconv.Progress: it needs start"),
        ("to_pth", {"source": "a", "out": "b", "progress": hxaconv.Progress}, "progress: .* is no hxaconv.Progress"),
    ],
)
def test_arguments_of_others_and_lacking_ones_are_refused(
    function: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(hxaconv.HxaconvError, match=message):
        getattr(hxaconv, function)(**arguments)
    with pytest.raises(hxaconv.HxaconvError, match="to_hf: too many positional"):
        hxaconv.to_hf("a", "b", "c")
    with pytest.raises(hxaconv.HxaconvError, match="to_hf: multiple values for argument 'source'"):
        hxaconv.to_hf("a", "b", source="c")


def test_messages_name_arguments_and_leave_commands_alone() -> None:
    parameters = parameters_of(COMMANDS["to-training"])
    told = in_python("Add --overwrite, --no-verify, --all or --init calibrated: `hxaconv x --overwrite`.", parameters)
    assert told == 'Add overwrite=True, verify=False, all_tensors=True or init="calibrated": `hxaconv x --overwrite`.'
    assert in_python("--teacher TEACHER, --unknown", parameters) == "teacher TEACHER, --unknown"


def test_settings_are_given_by_name_everywhere(golden: Path, tmp_path: Path) -> None:
    source = golden / "reka_tiny" / "student.pth"
    theta = json.loads((golden / "reka_tiny" / "teacher" / "config.json").read_text())["rope_theta"]
    settings = {"rope_theta": theta, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "variant": "hxa079"}
    assert hxaconv.verify(source, **settings, tokens=8).passed
    hxaconv.to_hf(source, tmp_path / "hf", verify=False, **settings)
    assert hxaconv.inspect(tmp_path / "hf")["variant"] == "hxa079"
    with pytest.raises(hxaconv.HxaconvError, match="rope_theta"):
        hxaconv.to_hf(source, tmp_path / "other", variant="hxa079")


def test_token_ids_may_be_in_memory(student: Path, tiny_teacher: Path) -> None:
    ids = np.load(tiny_teacher / "heldout_tokens.npy")[:1, :32]
    ways = (ids, torch.tensor(ids), ids.tolist(), ids[0].tolist())
    reports = [hxaconv.verify(student, against=tiny_teacher, input_ids=way) for way in ways]
    assert len({report.logits.kl_other_source for report in reports}) == 1
    other = hxaconv.verify(student, against=tiny_teacher, input_ids=ids[:, ::-1].copy())
    assert other.logits.kl_other_source != reports[0].logits.kl_other_source
    for wrong in ([0.5], ["a"], [[1], [2, 3]], [], [999]):
        with pytest.raises(hxaconv.HxaconvError, match="input_ids"):
            hxaconv.verify(student, input_ids=wrong)


def results(student: Path, teacher: Path, out: Path) -> list[Result]:
    return [
        hxaconv.to_pth(student, out / "a.pth"),
        hxaconv.to_pth(student, out / "b.pth", dry_run=True),
        hxaconv.verify(student, tokens=8),
        hxaconv.verify(student, digests=True),
        hxaconv.inspect(student, stats=True),
        hxaconv.pick_gqa_layers(teacher, count=2, strategy="uniform"),
        hxaconv.pick_gqa_layers(
            student, out / "c", count=2, strategy="mse", teacher=teacher, input_ids=[[5] * 16], tokens=16
        ),
        hxaconv.maps(),
        hxaconv.maps("reka-flash-3"),
    ]


def test_results_are_short_and_go_everywhere(
    student: Path, tiny_teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for result in results(student, tiny_teacher, tmp_path):
        assert len(repr(result)) < 400 and repr(result).startswith(f"<{type(result).__name__}: ")
        assert json.loads(json.dumps(result.to_dict()))
        again = pickle.loads(pickle.dumps(result))
        assert again.to_dict() == result.to_dict()
        assert result._repr_html_().startswith("<pre>")
    told = capsys.readouterr()
    assert told.out == told.err == ""


def test_notes_are_in_the_result_where_nobody_is_told(tiny_teacher: Path) -> None:
    options = {"count": 2, "strategy": "influence", "input_ids": [[5] * 16], "tokens": 24}
    assert "24 tokens are requested, 16 are used." in hxaconv.pick_gqa_layers(tiny_teacher, **options).notes
    assert hxaconv.pick_gqa_layers(tiny_teacher, **options, progress=Told()).notes == ()


class Told(hxaconv.Progress):
    """What a run reports."""

    def __init__(self) -> None:
        self.titles: list[str] = []
        self.shown: list[Result] = []

    def start(self, title: str, total: int) -> None:
        self.titles.append(title)

    def show(self, result: Result) -> None:
        self.shown.append(result)


def test_progress_is_told_of_the_plan_and_of_the_work(student: Path, tmp_path: Path) -> None:
    told = Told()
    outcome = hxaconv.to_pth(student, tmp_path / "a.pth", progress=told)
    [plan] = told.shown
    assert told.titles
    assert (plan.written, plan.plan, plan.target) == (False, outcome.plan, outcome.target)


def test_a_notebook_gets_a_bar(monkeypatch: pytest.MonkeyPatch, student: Path, tmp_path: Path) -> None:
    from hxaconv.cli import console

    made: list[console.Bars] = []

    class Bars(Told):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)  # type: ignore[arg-type]

    monkeypatch.setattr(console, "Bars", Bars)
    hxaconv.to_pth(student, tmp_path / "a.pth", dry_run=True)
    assert not made
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    hxaconv.to_pth(student, tmp_path / "a.pth", dry_run=True)
    assert len(made) == 1


def test_the_page_about_python_runs(tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {})
    for name, group in re.findall(r"`(\w+)`(?:, `(\w+)`)? \| `\w+` \|", page):
        assert {name, group} - {""} <= set(dir(hxaconv))


def test_signatures_and_texts_are_those_of_python() -> None:
    taken = inspect.signature(hxaconv.init_from_teacher).parameters
    assert "Iterable[int]" in str(taken["gqa_layers"]) and "Mapping[str, float]" in str(taken["scale"])
    assert "Iterable" not in str(taken["preset"])
    layers = inspect.signature(hxaconv.Layers).parameters
    assert "Iterable[int]" in str(layers["gqa_layers"]) and "Iterable" not in str(layers["layer_map"])
    described = str(hxaconv.init_from_teacher.__doc__).partition("Command line:")
    assert 'With init="calibrated", the RWKV' in described[0] and "--gqa-layers" in described[2]
