"""Which loaders take a checkpoint, and with what settings: answered from headers and config alone.

What RWKV-Infer does with a model was tried, release by release: `rwkv_infer.py`. transformers was tried from 4.51 to
5.24 (`tests/hf_matrix.sh`). The fork of llama.cpp was read, not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hxaconv.errors import shortened
from hxaconv.load.files import broken_companions, missing_code
from hxaconv.load.student import is_student
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.families import FAMILIES
from hxaconv.model.names import EMBEDDING, HEAD, layer_kinds, mixer_prefix
from hxaconv.model.plan import Plan
from hxaconv.model.rope import rope_of, scaling_kind
from hxaconv.model.rwkv_infer import FOLDER, PTH, TRAITS, traits_of, working
from hxaconv.model.variants import VARIANTS

if TYPE_CHECKING:
    from hxaconv.model.model import Checkpoint

RWKV_INFER_KEYS = (
    "rwkv_architecture",
    "num_hidden_layers",
    "num_key_value_heads",
    "head_dim",
    "num_attention_heads",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)
"""What RWKV-Infer reads from config.json without a default."""

TRANSFORMERS_KEYS = (
    *("hidden_size", "intermediate_size", "vocab_size", "transformer_layers"),
    *("lora_rank_decay", "lora_rank_iclr", "lora_rank_value_residual_mix"),
    *("lora_rank_key_residual_mix", "lora_rank_gate"),
)
"""What the modelling code needs on top of RWKV_INFER_KEYS."""

SWITCHES = {
    "enable_qk_norm": (".r_norm.weight", ".q_norm.weight"),
    "attention_bias": (".receptance.bias", ".q_proj.bias"),
    "attention_out_bias": (".output.bias", ".o_proj.bias"),
    "mlp_bias": (".up_proj.bias",),
}
"""What config.json has to say where there are such tensors."""

FUSED = ("w1", "a1", "v1", "k1", "g1")
"""Low-rank matrices that RWKV-Infer concatenates in every RWKV layer."""

PADDING = 256
"""RWKV-Infer pads MLP weights to a multiple of this in both directions when it loads them."""

TRANSFORMERS, INFER_FOLDER, INFER_PTH = "transformers", "RWKV-Infer, HF folder", "RWKV-Infer, .pth"
LLAMA_CPP = "llama.cpp, OpenMOSE's fork"

TRANSFORMERS_RELEASES = "4.51.3, 4.57.6, 5.0.0 and 5.24.0 (tried)"
FORK = {
    "hxa079": "eab6e78 of 2025-08-09, whose log says `not working`",
    "hxa07d": "2230605",
    "hxa07e": "7033bf6",
}
"""Variant -> the commit of the fork that has its graph."""
FORK_CLASSES = ("Hrwkv079HybridForCausalLM", "HrwkvMoeHybridForCausalLM")
"""What its converter asks `architectures` in config.json to be."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a loader stumbles over: `what` is wrong, `where`, and what to `do`.

    `blocks` says whether the loader fails (or computes something else), or only needs care.
    """

    what: str
    where: str
    do: str
    blocks: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """One loader's answer."""

    loader: str
    settings: tuple[str, ...]
    """What its user has to pass by hand."""
    findings: tuple[Finding, ...]
    releases: tuple[str, ...] = ()
    """Which releases take this model, and with which strategy."""

    @property
    def takes(self) -> bool:
        """Whether the loader takes the checkpoint as it is."""
        return not any(finding.blocks for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"takes": self.takes} | asdict(self)


def lint(checkpoint: Checkpoint, config: ModelConfig | None = None) -> list[Verdict]:
    """Ask every loader; `config` is the model's, where it is known: it names settings and layer kinds."""
    student = is_student(checkpoint)
    verdicts = [_transformers(checkpoint, config, student)]
    if student:
        verdicts += [_infer_folder(checkpoint, config), _infer_pth(checkpoint, config), _llama_cpp(checkpoint)]
    return verdicts


