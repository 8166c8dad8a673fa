"""Folders as DeepSpeed and torch.distributed.checkpoint write them, made of plain tensors by torch.save.

benchmarks/trainer_formats.py holds what is assumed here against the real libraries.
"""

from __future__ import annotations

import contextlib
import enum
import io
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata


@contextlib.contextmanager
def deepspeed_classes() -> Iterator[types.SimpleNamespace]:
    """Stand-ins for the classes that DeepSpeed pickles, under the names of the real ones."""
    stage = enum.IntEnum("ZeroStageEnum", {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3})
    wanted: dict[str, Any] = {
        "deepspeed.runtime.zero.config": stage,
        "deepspeed.runtime.fp16.loss_scaler": type("LossScaler", (), {}),
        "deepspeed.utils.tensor_fragment": type("fragment_address", (), {}),
    }
    with pytest.MonkeyPatch.context() as patch:
        for path, cls in wanted.items():
            parts = path.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                patch.setitem(sys.modules, name, types.ModuleType(name))
            cls.__module__ = path
            setattr(sys.modules[path], cls.__name__, cls)
        yield types.SimpleNamespace(**{cls.__name__: cls for cls in wanted.values()})


def _in_groups(masters: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    names = list(masters)
    return [{name: masters[name] for name in names[i::count]} for i in range(count)]


def zero_folder(
    folder: Path,
    masters: Mapping[str, Tensor],
    *,
    stage: int,
    ranks: int,
    frozen: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, str] | None = None,
    step: int = 20,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """A folder of DeepSpeed with one step; the step's own folder is returned.

    `masters` are float32 parameters, kept in two groups; `frozen` ones have no master; `shared` maps alias to name.
    """
    frozen, buffers, shared = frozen or {}, buffers or {}, shared or {}
    inside = folder / f"global_step{step}"
    inside.mkdir(parents=True)
    (folder / "latest").write_text(inside.name)
    groups = _in_groups(masters, 2)
    model: dict[str, Any] = OrderedDict(buffers)
    whole = {**masters, **frozen, **{alias: masters[name] for alias, name in shared.items()}}
    model |= {name: torch.empty(0).bfloat16() if stage == 3 else x.bfloat16() for name, x in whole.items()}
    common = {
        "module": model,
        "buffer_names": list(buffers),
        "optimizer": None,
        "param_shapes": [OrderedDict((name, x.shape) for name, x in group.items()) for group in groups],
        "frozen_param_shapes": None if stage == 1 else OrderedDict((name, x.shape) for name, x in frozen.items()),
        "shared_params": dict(shared),
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "global_steps": step,
        "dp_world_size": ranks,
        "ds_version": "0.19.8",
        **(extra or {}),
    }
    if stage < 3:
        fragments = {} if stage == 1 else {"frozen_param_fragments": dict(frozen)}
        torch.save(common | fragments, inside / "mp_rank_00_model_states.pt")
    else:
        for rank in range(ranks):
            parts = {name: _share(x, ranks)[rank] for name, x in frozen.items()}
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            torch.save(common | {"frozen_param_fragments": parts}, inside / name)
    with deepspeed_classes() as classes:
        for rank, state in enumerate(_optimizer_states(groups, stage, ranks, classes)):
            scaler = classes.LossScaler()
            scaler.__dict__.update(cur_scale=1.0, dynamic=False)
            flats = state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
            taken = torch.tensor(float(step))
            moments = {
                i: {"step": taken, "exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.zeros_like(x)}
                for i, x in enumerate(flats)
            }
            base = {"state": moments, "param_groups": []}
            key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
            state |= {"zero_stage": classes.ZeroStageEnum(stage), "loss_scaler": scaler, key: base}
            name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            torch.save({"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}, inside / name)
    return inside


def _share(x: Tensor, ranks: int) -> list[Tensor]:
    """What each rank holds of a parameter in stage 3, the last of them padded."""
    flat, size = x.flatten(), -(-x.numel() // ranks)
    padded = torch.cat([flat, torch.full((size * ranks - flat.numel(),), 7.0, dtype=x.dtype)])
    return [part.clone() for part in padded.split(size)]


def _optimizer_states(
    groups: Sequence[Mapping[str, Tensor]], stage: int, ranks: int, classes: Any
) -> Iterator[dict[str, Any]]:
    if stage == 3:
        for rank in range(ranks):
            flats = [torch.cat([_share(x, ranks)[rank] for x in group.values()]) for group in groups]
            yield {"fp32_flat_groups": flats, "partition_count": ranks}
        return
    partitions: list[list[Tensor]] = [[] for _ in range(ranks)]
    mappings: list[list[dict[str, Any]]] = [[] for _ in range(ranks)]
    for group in groups:
        flat = torch.cat([x.flatten() for x in group.values()])
        size = -(-flat.numel() // (2 * ranks)) * 2
        for rank in range(ranks):
            low, high = rank * size, min((rank + 1) * size, flat.numel())
            partitions[rank].append(flat[low:high].clone())  # padding is left off
            mappings[rank].append(_addresses(group, low, high, classes))
    for rank in range(ranks):
        yield {
            "single_partition_of_fp32_groups": partitions[rank],
            "partition_count": [ranks] * len(groups),
            "param_slice_mappings": mappings[rank],
        }


def _addresses(group: Mapping[str, Tensor], low: int, high: int, classes: Any) -> dict[str, Any]:
    found, start = OrderedDict(), 0
    for name, x in group.items():
        begin, end = max(start, low), min(start + x.numel(), high)
        if begin < end:
            found[name] = classes.fragment_address()
            found[name].__dict__.update(numel=end - begin, start=begin - low)
        start += x.numel()
    return found


Cut = Callable[[str, Tensor], list[tuple[tuple[int, ...], Tensor]]]


def cut_rows(ranks: int, axis: int = 0) -> Cut:
    """How FSDP shards a tensor: (offsets, block) along its first axis, or another one."""

    def cut(name: str, x: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
        along = min(axis, x.dim() - 1)
        found, start = [], 0
        for part in x.chunk(ranks, dim=along) if x.dim() else [x]:
            found.append((tuple(start if i == along else 0 for i in range(x.dim())), part.clone()))
            start += part.shape[along] if x.dim() else 0
        return found

    return cut


def dcp_folder(folder: Path, state: Mapping[str, Any], cut: Cut, *, ranks: int = 2) -> Path:
    """A folder of torch.distributed.checkpoint of a nested state, the i-th block of a tensor saved by rank i."""
    folder.mkdir(parents=True)
    files = [io.BytesIO() for _ in range(ranks)]
    described: dict[str, Any] = {}
    places: dict[metadata.MetadataIndex, Any] = {}
    paths: dict[str, tuple[Any, ...]] = {}

    def put(rank: int, value: object) -> Any:
        start = files[rank].tell()
        torch.save(value, files[rank])
        return filesystem._StorageInfo(f"__{rank}_0.distcp", start, files[rank].tell() - start)

    def visit(path: tuple[Any, ...], value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                visit((*path, key), inner)
            return
        name = ".".join(map(str, path))
        paths[name] = path
        if not isinstance(value, Tensor):
            described[name] = metadata.BytesStorageMetadata()
            places[metadata.MetadataIndex(name)] = put(0, value)
            return
        blocks = cut(name, value)
        chunks = [metadata.ChunkStorageMetadata(torch.Size(offsets), block.shape) for offsets, block in blocks]
        properties = metadata.TensorProperties.create_from_tensor(value)
        described[name] = metadata.TensorStorageMetadata(properties, value.shape, chunks)
        for number, (offsets, block) in enumerate(blocks):
            places[metadata.MetadataIndex(name, torch.Size(offsets), number)] = put(number % ranks, block)

    visit((), state)
    meta = metadata.Metadata(described, paths, places, metadata.StorageMeta(folder, "a-save"), version="1.0.0")
    (folder / ".metadata").write_bytes(pickle.dumps(meta))
    for rank, file in enumerate(files):
        (folder / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    return folder


def dtensor_folder(folder: Path, tensors: Mapping[str, Tensor], *, ranks: int, axis: int = 0) -> Path:
    """A folder as verl saves it: a state dict of DTensors per rank, the last tensor whole in all of them."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    folder.mkdir(parents=True)
    last = list(tensors)[-1]
    for rank in range(ranks):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        mesh = init_device_mesh("cpu", (ranks,))
        state = OrderedDict()
        for name, x in tensors.items():
            along = min(axis, x.dim() - 1)
            split = name != last and x.dim() > 0
            parts = [*x.chunk(ranks, dim=along), *[x.narrow(along, 0, 0)] * ranks] if split else [x] * ranks
            placement = Shard(along) if split else Replicate()
            local = parts[rank].contiguous().clone()
            state[name] = DTensor.from_local(
                local, mesh, [placement], run_check=False, shape=x.shape, stride=x.contiguous().stride()
            )
        torch.save(state, folder / f"model_world_size_{ranks}_rank_{rank}.pt")
        torch.save({"state": {}}, folder / f"optim_world_size_{ranks}_rank_{rank}.pt")
        dist.destroy_process_group()
    return folder
