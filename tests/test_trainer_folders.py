"""Folders of DeepSpeed and torch.distributed.checkpoint as sources: put together as the libraries do, or refused."""

from __future__ import annotations

import enum
import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hxaconv.errors import HxaconvError
from hxaconv.load import open_checkpoint
from hxaconv.model.plan import rows
from hxaconv.surgery.arithmetic import tensor
from tests.trainer_folders import cut_rows, dcp_folder, dtensor_folder, zero_folder

GOLDEN = Path(__file__).parent / "golden" / "reka_tiny"
TEACHER = GOLDEN / "teacher"


@pytest.fixture(scope="module")
def masters() -> dict[str, Tensor]:
    """The trained attention of a golden case, in float32 with bits that bf16 does not have."""
    stored = torch.load(GOLDEN / "trained_attention.pth", weights_only=True)
    return {name: x.float() * 1.001 for name, x in stored.items()}


def same(plan: Any, expected: dict[str, Tensor]) -> bool:
    """Whether a checkpoint's tensors are these, bit by bit, by the names in its files."""
    found = {plan.stored_names[name]: tensor(recipe) for name, recipe in plan.plan.items()}
    return found.keys() == expected.keys() and all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (2, 3), (2, 1), (3, 2), (3, 5)])
def test_master_weights_of_a_zero_folder(masters: dict[str, Tensor], tmp_path: Path, stage: int, ranks: int) -> None:
    inside = zero_folder(tmp_path / "run", masters, stage=stage, ranks=ranks)
    for spec in (tmp_path / "run", inside):
        checkpoint = open_checkpoint(spec)
        assert same(checkpoint, masters)
        assert checkpoint.extra["zero_stage"] == stage and checkpoint.extra["ranks"] == ranks
        assert any("optimizer_state_dict" in name for name in checkpoint.extra["ignored"])
    other = masters | {next(iter(masters)): masters[next(iter(masters))] + 1}
    assert not same(checkpoint, other)