def _transformers(checkpoint: Checkpoint, config: ModelConfig | None, student: bool) -> Verdict:
    stop = _not_a_folder(checkpoint, needs_safetensors=False)
    if stop is not None:
        return Verdict(TRANSFORMERS, (), (stop,))
    raw, findings = checkpoint.config or {}, list[Finding]()
    if not student:
        if raw.get("model_type") not in FAMILIES:
            findings.append(Finding(f"model_type {raw.get('model_type')!r}", "config.json", "Check its documentation."))
        findings += _file_names(checkpoint)
        return Verdict(TRANSFORMERS, (), tuple(findings))
    findings += _missing_keys(raw, (*RWKV_INFER_KEYS, *TRANSFORMERS_KEYS), "the modelling code")
    findings += _switches(checkpoint.plan, raw)
    findings += _code(checkpoint, raw)
    findings += _tokenizer(checkpoint)
    findings += _file_names(checkpoint)
    if not any(key in raw for key in ("torch_dtype", "dtype")):
        do = "Add torch_dtype, or pass dtype= when loading."
        findings.append(Finding("no torch_dtype: some versions load float32", "config.json", do, blocks=False))
    if config is not None and isinstance(config, StudentConfig) and not config.tie_word_embeddings:
        findings += _head(checkpoint, "tie_word_embeddings is false")
    return Verdict(TRANSFORMERS, ("trust_remote_code=True",), tuple(findings), (TRANSFORMERS_RELEASES,))


def _switches(plan: Plan, raw: Mapping[str, Any]) -> Iterator[Finding]:
    for key, endings in SWITCHES.items():
        name = next((name for name in plan if name.endswith(endings)), None)
        if name is not None and not raw.get(key):
            what = f"{key} is not true: the modelling code leaves out {name} and all like it"
            yield Finding(what, "config.json", f'Add "{key}": true.')


def _file_names(checkpoint: Checkpoint) -> Iterator[Finding]:
    stem = "model.safetensors" if checkpoint.container == "safetensors" else "pytorch_model.bin"
    index, names = checkpoint.extra.get("index"), [file.name for file in checkpoint.files]
    if index != f"{stem}.index.json" and (index is not None or names != [stem]):
        do = "Convert with hxaconv, which names them so."
        yield Finding(f"it looks for {stem} or {stem}.index.json", _name(checkpoint), do)


