"""`to-hf`, `to-pth` and `to-training`: the same student in another container and dialect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.commands.common import (
    Outcome,
    WriteOptions,
    base_model_name,
    defaults_of,
    layer_0_warning,
    parse_size,
    perform,
    scaling_warnings,
)
from hxaconv.errors import HxaconvError
from hxaconv.formats.dtypes import FLOATS, parse_dtype
from hxaconv.load import load_student
from hxaconv.load.student import FLAGS, with_intermediate_size
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention
from hxaconv.model.plan import Plan, main_dtype
from hxaconv.options import Settings
from hxaconv.save.card import CONVERTED
from hxaconv.save.output import Record, lay_out
from hxaconv.surgery.padding import pad_ffn

if TYPE_CHECKING:
    from hxaconv.progress import Progress
    from hxaconv.verification.report import Report

COMMANDS = {"to-hf": "hf", "to-pth": "pth", "to-training": "training"}
"""Command -> format of its output."""


def to_hf(
    source: str,
    out: str,
    *,
    revision: str | None = None,
    teacher: str | None = None,
    layer_map: str | None = None,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    tie_word_embeddings: bool | None = None,
    dtype: str | None = None,
    pad_ffn: int | None = None,
    max_shard_size: str = "5GB",
    copy_code: bool = False,
    write: WriteOptions | None = None,
) -> Outcome:
    """Write the student in `source` as a Hugging Face folder; bits are copied unless `dtype` or `pad_ffn` changes them.

    Args:
        source: Folder, file or Hub id (`org/name@revision`), in any container and dialect.
        out: The folder to create.
        revision: Branch, tag or commit of a Hub `source`.
        teacher: Completes a checkpoint that holds attention only, and tells settings that `source` does not.
        layer_map: Name or TOML file of a layer map that tells settings.
        rope_theta, rms_norm_eps, tie_word_embeddings: Settings that no source tells, or that overrule it.
        dtype: `bfloat16`, `float16` or `float32`: every float tensor is cast, rounded once. None: as stored.
        pad_ffn: 256 or 512: the MLP is padded with zeros to a multiple, which changes no result.
        max_shard_size: Of a weight file, such as `5GB` or `500MB`.
        copy_code: Copy the `.py` files of the source along.
        write: Overwriting, resuming, verification, progress.

    Raises:
        HxaconvError: when a setting is known from no source, a tensor is missing or would be unused.
        CheckFailed: when the output does not pass its verification; it is left beside `out`.
    """
    return _convert("to-hf", to_hf, locals())


def to_pth(
    source: str,
    out: str,
    *,
    revision: str | None = None,
    teacher: str | None = None,
    layer_map: str | None = None,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    tie_word_embeddings: bool | None = None,
    dtype: str | None = None,
    pad_ffn: int | None = None,
    write: WriteOptions | None = None,
) -> Outcome:
    """Write the student in `source` as a `.pth` for RWKV-Infer, with a sidecar of what that cannot carry.

    The arguments are those of `to_hf`; `out` is a file, NAME.pth, and the sidecar becomes NAME.json.

    Raises:
        HxaconvError: when a setting is known from no source, a tensor is missing or would be unused.
        CheckFailed: when the output does not pass its verification; it is left beside `out`.
    """
    return _convert("to-pth", to_pth, locals())


def to_training(
    source: str,
    out: str,
    *,
    all_tensors: bool = False,
    revision: str | None = None,
    teacher: str | None = None,
    layer_map: str | None = None,
    rope_theta: float | None = None,
    rms_norm_eps: float | None = None,
    tie_word_embeddings: bool | None = None,
    dtype: str | None = None,
    write: WriteOptions | None = None,
) -> Outcome:
    """Write the student in `source` under the names that published trainers load.

    The arguments are those of `to_hf`; `out` is a file. Only attention is written, unless `all_tensors`.

    Raises:
        HxaconvError: when a setting is known from no source, a tensor is missing or would be unused.
        CheckFailed: when the output does not pass its verification; it is left beside `out`.
    """
    return _convert("to-training", to_training, locals())


def _convert(command: str, function: Callable[..., Outcome], given: Mapping[str, Any]) -> Outcome:
    """What the three commands share; `given` are the arguments of `function`."""
    write: WriteOptions = given["write"] or WriteOptions()
    need_all = command != "to-training" or given["all_tensors"]
    settings = Settings(layer_map=given["layer_map"], revision=given["revision"], **{key: given[key] for key in FLAGS})
    student = load_student(given["source"], settings, teacher=given["teacher"], whole=need_all, progress=write.progress)
    changed, name = reshape(student, given["dtype"], given.get("pad_ffn"))
    sources = student.sources
    shard_bytes = parse_size(given.get("max_shard_size", "5GB"))
    output = lay_out(
        changed,
        Path(given["out"]),
        format=COMMANDS[command],
        dtype=name,
        record=Record(
            command=command,
            options={key: value for key, value in given.items() if key != "write"},
            defaults=defaults_of(function),
            sources=sources,
            base_model=base_model_name(sources.get("teacher", sources["source"])),
            purpose=CONVERTED,
        ),
        max_shard_bytes=shard_bytes,
        all_tensors=need_all,
        copy_code=given.get("copy_code", False),
    )

    def verify(output: Model, progress: Progress | None) -> Report:
        from hxaconv.verification.contracts import check_converted

        before = student if need_all else Model(student.config, _attention(student.plan), student.label)
        return check_converted(before, output, progress=progress)

    warnings = scaling_warnings(sources.values())
    warnings += [*dtype_warnings(changed.plan, command), *layer_0_warning(changed.student)]
    return perform(output, write, verify, warnings, list(student.notes), shard_bytes)


def reshape(student: Model, dtype: str | None, multiple: int | None) -> tuple[Model, str]:
    """(the student padded and cast as asked for, the dtype its config names)."""
    plan, config = student.plan, student.student
    if multiple is not None:
        if multiple not in (256, 512):
            raise HxaconvError(f"--pad-ffn {multiple} is not possible", hint="Use 256 or 512.")
        plan, size = pad_ffn(plan, config, multiple)
        config = with_intermediate_size(config, size)
    if dtype is not None:
        name = parse_dtype(dtype)
        if any(recipe.dtype in FLOATS and recipe.dtype != name for recipe in plan.values()):
            from hxaconv.surgery.arithmetic import cast

            plan = {key: cast(recipe, name) for key, recipe in plan.items()}
    else:
        name = main_dtype(plan)
    return replace(student, config=config, plan=plan), name


def dtype_warnings(plan: Plan, command: str) -> list[str]:
    """Mixed dtypes, and a `.pth` that RWKV-Infer would not expect."""
    dtypes = sorted({recipe.dtype for recipe in plan.values() if recipe.dtype in FLOATS})
    if len(dtypes) > 1:
        how = "--dtype bfloat16" if command in COMMANDS else "`hxaconv to-hf --dtype bfloat16`"
        return [f"the output mixes {' and '.join(dtypes)}; {how} makes it uniform"]
    if command == "to-pth" and dtypes != ["BF16"]:
        return [f"RWKV-Infer expects bf16 in a .pth, this one holds {dtypes[0]}; --dtype bfloat16 casts"]
    return []


def _attention(plan: Plan) -> Plan:
    return {name: recipe for name, recipe in plan.items() if is_attention(name)}