@pytest.mark.parametrize("stage", [2, 3])
def test_members_of_enumerations_are_read_by_name(
    masters: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    def by_name(member: enum.Enum, protocol: int) -> tuple[Any, ...]:
        return getattr, (type(member), member.name)

    for cls in (enum.Enum, enum.IntEnum):
        monkeypatch.setattr(cls, "__reduce_ex__", by_name)
    inside = zero_folder(tmp_path / "run", masters, stage=stage, ranks=2)
    [written, *_] = sorted(inside.glob("*optim_states.pt"))
    assert b"getattr" in written.read_bytes()
    checkpoint = open_checkpoint(inside)
    assert same(checkpoint, masters) and checkpoint.extra["zero_stage"] == stage


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_parameters_buffers_and_shared_ones(masters: dict[str, Tensor], tmp_path: Path, stage: int) -> None:
    names = list(masters)
    trained = {name: masters[name] for name in names[3:]}
    frozen = {name: masters[name].bfloat16() for name in names[1:3]}
    buffers = {names[0]: masters[names[0]]}
    embedding = torch.randn(31, 48)
    trained["model.model.embed_tokens.weight"] = embedding
    alias = {"model.lm_head.weight": "model.model.embed_tokens.weight"}
    folder = tmp_path / "run"
    zero_folder(folder, trained, stage=stage, ranks=3, frozen=frozen, buffers=buffers, shared=alias)
    expected = {**trained, **frozen, **buffers, "model.lm_head.weight": embedding}
    assert same(open_checkpoint(folder), expected)


@pytest.mark.parametrize("kind", ["zero2", "zero3", "rows", "columns"])
def test_a_folder_becomes_the_same_model_as_one_file(
    masters: dict[str, Tensor], tmp_path: Path, cli: Callable[..., int], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    said: list[str] = []

    def convert(name: str) -> bytes:
        out = tmp_path / f"hf-{Path(name).stem}"
        assert cli("to-hf", tmp_path / name, out, "--teacher", TEACHER, "--no-verify") == 0
        said.append("".join(capsys.readouterr()))
        return (out / "model.safetensors").read_bytes()

    torch.save(masters, tmp_path / "one.pth")
    folder = tmp_path / "run"
    if kind.startswith("zero"):
        zero_folder(folder, masters, stage=int(kind[-1]), ranks=3)
    else:
        state = {"model": masters, "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}}, "step": 7}
        dcp_folder(folder, state, cut_rows(3, axis=1 if kind == "columns" else 0), ranks=3)
    first = convert("one.pth")
    assert convert("run") == first
    assert [text.count("Left behind") for text in said] == [0, 1] and "optimizer" in said[1]
    torch.save({name: x + 1 for name, x in masters.items()}, tmp_path / "two.pth")
    assert convert("two.pth") != first


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_models_own_weights(masters: dict[str, Tensor], tmp_path: Path, stage: int) -> None:
    zero_folder(tmp_path / "run", masters, stage=stage, ranks=2)
    if stage == 3:
        with pytest.raises(HxaconvError, match="ZeRO-3 leaves them"):
            open_checkpoint(tmp_path / "run", weights="model")
        return
    rounded = {name: x.bfloat16() for name, x in masters.items()}
    assert same(open_checkpoint(tmp_path / "run", weights="model"), rounded)
    for file in (tmp_path / "run" / "global_step20").glob("*optim*"):
        file.unlink()
    assert same(open_checkpoint(tmp_path / "run"), rounded)
    with pytest.raises(HxaconvError, match="which the master weights are in"):
        open_checkpoint(tmp_path / "run", weights="master")


def test_published_weights_beside_a_step_come_first(masters: dict[str, Tensor], tmp_path: Path) -> None:
    zero_folder(tmp_path / "run", masters, stage=2, ranks=2)
    rounded = {name: x.bfloat16() for name, x in masters.items()}
    torch.save(rounded, tmp_path / "run" / "pytorch_model.bin")
    assert same(open_checkpoint(tmp_path / "run"), rounded)
    assert same(open_checkpoint(tmp_path / "run", weights="master"), masters)
    with pytest.raises(HxaconvError, match="one set of weights"):
        open_checkpoint(TEACHER, weights="master")


def test_one_of_several_state_dicts_in_a_sharded_checkpoint(masters: dict[str, Tensor], tmp_path: Path) -> None:
    average = {name: x * 2 for name, x in masters.items()}
    dcp_folder(tmp_path / "run", {"model": masters, "ema": average, "step": 3}, cut_rows(2))
    found = open_checkpoint(tmp_path / "run")
    assert same(found, masters)
    assert "--weights ema" in found.warnings[0]
    assert same(open_checkpoint(tmp_path / "run", weights="ema"), average)
    with pytest.raises(HxaconvError, match="no state dict under average"):
        open_checkpoint(tmp_path / "run", weights="average")


def test_empty_tensors_beside_a_step_of_zero_3(masters: dict[str, Tensor], tmp_path: Path) -> None:
    zero_folder(tmp_path / "run", masters, stage=3, ranks=2)
    small = {name: x if x.numel() < 100 else torch.empty(0) for name, x in masters.items()}
    torch.save(small, tmp_path / "run" / "trainable_only_weights.pth")
    assert same(open_checkpoint(tmp_path / "run"), masters)
    with pytest.raises(HxaconvError, match="ZeRO-3 saves them so"):
        open_checkpoint(tmp_path / "run" / "trainable_only_weights.pth")


def optimizer_file(inside: Path, rank: int) -> Path:
    return inside / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def lose_a_rank(inside: Path) -> None:
    optimizer_file(inside, 1).unlink()


def keep_one_of_an_earlier_run(inside: Path) -> None:
    shutil.copy(optimizer_file(inside, 0), optimizer_file(inside, 3))


def cut_short(inside: Path) -> None:
    os.truncate(optimizer_file(inside, 1), optimizer_file(inside, 1).stat().st_size // 2)


def swap_two_ranks(inside: Path) -> None:
    one, other = (optimizer_file(inside, rank) for rank in (0, 1))
    one.rename(inside / "aside")
    other.rename(one)
    (inside / "aside").rename(other)


def split_the_model(inside: Path) -> None:
    for file in list(inside.iterdir()):
        shutil.copy(file, inside / file.name.replace("mp_rank_00", "mp_rank_01"))


def add_pipeline_stages(inside: Path) -> None:
    shutil.copy(next(inside.glob("*model*")), inside / "layer_00-model_00-model_states.pt")


def lose_the_names(inside: Path) -> None:
    for file in inside.glob("*model_states.pt"):
        file.unlink()


def take_a_file_of_another_step(inside: Path) -> None:
    stage = 3 if list(inside.glob("zero_pp*model*")) else 2
    masters = {name: x.float() * 1.001 for name, x in torch.load(GOLDEN / "trained_attention.pth").items()}
    other = zero_folder(inside.parent / "later", masters, stage=stage, ranks=3, step=30)
    shutil.copy(optimizer_file(other, 1), optimizer_file(inside, 1))
    shutil.rmtree(inside.parent / "later")


@pytest.mark.parametrize(
    ("stage", "damage", "message"),
    [
        (2, lose_a_rank, "saved by 3 ranks, but 2 .* rank 1 is missing"),
        (3, lose_a_rank, "saved by 3 ranks, but 2 .* rank 1 is missing"),
        (3, keep_one_of_an_earlier_run, "saved by 3 ranks, but 4"),
        (2, cut_short, "zip directory"),
        (2, swap_two_ranks, "the file is of another rank|by this file, but at"),
        (2, split_the_model, "2 tensor-parallel ranks"),
        (3, add_pipeline_stages, "pipeline- or expert-parallel"),
        (2, lose_the_names, "which name the tensors"),
        (2, take_a_file_of_another_step, "20 steps in .*\n.*30 steps in"),
        (3, take_a_file_of_another_step, "20 steps in .*\n.*30 steps in"),
    ],
)
def test_a_damaged_zero_folder_is_refused(
    masters: dict[str, Tensor], tmp_path: Path, stage: int, damage: Callable[[Path], None], message: str
) -> None:
    inside = zero_folder(tmp_path / "run", masters, stage=stage, ranks=3)
    damage(inside)
    with pytest.raises(HxaconvError, match=message) as caught:
        open_checkpoint(tmp_path / "run")
    assert caught.value.exit_code == 2


def test_a_zero_folder_whose_sizes_do_not_fit(masters: dict[str, Tensor], tmp_path: Path) -> None:
    for stage in (2, 3):
        inside = zero_folder(tmp_path / f"run{stage}", masters, stage=stage, ranks=2)
        less = zero_folder(tmp_path / f"less{stage}", dict(list(masters.items())[1:]), stage=stage, ranks=2)
        for rank in (0, 1):
            shutil.copy(optimizer_file(less, rank), optimizer_file(inside, rank))
        with pytest.raises(HxaconvError, match="elements"):
            open_checkpoint(inside)


class Payload:
    """Runs a command when it is unpickled by pickle.load."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("kind", ["zero", "dcp", "metadata"])
def test_nothing_in_a_pickle_is_executed(masters: dict[str, Tensor], tmp_path: Path, kind: str) -> None:
    payload, folder = Payload(tmp_path / "made"), tmp_path / "run"
    if kind == "zero":
        zero_folder(folder, masters, stage=2, ranks=2, extra={"client_state": payload})
    else:
        dcp_folder(folder, {"model": masters, "other": payload}, cut_rows(2))
        if kind == "metadata":
            (folder / ".metadata").write_bytes(pickle.dumps(payload))
    if kind == "dcp":  # the archive of what is no tensor is not even read
        assert same(open_checkpoint(folder), masters)
    else:
        with pytest.raises(HxaconvError, match="nothing of it was executed"):
            open_checkpoint(folder)
    assert not (tmp_path / "made").exists()
    torch.load(io_of(payload), weights_only=False)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("kind", ["zero2", "zero3", "dcp"])
def test_a_flipped_byte_is_read_over_or_refused(masters: dict[str, Tensor], tmp_path: Path, kind: str) -> None:
    few = dict(list(masters.items())[:8])
    if kind == "dcp":
        folder = dcp_folder(tmp_path / "run", {"model": few, "step": 3}, cut_rows(2))
    else:
        folder = zero_folder(tmp_path / "run", few, stage=int(kind[-1]), ranks=2)
    random_, refused = random.Random(0), 0
    files = sorted(folder.iterdir())
    for _ in range(100):
        file = random_.choice(files)
        data = file.read_bytes()
        begin = max(0, data.find(b"data.pkl"))  # what says where tensors stand, rather than their values
        at = random_.randrange(begin, min(len(data), begin + 4000))
        file.write_bytes(data[:at] + bytes([random_.randrange(256)]) + data[at + 1 :])
        try:
            open_checkpoint(folder)
        except HxaconvError:
            refused += 1
        file.write_bytes(data)
    assert refused > 20 and same(open_checkpoint(folder), few)


def io_of(value: object) -> Any:
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_a_sharded_tensor(tmp_path: Path, axis: int) -> None:
    x = torch.arange(7 * 9).view(7, 9).float()
    state = {"model": {"model.embed_tokens.weight": x}}
    checkpoint = open_checkpoint(dcp_folder(tmp_path / "run", state, cut_rows(3, axis), ranks=3))
    (recipe,) = checkpoint.plan.values()
    for start in range(7):
        for stop in range(start + 1, 8):
            assert torch.equal(tensor(rows(recipe, start, stop, "rows")), x[start:stop])


def lose_a_file(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def lose_the_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def cut_a_file(folder: Path) -> None:
    os.truncate(folder / "__1_0.distcp", (folder / "__1_0.distcp").stat().st_size // 2)


def take_another_saves_file(folder: Path) -> None:
    other = dcp_folder(folder.parent / "other", {"model": {"model.norm.weight": torch.ones(48)}}, cut_rows(2))
    shutil.copy(other / "__1_0.distcp", folder / "__1_0.distcp")


def overwrite_an_archive(folder: Path) -> None:
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[:200] = bytes(200)
    (folder / "__0_0.distcp").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_file, "not all of them are there"),
        (lose_the_metadata, r"no \.metadata"),
        (cut_a_file, "is to stand at"),
        (take_another_saves_file, "is to stand at|of another save"),
        (overwrite_an_archive, "no plain local header|malformed"),
    ],
)
def test_a_damaged_dcp_folder_is_refused(
    masters: dict[str, Tensor], tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = dcp_folder(tmp_path / "run", {"model": masters}, cut_rows(2))
    damage(folder)
    with pytest.raises(HxaconvError, match=message) as caught:
        open_checkpoint(folder)
    assert caught.value.exit_code == 2


def test_chunks_that_leave_a_hole(tmp_path: Path) -> None:
    def cut(name: str, x: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
        return [((0, 0), x[:2]), ((4, 0), x[2:])]

    folder = dcp_folder(tmp_path / "run", {"model": {"model.embed_tokens.weight": torch.zeros(6, 4)}}, cut)
    with pytest.raises(HxaconvError, match="do not make a tensor"):
        open_checkpoint(folder)


def test_accelerates_folder_of_a_sharded_model(masters: dict[str, Tensor], tmp_path: Path) -> None:
    dcp_folder(tmp_path / "checkpoint-20" / "pytorch_model_fsdp_0", {"model": masters}, cut_rows(2))
    dcp_folder(tmp_path / "checkpoint-20" / "optimizer_0", {"optimizer": {"state": torch.zeros(3)}}, cut_rows(2))
    shutil.copy(TEACHER / "config.json", tmp_path / "checkpoint-20")
    checkpoint = open_checkpoint(tmp_path / "checkpoint-20")
    assert same(checkpoint, masters) and checkpoint.config is not None


@pytest.mark.parametrize("axis", [0, 1])
def test_files_of_dtensors(masters: dict[str, Tensor], tmp_path: Path, axis: int) -> None:
    folder = dtensor_folder(tmp_path / "actor", masters, ranks=3, axis=axis)
    shutil.copytree(TEACHER, folder / "huggingface")
    checkpoint = open_checkpoint(folder)
    assert same(checkpoint, masters) and checkpoint.config is not None
    assert checkpoint.extra["ignored"] == ["optim_world_size*"]
    other = masters | {next(iter(masters)): masters[next(iter(masters))] + 1}
    assert not same(checkpoint, other)
    (folder / "model_world_size_3_rank_1.pt").rename(tmp_path / "aside")
    with pytest.raises(HxaconvError, match="saved by 3 ranks, but 2 files are there"):
        open_checkpoint(folder)
    few = dict(list(masters.items())[1:])
    another = dtensor_folder(tmp_path / "another", few, ranks=3, axis=axis)
    shutil.copy(another / "model_world_size_3_rank_1.pt", folder)
    with pytest.raises(HxaconvError, match="in 2 of 3 files"):
        open_checkpoint(folder)


def test_a_run_is_watched_as_it_is(
    masters: dict[str, Tensor], tmp_path: Path, cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def watched(step: int) -> tuple[int, Any]:
        folder = tmp_path / f"step{step}" / f"global_step{step}"
        code = cli("verify", folder, "--against", TEACHER, "--tokens", 8, "--json")
        text = capsys.readouterr().out
        return code, json.loads(text) if text else None

    for step, change in ((1, 1.0), (2, 1.01), (3, float("nan"))):
        changed = masters | {name: x * change for name, x in masters.items() if x.dim() == 2}
        zero_folder(tmp_path / f"step{step}", changed, stage=3, ranks=2, step=step)
    (code, one), (other_code, two) = watched(1), watched(2)
    assert code == other_code == 0 and one["passed"]
    assert 0 < one["logits"]["kl_other_source"] != two["logits"]["kl_other_source"]
    outside = {t["name"]: t["status"] for t in one["tensors"] if ".self_attn." not in t["name"]}
    assert outside and set(outside.values()) == {"equal"}
    code, report = watched(3)
    assert code == 1 and not report["passed"]
    optimizer_file(tmp_path / "step1" / "global_step1", 1).unlink()
    assert watched(1) == (2, None)
