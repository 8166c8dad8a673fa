"""Which loaders take a checkpoint, and with what settings: answered from headers and config alone.

What RWKV-Infer does with a model was tried, release by release: `rwkv_infer.py`. transformers was tried from 4.51 to
5.24 (`tests/hf_matrix.sh`). The graphs of llama.cpp's fork were run (`benchmarks/llama_cpp.py`), its converter read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hxaconv.errors import shortened
from hxaconv.load.files import broken_companions, missing_code
from hxaconv.load.student import is_student
from hxaconv.model.config import ModelConfig, StudentConfig
from hxaconv.model.experts import PTH_REASON
from hxaconv.model.families import FAMILIES
from hxaconv.model.names import EMBEDDING, HEAD, layer_kinds, mixer_prefix
from hxaconv.model.rope import rope_of, scaling_kind
from hxaconv.model.rwkv_infer import FOLDER, PTH, TRAITS, traits_of, working
from hxaconv.model.variants import VARIANTS
from hxaconv.verification.specification import RANKS, SWITCHES

if TYPE_CHECKING:
    from hxaconv.model.model import Checkpoint

RWKV_INFER_KEYS = (
    *("rwkv_architecture", "num_hidden_layers", "num_key_value_heads", "head_dim", "num_attention_heads"),
    *("rms_norm_eps", "rope_theta", "tie_word_embeddings"),
)
"""What RWKV-Infer reads from config.json without a default."""

TRANSFORMERS_KEYS = ("hidden_size", "intermediate_size", "vocab_size", "transformer_layers", *RANKS.values())
"""What the modelling code needs on top of RWKV_INFER_KEYS."""

PADDING = 256
"""RWKV-Infer pads MLP weights to a multiple of this in both directions when it loads them."""

TRANSFORMERS, INFER_FOLDER, INFER_PTH = "transformers", "RWKV-Infer, HF folder", "RWKV-Infer, .pth"
LLAMA_CPP = "llama.cpp, OpenMOSE's fork"

TRANSFORMERS_RELEASES = "4.51.3, 4.57.6, 5.0.0 and 5.24.0 (tried)"
FORK = {"hxa07d": "eab6e78 (with experts, heads of 128) and 2230605", "hxa07e": "7033bf6"}
"""Variant -> the commits of the fork that have its graph."""
FORK_CLASSES = ("Hrwkv079HybridForCausalLM", "HrwkvMoeHybridForCausalLM")
"""What its converter asks `architectures` in config.json to be."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a loader stumbles over: `what` is wrong, `where`, and what to `do`.

    `blocks`: whether the loader fails (or computes something else), or only needs care.
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
    if not is_student(checkpoint):
        return [_Reading(checkpoint, config, TRANSFORMERS).teacher()]
    return [
        _Reading(checkpoint, config, TRANSFORMERS).transformers(),
        _Reading(checkpoint, config, INFER_FOLDER).infer_folder(),
        _Reading(checkpoint, config, INFER_PTH).infer_pth(),
        _Reading(checkpoint, config, LLAMA_CPP).llama_cpp(),
    ]


