"""Calibration in one pass over the layers of a teacher, one layer's weights at a time.

Every layer is fitted on the teacher's own hidden states, so that layers are independent but for v_first and
k_first of the first RWKV layer. In memory: the residual stream, its normed copy and the attention's output,
(tokens, C) each, beside the weights of one attention or one MLP.

Several ranks divide the layers: each moves the teacher's stream through all of them, fits every so-manieth, and finds
the others' in the folder. The first RWKV layer is fitted by all ranks: waiting for it would take as long.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hxaconv import ranks
from hxaconv.calibration import attention, descent
from hxaconv.calibration.polish import return_large_blocks
from hxaconv.calibration.report import CalibrationReport, LayerReport, settings_of
from hxaconv.calibration.store import Store
from hxaconv.calibration.time_mix import Attention, LayerFit, RwkvLayer
from hxaconv.errors import HxaconvError, raise_all
from hxaconv.formats.dtypes import count_nonfinite
from hxaconv.forward import llama
from hxaconv.forward.pool import ROWS, float32_by_onednn
from hxaconv.forward.walk import First, Walk
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention, layer_index, mixer_prefix
from hxaconv.model.plan import Buffers, Plan, layer_bytes, total_bytes
from hxaconv.options import Fit
from hxaconv.progress import Progress, bar
from hxaconv.surgery.arithmetic import tensor, torch_dtype
from hxaconv.verification.claims import departures

TEACHER, STUDENT = "teacher", "student"
FEWEST_TO_VALIDATE = 8
"""Validation tokens that are needed to compare two fits."""
NONFINITE_HINT = (
    "The checkpoint is damaged, or its training diverged. --allow-nonfinite goes on: RWKV layers from there on"
    " keep the plain initialisation."
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The tensors that replace those of the plain initialisation, and how that went."""

    replaced: Plan
    """Canonical name -> recipe; a subset of the student's plan with the same shapes and dtypes."""
    report: CalibrationReport


