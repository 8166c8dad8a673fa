"""What stands on disk against what was meant to: settings, names, dtypes, shapes and checksums, read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Checkpoint, Model
from hxaconv.model.names import EMBEDDING, HEAD
from hxaconv.model.plan import Recipe, same_bytes
from hxaconv.verification import specification
from hxaconv.verification.digests import wrong_files
from hxaconv.verification.report import Report
from hxaconv.verification.specification import listed


def check_output(
    checkpoint: Checkpoint,
    asked: Model,
    names: Mapping[str, Recipe],
    dtype: str,
    label: str,
    verify: Callable[[Model], Report],
) -> Report:
    """What was written, read back: its files first, then, where these are right, `verify` on its tensors.

    Args:
        asked: the student that had to be written.
        names: what had to be stored, by the names as they are in the files.
        dtype: its main one.
        label: what messages call it.
    """
    files = Report(source=label)
    stored = set(checkpoint.stored_names.values()) | checkpoint.shell.keys()
    wrong = [f"{name} is missing" for name in names if name not in stored]
    wrong += [f"{name} is there" for name in stored if name not in names]
    files.check("tensors as asked", not wrong, listed(wrong) or f"{len(stored)}, no other")
    if checkpoint.shell:
        differing = [
            f"{name} differs from the source's"
            for name, found in checkpoint.shell.items()
            if name in names and not same_bytes(found, names[name])
        ]
        good = f"{len(checkpoint.shell)} tensors, the source's"
        files.check("what wraps the text model", not differing, listed(differing) or good)
    check_written(files, checkpoint, asked, dtype)
    if not files.passed:
        return files
    report = verify(Model(asked.config, dict(checkpoint.plan), label, asked.raw))
    report.checks += files.checks
    return report


def check_written(report: Report, checkpoint: Checkpoint, asked: Model, dtype: str) -> None:
    """Add what an output's files say of it; `asked` is the student that had to be written, `dtype` its main dtype."""
    shapes = {name: recipe.shape for name, recipe in checkpoint.plan.items()}
    dtypes = {name: recipe.dtype for name, recipe in checkpoint.plan.items()}
    wanted = dict(asked.plan)
    if HEAD in shapes and HEAD not in wanted and EMBEDDING in wanted:
        wanted[HEAD] = wanted[EMBEDDING]
    wrong = [
        f"{name} is {dtypes[name]} {shapes[name]}, asked for is {recipe.dtype} {recipe.shape}"
        for name, recipe in wanted.items()
        if name in shapes and (dtypes[name], shapes[name]) != (recipe.dtype, recipe.shape)
    ]
    report.check("dtypes as asked", not wrong, listed(wrong) or f"{len(shapes)} tensors")
    wrong = specification.wrong_names(checkpoint.stored_names, checkpoint.dialect)
    report.check("names", not wrong, listed(wrong) or f"those of the {checkpoint.dialect} dialect")
    raw, where = checkpoint.config, "config.json"
    if raw is None:
        raw, where = checkpoint.sidecar, "the sidecar"
    if raw is not None:
        expected = intended(asked.student, dtype) | specification.shape_values(shapes, {})
        wrong = specification.wrong_values(expected, raw, where)
        report.check("settings as asked", not wrong, listed(wrong) or f"{where} says them all")
    check_files(report, checkpoint)


def check_own(report: Report, checkpoint: Checkpoint, provenance: Mapping[str, Any]) -> None:
    """Add what the files of a student say of it by themselves: config against tensors, names, figures of the container.

    `provenance` is its record, which knows the digests of small files.
    """
    raw, where = checkpoint.config, "config.json"
    if raw is None:
        raw, where = checkpoint.sidecar, "the sidecar"
    if raw is not None:
        shapes = {name: recipe.shape for name, recipe in checkpoint.plan.items()}
        dtypes = {name: recipe.dtype for name, recipe in checkpoint.plan.items()}
        said = specification.config_values(raw)
        implied = specification.shape_values(shapes, dtypes)
        wrong = specification.wrong_values({k: v for k, v in implied.items() if said[k] is not None}, raw, where)
        report.check("config and tensors", not wrong, listed(wrong) or f"{where} says what the tensors show")
    wrong = specification.wrong_names(checkpoint.stored_names, checkpoint.dialect)
    if checkpoint.dialect == "rwkv":
        report.check("names", not wrong, listed(wrong) or f"those of the {checkpoint.dialect} dialect")
    check_files(report, checkpoint)
    wrong = wrong_files(checkpoint, provenance)
    if provenance.get("files"):
        report.check("recorded files", not wrong, listed(wrong) or "config, sidecar and code are as they were written")


def check_files(report: Report, checkpoint: Checkpoint) -> None:
    """Add whether the container's own figures are right: the index of a folder, the checksums of a `.pth`."""
    if checkpoint.root is None:
        return
    if checkpoint.container == "safetensors" and checkpoint.root.is_dir():
        wrong = specification.wrong_index(checkpoint.root)
        report.check("index", not wrong, listed(wrong) or "names what the files hold")
    elif checkpoint.container == "pth":
        paths = [file.path for file in checkpoint.files if file.path is not None]
        wrong = [problem for path in paths for problem in specification.wrong_checksums(Path(path))]
        report.check("checksums", not wrong, listed(wrong) or "every CRC-32 in the file is that of its bytes")


def _experts(config: StudentConfig) -> dict[str, Any]:
    experts = config.experts
    if experts is None:
        return {}
    return {
        "experts": experts.num_experts,
        "experts per token": experts.num_experts_per_tok,
        "size of an expert": experts.moe_intermediate_size,
        "shares of experts renormalised": experts.norm_topk_prob,
        "layers without experts": list(experts.mlp_only_layers),
        "every how many layers there are experts": experts.decoder_sparse_step,
    }


def intended(config: StudentConfig, dtype: str) -> dict[str, Any]:
    """What a loader has to read in the config of such a student."""
    spelled = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
    ranks = {"w": config.ranks.decay, "a": config.ranks.iclr, "v": config.ranks.value, "k": config.ranks.key}
    ranks["g"] = config.ranks.gate
    return {
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "intermediate size": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "heads": config.num_attention_heads,
        "kv heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "eps": config.rms_norm_eps,
        "theta": config.rope_theta,
        "theta in rope_parameters": config.rope_theta,
        "tied head": config.tie_word_embeddings,
        "architecture": config.rwkv_architecture,
        "GQA layers": sorted(config.gqa_layers),
        "q/k norm": config.qk_norm,
        "biases of q, k, v": config.attention_bias,
        "bias of the attention output": config.output_bias,
        "biases of the MLP": config.mlp_bias,
        **_experts(config),
        **{f"rank of {letter}": rank for letter, rank in ranks.items() if rank},
        "dtype": spelled,
        "dtype, newer spelling": spelled,
        "activation": "silu",
        "RoPE scaling": config.rope_scaling.to_dict() if config.rope_scaling else None,
    }