class _Reading:
    """One loader at a checkpoint, and what it stumbles over."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig | None, loader: str) -> None:
        self.checkpoint, self.config, self.loader = checkpoint, config, loader
        self.raw, self.plan = checkpoint.config or {}, checkpoint.plan
        self.name = checkpoint.root.name if checkpoint.root is not None else checkpoint.label
        named = self.raw.get("rwkv_architecture") or (checkpoint.sidecar or {}).get("rwkv_architecture")
        self.variant = config.rwkv_architecture if isinstance(config, StudentConfig) else str(named or "hxa079")
        self.findings: list[Finding] = []

    def add(self, what: str, do: str, *, where: str = "", blocks: bool = True) -> None:
        """Note something; without a place, of the checkpoint as a whole."""
        self.findings.append(Finding(what, where or self.name, do, blocks))

    def verdict(self, settings: tuple[str, ...] = (), releases: tuple[str, ...] = ()) -> Verdict:
        return Verdict(self.loader, settings, tuple(self.findings), releases)

    # --- One method per loader

    def teacher(self) -> Verdict:
        if self._is_folder():
            if self.raw.get("model_type") not in FAMILIES:
                what = f"model_type {self.raw.get('model_type')!r}"
                self.add(what, "Check its documentation.", where="config.json")
            self._file_names()
        return self.verdict()

    def transformers(self) -> Verdict:
        if not self._is_folder():
            return self.verdict()
        self._keys((*RWKV_INFER_KEYS, *TRANSFORMERS_KEYS), "the modelling code")
        for key, endings in SWITCHES.items():
            name = next((name for name in self.plan if name.endswith(endings)), None)
            if name is not None and not self.raw.get(key):
                what = f"{key} is not true: the modelling code leaves out {name} and all like it"
                self.add(what, f'Add "{key}": true.', where="config.json")
        self._code()
        for line in broken_companions(self.checkpoint.companions):
            self.add(line, "Download it again, or run `git lfs pull`.", blocks=False)
        for line in missing_code(self.checkpoint, copied=True):
            self.add(line, "Copy it from the teacher: --copy-code.", blocks=False)
        self._file_names()
        if not any(key in self.raw for key in ("torch_dtype", "dtype")):
            do = "Add torch_dtype, or pass dtype= when loading."
            self.add("no torch_dtype: some versions load float32", do, where="config.json", blocks=False)
        if isinstance(self.config, StudentConfig) and not self.config.tie_word_embeddings:
            self._head("tie_word_embeddings is false")
        return self.verdict(("trust_remote_code=True",), (TRANSFORMERS_RELEASES,))

    def infer_folder(self) -> Verdict:
        if not self._is_folder(needs_safetensors=True):
            return self.verdict()
        self._keys(RWKV_INFER_KEYS, "RWKV-Infer")
        self._other_variant()
        self._rope_scaling(self.raw)
        for file in self.checkpoint.extra.get("stray_files", ()):
            if str(file).endswith(".safetensors"):
                self.add(f"{file} is not part of the model, and RWKV-Infer loads it too", "Move it away.")
        if ".pth" in str(self.checkpoint.root or self.checkpoint.label):
            self.add("the path contains '.pth', so RWKV-Infer takes the folder for a file", "Rename the folder.")
        self._infer_tensors()
        if not self.raw.get("tie_word_embeddings"):
            self._head("tie_word_embeddings is not true")
        return self.verdict(releases=self._releases(FOLDER))

    def infer_pth(self) -> Verdict:
        checkpoint, convert = self.checkpoint, "Convert it with `hxaconv to-pth`."
        if any(".mlp.experts." in name for name in self.plan):
            self.add(PTH_REASON, "Use a folder, or transformers.")
            return self.verdict()
        if checkpoint.container != "pth":
            kinds = {"legacy": "a legacy pickle, which mmap=True refuses", "safetensors": "safetensors"}
            other = "a trainer's folder"
            self.add(f"it is {kinds.get(checkpoint.container, other)}", convert)
            if checkpoint.container != "legacy":
                return self.verdict()
        if not all(".pth" in file.name for file in checkpoint.files) or len(checkpoint.files) != 1:
            self.add("RWKV-Infer needs one file whose name contains '.pth'", convert)
        if checkpoint.key_format != "rwkv":
            self.add(f"tensor names are of the {checkpoint.key_format} key format", convert)
        inside, beside = checkpoint.extra.get("nested_under"), checkpoint.extra.get("ignored")
        if inside:
            self.add(f"the tensors are nested under {inside!r}", convert)
        elif beside:
            self.add(f"not everything in it is a tensor: {shortened(beside)}", convert)
        self._other_variant()
        self._infer_tensors()
        self._head("a .pth never ties")
        self._rope_scaling(checkpoint.sidecar or {})
        what = "releases from 2025-09-16 on look for tie_word_embeddings, which a .pth cannot carry, and fail"
        do = "Use an earlier release, or a folder made with `hxaconv to-hf`."
        self.add(what, do, where="RWKV-Infer", blocks=False)
        known, silent = self.config, "(not in the file; default 1e"
        theta = f"rope_theta={known.rope_theta:.10g}" if known else f"rope_theta {silent}6)"
        eps = f"rms_norm_eps={known.rms_norm_eps:g}" if known else f"rms_norm_eps {silent}-6)"
        return self.verdict((theta, eps), self._releases(PTH))

    def llama_cpp(self) -> Verdict:
        if not self._is_folder():
            return self.verdict()
        if self.variant not in FORK:
            what = f"it has no graph for {self.variant}"
            if self.variant == "hxa079":
                what += ": those that take its tensors compute hxa07d's formula, and so other logits"
            self.add(what, "Use transformers.", where="the fork")
            return self.verdict()
        classes = self.raw.get("architectures") or []
        do = "Compare its logits before you rely on it."
        self.add("its graph was run on small models, its converter was not", do, where="the fork", blocks=False)
        if not set(classes) & set(FORK_CLASSES):
            what = f"its converter has the architectures {' and '.join(FORK_CLASSES)}, here are {classes}"
            self.add(what, "Give the converter a copy of the folder with one of these.", where="config.json")
        return self.verdict(releases=(FORK[self.variant],))

    # --- What several of them ask

    def _is_folder(self, needs_safetensors: bool = False) -> bool:
        """Whether loaders of Hugging Face folders can begin with this; if not, why."""
        checkpoint, what = self.checkpoint, ""
        if checkpoint.key_format != "hf":
            what = f"tensor names are of the {checkpoint.key_format} key format"
        elif checkpoint.config is None:
            what = "there is no config.json"
        elif checkpoint.container != "safetensors" and needs_safetensors:
            what = "only *.safetensors files are read from a folder"
        if what:
            self.add(what, "Convert it with `hxaconv to-hf`.")
        return not what

    def _keys(self, keys: tuple[str, ...], reader: str) -> None:
        for key in keys:
            if self.raw.get(key) is None:
                nested = key == "rope_theta" and rope_of(self.raw)[0] is not None
                what = "rope_theta stands only inside rope_parameters" if nested else f"{key} is missing"
                do = f"Add {key} to config.json."
                self.add(f"{what}: {reader} reads it at top level", do, where="config.json")

    def _file_names(self) -> None:
        checkpoint = self.checkpoint
        stem = "model.safetensors" if checkpoint.container == "safetensors" else "pytorch_model.bin"
        index, names = checkpoint.extra.get("index"), [file.name for file in checkpoint.files]
        if index != f"{stem}.index.json" and (index is not None or names != [stem]):
            self.add(f"it looks for {stem} or {stem}.index.json", "Convert with hxaconv, which names them so.")

    def _code(self) -> None:
        again = "Convert with hxaconv, which adds the code, or copy it from a converted folder."
        for key in ("AutoConfig", "AutoModelForCausalLM"):
            reference = (self.raw.get("auto_map") or {}).get(key)
            if not isinstance(reference, str):
                self.add(f"auto_map has no {key}", again, where="config.json")
                continue
            file = reference.rpartition("--")[2].partition(".")[0] + ".py"
            if file not in self.checkpoint.code_files and "--" not in reference:
                self.add(f"{file}, which auto_map names, is not there", again)

    def _other_variant(self) -> None:
        """Why a variant does not run there; the checkpoint is valid all the same."""
        known = VARIANTS.get(self.variant)
        reason = f"it does not know {self.variant}" if known is None else known.loaders.get(self.loader)
        if reason is not None:
            do = "with the modelling code in the folder: under another name it would be another model"
            self.add(f"the model is {self.variant!r}: {reason}", f"Use transformers, {do}.")

    def _rope_scaling(self, raw: Mapping[str, Any]) -> None:
        kind = scaling_kind(raw)
        if kind is not None:
            what = f"rope_scaling {kind!r} is ignored"
            self.add(what, "Only default frequencies are computed.", where="config.json")

    def _head(self, why: str) -> None:
        if HEAD not in self.plan:
            name = "head.weight" if self.checkpoint.key_format == "rwkv" else HEAD
            self.add(f"{name} is missing, and {why}", "Convert again with hxaconv, which writes it.")

    def _releases(self, kind: str) -> tuple[str, ...]:
        """The releases of RWKV-Infer that take such a model; noted is what some of them, or all, fail on."""
        traits = traits_of(self.plan, self.variant)
        found = working(kind, traits)
        lost = [releases for releases, _ in working(kind, ()) if releases not in [one for one, _ in found]]
        reasons = [TRAITS[trait] for trait in traits if any(trait in releases.fails for releases in lost)]
        if lost and reasons:
            do = f"Use {found[-1][0].commits[-1]}." if found else "Use transformers."
            if not found and kind == PTH and (other := working(FOLDER, traits)):
                do = f"Use a folder, with {other[-1][0].commits[-1]}."
            what = f"{' and '.join(reasons)}: fails in {', '.join(releases.name for releases in lost)}"
            self.add(what, do, where="RWKV-Infer", blocks=not found)
        return tuple(f"{releases.name}: {' or '.join(strategies)}" for releases, strategies in found)

    def _infer_tensors(self) -> None:
        """What RWKV-Infer asks of the tensors, whatever file they are in."""
        plan, kinds = self.plan, layer_kinds(self.plan)
        for layer in [layer for layer, kind in kinds.items() if kind == "rwkv" and self.variant == "hxa079"]:
            prefix = mixer_prefix(layer)
            bonus = plan.get(f"{prefix}r_k")
            if bonus is None or len(bonus.shape) != 2:
                what = f"r_k {'is missing' if bonus is None else f'has shape {bonus.shape}'}"
                do = "Convert again with hxaconv."
                self.add(f"{what}: (heads, head_dim) are read off it", do, where=f"{prefix}r_k")
            missing = [name for name in RANKS if f"{prefix}{name}" not in plan]
            if missing:
                self.add(f"{', '.join(missing)} missing", "This is not hxa079.", where=prefix.removesuffix("."))
        if kinds.get(0) == "gqa":
            what = "the engine takes v_first from the first RWKV layer, the published trainer mixes in zeros"
            self.add(f"layer 0 is GQA: {what}", "Choose other layers with `hxaconv pick-gqa-layers`.", where="layer 0")
        size = plan[EMBEDDING].shape[1] if EMBEDDING in plan else None
        if size is None:
            what = "the embedding is missing: only attention is stored"
            self.add(what, "Convert it with --teacher, which has the rest.")
        elif size % PADDING:
            what = f"hidden_size {size} is no multiple of {PADDING}: MLP weights are padded on loading and do not fit"
            self.add(what, "Nothing: this teacher's size does not run there.", where=EMBEDDING)
        matrices = [name for name, recipe in plan.items() if name.endswith(".weight") and len(recipe.shape) == 2]
        other = [name for name in matrices if plan[name].dtype != "BF16"]
        if other:
            dtypes = ", ".join(sorted({plan[name].dtype for name in other}))
            what = f"{len(other)} of {len(matrices)} matrices are {dtypes}: the engine multiplies bf16"
            self.add(what, "Convert with --dtype bfloat16.", where=other[0])
        ends = ("output.bias", "o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")
        dropped = [name for name in plan if name.endswith(ends)]
        if dropped:
            what = f"{len(dropped)} biases of attention outputs or MLPs, which the engine drops silently"
            self.add(what, "Use transformers: the engine would compute another model.", where=dropped[0])