def calibrate(
    teacher: Model,
    student: Model,
    ids: Tensor,
    settings: Fit | None = None,
    *,
    workers: int = 2,
    store: Store | None = None,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Fit the RWKV layers of an untrained student to its teacher on token ids (B, T).

    The last quarter of the tokens decides, layer by layer, between the fit and what the student holds.
    With a `store` in a folder, finished layers are kept there, an interrupted run goes on after them, ranks divide
    them, and the replaced tensors are read from there when they are written: it has to outlive the result. The
    result depends neither on the ranks nor on `workers`, the threads on a CPU.
    `allow_nonfinite` goes on after NaN: that layer and those after it keep what the student holds.

    Raises:
        HxaconvError: when the student is not the teacher's or has been trained, for ids that are not its tokens
            or too few; at the first layer that is not finite.
    """
    return_large_blocks()
    settings, store = settings or Fit(), store or Store(None)
    _check(teacher, student, ids)
    ids, warnings = cut(ids, settings.chunk)
    check_enough(ids)
    count, training = len(ids), training_tokens(ids)
    trained = int(training.sum())
    steps = descent.steps_of(settings.refine_steps, training)
    added = descent.spans(ids, training, steps)
    training = torch.cat([training, torch.ones(added.shape)]).to(settings.device)
    with ranks.together():
        if not allow_nonfinite and ranks.rank() == 0:
            _refuse_nonfinite(teacher, [name for name in teacher.plan if layer_index(name) is None])
        kept = _kept_stream(store, settings.device)
        if kept is None and ranks.rank() == 0:
            _check_origin(teacher, student, progress)
    layers = range(teacher.config.num_hidden_layers)
    sizes = [layer_bytes(teacher.plan, layer) for layer in layers]
    mine = {layer for layer in layers if store.folder is None or layer % ranks.world() == ranks.rank()}
    asked = mine | set(student.student.rwkv_layers[:1])
    mixers = {n: r for n, r in student.plan.items() if is_attention(n) and layer_index(n) in asked}
    models = {TEACHER: teacher, STUDENT: replace(student, plan=mixers)}
    with (
        ranks.together(),
        torch.no_grad(),
        float32_by_onednn(),
        bar(progress, "calibrating", sum(sizes) * (2 if len(added) else 1)) as advance,
        Walk(models, device=settings.device, workers=workers) as walk,
    ):
        if kept is None:
            if len(added):
                added = descent.rewritten(added, walk, TEACHER, lambda i: advance(sizes[i], "more text"))
            kept = 0, walk[TEACHER].start(torch.cat([ids, added])).x, None
        else:
            advance(sum(sizes) * bool(len(added)) + sum(sizes[: kept[0]]), "resumed")
        begin, x, first = kept
        for layer in walk.layers(layers[begin:]):
            one, name = _Layer(walk, layer, training, count, steps, settings, allow_nonfinite), _name(layer)
            seen = one.attention(x)
            if layer in asked and not (first and store.facts(name)):
                fit = one.fit(seen, first)
                first = fit.first or first if fit else first
                if layer in mine:
                    fitted = (
                        {mixer_prefix(layer) + key: value.cpu() for key, value in fit.tensors.items()} if fit else {}
                    )
                    store.save(name, fitted, {"report": asdict(fit.report) if fit else None, "tensors": [*fitted]})
            x = x + seen.with_bias
            del seen
            x = one.feed_forward(x)
            if layer in mine:
                handed = {} if first is None else {"v_first": first[0], "k_first": first[1]}
                store.save(f"stream-{ranks.rank()}", {"x": x, **handed}, {"layer": layer + 1})
            advance(sizes[layer], f"layer {layer}")
    return _collected(student, store, count * ids.shape[1], trained, settings, warnings)


def _name(layer: int) -> str:
    return f"layer-{layer:03d}"


def _kept_stream(store: Store, device: str) -> tuple[int, Tensor, First] | None:
    """Where an interrupted pass goes on: (next layer, stream before it, v_first and k_first), or None to start over.

    Of the ranks' streams the farthest that has nothing but finished layers behind it; ranks may be others now.
    """
    found: dict[int, str] = {}
    for path in store.folder.glob("stream-*.safetensors") if store.folder else ():
        facts = store.facts(path.stem)
        if facts is not None and all(store.facts(_name(layer)) is not None for layer in range(facts["layer"])):
            found[facts["layer"]] = path.stem
    kept = store.load(found[max(found)], device) if found else None
    if kept is None:
        return None
    tensors = kept[0]
    first = (tensors["v_first"], tensors["k_first"]) if "v_first" in tensors else None
    return kept[1]["layer"], tensors["x"], first


def _collected(
    student: Model, store: Store, tokens: int, fitted: int, settings: Fit, warnings: tuple[str, ...]
) -> Calibration:
    """What all layers came to."""
    plan: Plan = {}
    reports = []
    for layer in range(student.config.num_hidden_layers):
        facts: dict[str, Any] = store.facts(_name(layer)) or {"report": None, "tensors": ()}
        if facts["report"] is not None:
            lists = {name: tuple(facts["report"][name]) for name in ("decay", "iclr", "warnings")}
            reports.append(LayerReport(**facts["report"] | lists))
        plan |= {name: store.recipe(_name(layer), name, student.plan[name], "calibrated") for name in facts["tensors"]}
    report = CalibrationReport(
        tokens=tokens,
        fitted_tokens=fitted,
        settings=settings_of(settings),
        layers=tuple(reports),
        warnings=warnings,
    )
    return Calibration(plan, report)


def cut(ids: Tensor, chunk: int) -> tuple[Tensor, tuple[str, ...]]:
    """Rows longer than the chunk in equal parts; (ids, warnings)."""
    parts = -(-ids.shape[1] // chunk)
    length = ids.shape[1] // parts
    lost = ids.shape[1] - parts * length
    ids = ids[:, : parts * length].reshape(-1, length)
    return ids, (f"{lost} tokens at the end of each row are left out: {parts} equal parts",) if lost else ()


def training_tokens(ids: Tensor) -> Tensor:
    """1.0 for the first three quarters of all tokens, row after row, 0.0 for the validation tokens, (B, T)."""
    count = ids.numel()
    return (torch.arange(count) < count * 3 // 4).float().view(ids.shape)


def check_enough(ids: Tensor) -> None:
    """Refuse token ids (B, T) of which too few are left to validate a fit.

    Raises:
        HxaconvError: with how many are needed.
    """
    total, fitted = ids.numel(), int(training_tokens(ids).sum())
    if total - fitted < FEWEST_TO_VALIDATE:
        raise HxaconvError(
            f"{total} calibration {'token is' if total == 1 else 'tokens are'} too few: after the first three quarters,"
            f" which are fitted, {total - fitted} would validate the fit, and {FEWEST_TO_VALIDATE} are needed",
            hint=f"{4 * FEWEST_TO_VALIDATE} tokens are the least; a thousand of real text are a good start.",
        )


def check_sizes(teacher: Model, student: Model) -> None:
    """Refuse two models that do not belong together, without reading a weight.

    Raises:
        HxaconvError: listing the sizes that differ.
    """
    problems = []
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    for name in names:
        wanted, found = getattr(teacher.config, name), getattr(student.config, name)
        if wanted != found:
            problems.append(f"{name} is {found} in {student.label}, {wanted} in {teacher.label}")
    raise_all("student and teacher do not belong together:", problems)


def _check(teacher: Model, student: Model, ids: Tensor) -> None:
    check_sizes(teacher, student)
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise HxaconvError(f"token ids of shape {tuple(ids.shape)} and {ids.dtype}: rows of whole numbers are needed")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= teacher.config.vocab_size:
        raise HxaconvError(
            f"token ids from {low} to {high}, but {teacher.label} has {teacher.config.vocab_size} tokens",
            hint="Were they made by another tokenizer?",
        )


def _check_origin(teacher: Model, student: Model, progress: Progress | None) -> None:
    """Refuse a student that `init-from-teacher` would not make of this teacher."""
    problems: list[str] = []
    with bar(progress, "comparing student and teacher", total_bytes(student.plan)) as advance:
        for layer in (None, *range(student.config.num_hidden_layers)):
            part = {name: recipe for name, recipe in student.plan.items() if layer_index(name) == layer}
            model = replace(student, plan=part)
            problems += [f"{name} is not {expected}" for name, expected in departures(model, teacher).items()]
            advance(total_bytes(part), "")
    raise_all(
        f"{student.label} is not what init-from-teacher makes of {teacher.label}: of {len(student.plan)} tensors,"
        f" {len(problems)} are not as it writes them:",
        problems,
        hint="Calibration takes an untrained student, since it would undo training, and the teacher it was made of.",
    )


def _refuse_nonfinite(model: Model, names: Iterable[str], summary: str = "its weights are not finite") -> None:
    problems = []
    for name in names:
        recipe, buffers = model.plan[name], Buffers()
        count = sum(count_nonfinite(chunk, recipe.dtype) for chunk in recipe.chunks(buffers))
        if count:
            problems.append(f"{name}: {count} of {recipe.numel} values are NaN or infinite")
    raise_all(f"{model.label}: {summary}:", problems, hint=NONFINITE_HINT)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of teacher and student, whose weights are at hand."""

    walk: Walk
    layer: int
    training: Tensor
    text: int
    """How many sequences are text; those after them are made of it."""
    steps: int
    """Of `descent`."""
    settings: Fit
    allow_nonfinite: bool

    def attention(self, x: Tensor) -> Attention:
        """The teacher's attention on its residual stream (B, T, C)."""
        teacher, pool = self.walk[TEACHER], self.walk.pool
        config, weights = teacher.config, self._mixer(TEACHER)
        normed = teacher.normed(x, self.layer)
        rope = self.layer not in config.nope_layers
        projected, matrix = attention.project(normed, weights, config, pool.linear), weights["o_proj.weight"]
        heads = attention.attend(projected, config, pool, rope=rope)
        output = pool.linear(heads, matrix)
        self._check_finite(output)
        alone = None if self.layer else pool.linear(attention.values(projected), matrix)
        return Attention(normed, heads, output, matrix, weights.get("o_proj.bias"), self.training, alone)

    def fit(self, seen: Attention, first: First) -> LayerFit | None:
        """The student's layer fitted to it; None where there is nothing to fit."""
        student, pool = self.walk[STUDENT].model, self.walk.pool
        config, rwkv = student.student, student.student.layer_kind(self.layer) == "rwkv"
        if not rwkv and (self.layer in self.walk[TEACHER].config.nope_layers or not self.steps):
            return None  # there is no RoPE to lose, or nothing is trained
        mixer, prefix = self._mixer(STUDENT), mixer_prefix(self.layer)
        dtypes = {name: torch_dtype(student.plan[prefix + name].dtype) for name in mixer}
        if not rwkv:
            return attention.fit_kept(seen, self.text, mixer, dtypes, config, self.layer, self.steps, pool)
        return RwkvLayer(
            seen, self.text, mixer, dtypes, first, config, self.layer, self.steps, self.settings, pool
        ).fit()

    def feed_forward(self, x: Tensor) -> Tensor:
        """The teacher's residual stream, moved through the second half of the layer."""
        config, layer = self.walk[TEACHER].config, self.layer
        mlp = {name: self._whole(TEACHER, name) for name in self.walk.held(TEACHER) if not is_attention(name)}

        def get(name: str) -> Tensor:
            return mlp[name] if name in mlp else self._whole(TEACHER, name)

        # An expert is read once for all tokens that go to it.
        tokens = x.flatten(0, 1)[None]
        chunks = torch.split(tokens, tokens.shape[1] if config.has_experts(layer) else ROWS, dim=1)
        moved = self.walk.pool.map(lambda chunk: llama.feed_forward(chunk, get, config, layer), chunks)
        x = torch.cat(moved, dim=1).view_as(x)
        self._check_finite(x)
        return x

    def _check_finite(self, values: Tensor) -> None:
        """Stop at the first layer whose hidden states are not finite, with the weights that made them so."""
        if self.allow_nonfinite or bool(torch.isfinite(values).all()):
            return
        teacher = self.walk[TEACHER].model
        names = [name for name in teacher.plan if layer_index(name) == self.layer]
        _refuse_nonfinite(teacher, names, f"layer {self.layer} is not finite")
        summary = f"the hidden states of layer {self.layer} are not finite, although its weights are"
        raise HxaconvError(f"{teacher.label}: {summary}", hint=NONFINITE_HINT)

    def _mixer(self, role: str) -> dict[str, Tensor]:
        """The layer's mixer by short name: `w0`, `key.weight`."""
        names = [name for name in self.walk.held(role) if name.startswith(mixer_prefix(self.layer))]
        return {name.partition(".self_attn.")[2]: self._whole(role, name) for name in names}

    def _whole(self, role: str, name: str) -> Tensor:
        """A weight in float32, in memory of its own."""
        held = self.walk.held(role).get(name)
        values = tensor(self.walk[role].model.plan[name]) if held is None else held.values
        return values.to(self.walk.device, torch.float32, copy=True)