def _tokenizer(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What AutoTokenizer stumbles over, though the model loads."""
    for line in broken_companions(checkpoint.companions):
        yield Finding(line, _name(checkpoint), "Download it again, or run `git lfs pull`.", blocks=False)
    for line in missing_code(checkpoint, copied=True):
        yield Finding(line, _name(checkpoint), "Copy it from the teacher: --copy-code.", blocks=False)


def _code(checkpoint: Checkpoint, raw: Mapping[str, Any]) -> Iterator[Finding]:
    auto_map = raw.get("auto_map") or {}
    again = "Convert with hxaconv, which adds the code, or copy it from a converted folder."
    for key in ("AutoConfig", "AutoModelForCausalLM"):
        reference = auto_map.get(key)
        if not isinstance(reference, str):
            yield Finding(f"auto_map has no {key}", "config.json", again)
            continue
        file = reference.rpartition("--")[2].partition(".")[0] + ".py"
        if file not in checkpoint.code_files and "--" not in reference:
            yield Finding(f"{file}, which auto_map names, is not there", _name(checkpoint), again)


def _not_a_folder(checkpoint: Checkpoint, needs_safetensors: bool) -> Finding | None:
    """Why loaders of Hugging Face folders cannot begin with this, or None."""
    where, do = _name(checkpoint), "Convert it with `hxaconv to-hf`."
    if checkpoint.key_format != "hf":
        return Finding(f"tensor names are of the {checkpoint.key_format} key format", where, do)
    if checkpoint.config is None:
        return Finding("there is no config.json", where, do)
    if checkpoint.container != "safetensors" and needs_safetensors:
        return Finding("only *.safetensors files are read from a folder", where, do)
    return None


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.root.name if checkpoint.root is not None else checkpoint.label


def _missing_keys(raw: Mapping[str, Any], keys: tuple[str, ...], reader: str) -> Iterator[Finding]:
    for key in keys:
        if raw.get(key) is None:
            nested = key == "rope_theta" and rope_of(raw)[0] is not None
            what = "rope_theta stands only inside rope_parameters" if nested else f"{key} is missing"
            yield Finding(f"{what}: {reader} reads it at top level", "config.json", f"Add {key} to config.json.")


def _infer_folder(checkpoint: Checkpoint, config: ModelConfig | None) -> Verdict:
    stop = _not_a_folder(checkpoint, needs_safetensors=True)
    if stop is not None:
        return Verdict(INFER_FOLDER, (), (stop,))
    raw = checkpoint.config or {}
    findings = list(_missing_keys(raw, RWKV_INFER_KEYS, "RWKV-Infer"))
    findings += _other_variant(checkpoint, config, INFER_FOLDER)
    findings += _rope_scaling(raw)
    for file in checkpoint.extra.get("stray_files", ()):
        if str(file).endswith(".safetensors"):
            findings.append(
                Finding(
                    f"{file} is not part of the model, and RWKV-Infer loads it too", _name(checkpoint), "Move it away."
                )
            )
    if ".pth" in str(checkpoint.root or checkpoint.label):
        found = "the path contains '.pth', so RWKV-Infer takes the folder for a file"
        findings.append(Finding(found, _name(checkpoint), "Rename the folder."))
    findings += _infer_tensors(checkpoint)
    if not raw.get("tie_word_embeddings"):
        findings += _head(checkpoint, "tie_word_embeddings is not true")
    releases, more = _releases(checkpoint, FOLDER)
    return Verdict(INFER_FOLDER, (), (*findings, *more), releases)


def _infer_pth(checkpoint: Checkpoint, config: ModelConfig | None) -> Verdict:
    findings: list[Finding] = []
    convert = "Convert it with `hxaconv to-pth`."
    if checkpoint.container != "pth":
        kinds = {"legacy": "a legacy pickle, which mmap=True refuses", "safetensors": "safetensors"}
        what = kinds.get(checkpoint.container, "a trainer's folder")
        findings.append(Finding(f"it is {what}", _name(checkpoint), convert))
        if checkpoint.container != "legacy":
            return Verdict(INFER_PTH, (), tuple(findings))
    if not all(".pth" in file.name for file in checkpoint.files) or len(checkpoint.files) != 1:
        findings.append(Finding("RWKV-Infer wants one file whose name contains '.pth'", _name(checkpoint), convert))
    if checkpoint.key_format != "rwkv":
        findings.append(
            Finding(f"tensor names are of the {checkpoint.key_format} key format", _name(checkpoint), convert)
        )
    inside, beside = checkpoint.extra.get("nested_under"), checkpoint.extra.get("ignored")
    if inside:
        findings.append(Finding(f"the tensors are nested under {inside!r}", _name(checkpoint), convert))
    elif beside:
        findings.append(Finding(f"not everything in it is a tensor: {shortened(beside)}", _name(checkpoint), convert))
    findings += _other_variant(checkpoint, config, INFER_PTH)
    findings += _infer_tensors(checkpoint)
    findings += _head(checkpoint, "a .pth never ties")
    findings += _rope_scaling(checkpoint.sidecar or {})
    findings.append(
        Finding(
            "releases from 2025-09-16 on look for tie_word_embeddings, which a .pth cannot carry, and fail",
            "RWKV-Infer",
            "Use an earlier release, or a folder made with `hxaconv to-hf`.",
            blocks=False,
        )
    )
    theta = f"rope_theta={config.rope_theta:.10g}" if config else "rope_theta (the file does not say; default 1e6)"
    eps = f"rms_norm_eps={config.rms_norm_eps:g}" if config else "rms_norm_eps (the file does not say; default 1e-6)"
    releases, more = _releases(checkpoint, PTH)
    return Verdict(INFER_PTH, (theta, eps), (*findings, *more), releases)


def _variant(checkpoint: Checkpoint, config: ModelConfig | None = None) -> str:
    """The variant that the model is by its config, or hxa079, where nothing names another."""
    if isinstance(config, StudentConfig):
        return config.rwkv_architecture
    told = (checkpoint.config or {}).get("rwkv_architecture") or (checkpoint.sidecar or {}).get("rwkv_architecture")
    return str(told or "hxa079")


def _other_variant(checkpoint: Checkpoint, config: ModelConfig | None, loader: str) -> Iterator[Finding]:
    """Why a variant does not run there; it stays what it is, whatever the loader knows."""
    name = _variant(checkpoint, config)
    known = VARIANTS.get(name)
    reason = f"it does not know {name}" if known is None else known.loaders.get(loader)
    if reason is not None:
        do = "Use transformers, with the modelling code in the folder: under another name it would be another model."
        yield Finding(f"the model is {name!r}: {reason}", _name(checkpoint), do)


def _releases(checkpoint: Checkpoint, kind: str) -> tuple[tuple[str, ...], list[Finding]]:
    """The releases that take such a model, and what it has that some of them, or all, fail on."""
    traits = traits_of(checkpoint.plan, _variant(checkpoint))
    found = working(kind, traits)
    every = working(kind, ())
    names = tuple(f"{releases.name}: {' or '.join(strategies)}" for releases, strategies in found)
    lost = [releases for releases, _ in every if releases not in [one for one, _ in found]]
    reasons = [TRAITS[trait] for trait in traits if any(trait in releases.fails for releases in lost)]
    if not lost or not reasons:
        return names, []
    what = f"{' and '.join(reasons)}: fails in {', '.join(releases.name for releases in lost)}"
    do = f"Use {found[-1][0].commits[-1]}." if found else _way_out(kind, traits)
    return names, [Finding(what, "RWKV-Infer", do, blocks=not found)]


def _way_out(kind: str, traits: tuple[str, ...]) -> str:
    other = working(FOLDER, traits) if kind == PTH else []
    return f"Use a folder, with {other[-1][0].commits[-1]}." if other else "Use transformers."


def _llama_cpp(checkpoint: Checkpoint) -> Verdict:
    stop = _not_a_folder(checkpoint, needs_safetensors=False)
    if stop is not None:
        return Verdict(LLAMA_CPP, (), (stop,))
    name = _variant(checkpoint)
    if name not in FORK:
        return Verdict(LLAMA_CPP, (), (Finding(f"it has no graph for {name}", "the fork", "Use transformers."),))
    classes = (checkpoint.config or {}).get("architectures") or []
    findings = [Finding("nothing of it was run here", "the fork", "Compare its logits before you rely on it.")]
    if not set(classes) & set(FORK_CLASSES):
        what = f"its converter knows the architectures {' and '.join(FORK_CLASSES)}, here are {classes}"
        findings.append(Finding(what, "config.json", "Give the converter a copy of the folder that says so."))
    return Verdict(LLAMA_CPP, (), tuple(findings), (FORK[name],))


def _rope_scaling(raw: Mapping[str, Any]) -> Iterator[Finding]:
    kind = scaling_kind(raw)
    if kind is not None:
        yield Finding(f"rope_scaling {kind!r} is ignored", "config.json", "Only default frequencies are computed.")


def _head(checkpoint: Checkpoint, why: str) -> Iterator[Finding]:
    if HEAD not in checkpoint.plan:
        name = "head.weight" if checkpoint.key_format == "rwkv" else HEAD
        yield Finding(
            f"{name} is missing, and {why}", _name(checkpoint), "Convert again with hxaconv, which writes it."
        )


def _infer_tensors(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What RWKV-Infer asks of the tensors, whatever file they are in."""
    plan, kinds = checkpoint.plan, layer_kinds(checkpoint.plan)
    for layer, kind in kinds.items():
        if kind == "rwkv":
            yield from _rwkv_layer(checkpoint, mixer_prefix(layer))
    if kinds.get(0) == "gqa":
        yield Finding(
            "layer 0 is GQA: the engine takes v_first from the first RWKV layer, the published trainer mixes in zeros",
            "layer 0",
            "Choose other layers with `hxaconv pick-gqa-layers`.",
        )
    if EMBEDDING not in plan:
        yield Finding(
            "the embedding is missing: only attention is stored",
            _name(checkpoint),
            "Convert it with --teacher, which has the rest.",
        )
    elif plan[EMBEDDING].shape[1] % PADDING:
        size = plan[EMBEDDING].shape[1]
        found = f"hidden_size {size} is no multiple of {PADDING}: MLP weights are padded on loading and do not fit"
        yield Finding(found, EMBEDDING, "Nothing: this teacher's size does not run there.")
    yield from _dtypes(checkpoint)
    yield from _biases(checkpoint)


def _rwkv_layer(checkpoint: Checkpoint, prefix: str) -> Iterator[Finding]:
    plan = checkpoint.plan
    bonus = plan.get(f"{prefix}r_k")
    if _variant(checkpoint) != "hxa079":
        return
    if bonus is None or len(bonus.shape) != 2:
        found = "is missing" if bonus is None else f"has shape {bonus.shape}"
        yield Finding(f"r_k {found}: (heads, head_dim) are read off it", f"{prefix}r_k", "Convert again with hxaconv.")
    missing = [name for name in FUSED if f"{prefix}{name}" not in plan]
    if missing:
        yield Finding(f"{', '.join(missing)} missing", prefix.removesuffix("."), "This is not hxa079.")


def _dtypes(checkpoint: Checkpoint) -> Iterator[Finding]:
    matrices = [name for name, recipe in checkpoint.plan.items() if name.endswith(".weight") and len(recipe.shape) == 2]
    other = [name for name in matrices if checkpoint.plan[name].dtype != "BF16"]
    if other:
        dtypes = ", ".join(sorted({checkpoint.plan[name].dtype for name in other}))
        found = f"{len(other)} of {len(matrices)} matrices are {dtypes}: the engine multiplies bf16"
        yield Finding(found, other[0], "Convert with --dtype bfloat16.")


def _biases(checkpoint: Checkpoint) -> Iterator[Finding]:
    ends = ("output.bias", "o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")
    dropped = [name for name in checkpoint.plan if name.endswith(ends)]
    if dropped:
        yield Finding(
            f"{len(dropped)} biases of attention outputs or MLPs, which the engine drops silently",
            dropped[0],
            "Use transformers: the engine would compute another model.",
        )
