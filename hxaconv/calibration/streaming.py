"""Calibration in one pass over the layers of a teacher, one layer's weights at a time.

Every layer is fitted on the teacher's own hidden states, so that layers are independent but for v_first and
k_first of the first RWKV layer. In memory: the residual stream, its normed copy and the attention's output,
(tokens, C) each, beside the weights of one attention or one MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hxaconv.calibration import attention
from hxaconv.calibration.cache import Cache, Done, State
from hxaconv.calibration.report import CalibrationReport, Settings
from hxaconv.calibration.time_mix import Attention, Fit, fit_layer
from hxaconv.errors import HxaconvError, raise_all
from hxaconv.forward import llama
from hxaconv.forward.pool import ROWS
from hxaconv.forward.walk import Walk
from hxaconv.model.model import Model
from hxaconv.model.names import is_attention, layer_index, mixer_prefix
from hxaconv.model.plan import Buffers, Plan, Recipe, layer_bytes, total_bytes
from hxaconv.progress import Progress, bar
from hxaconv.save.checksums import count_nonfinite
from hxaconv.surgery.arithmetic import Computed, tensor, torch_dtype
from hxaconv.verification.claims import foreign_tensors, touched_tensors

TEACHER, STUDENT = "teacher", "student"
FEWEST_TO_JUDGE = 8
"""Held-out tokens without which nobody can say that a fit is better."""
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
    settings: Settings | None = None,
    *,
    cache: Cache | None = None,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Fit the RWKV layers of an untrained student to its teacher on token ids (B, T).

    The last quarter of the tokens decides, layer by layer, between the fit and what the student holds.
    With a `cache`, finished layers are kept there, an interrupted run goes on after them, and the
    replaced tensors are read from there when they are written: its folder has to outlive the result.
    `allow_nonfinite` goes on after NaN: that layer and those after it keep what the student holds.

    Raises:
        HxaconvError: when the student is not the teacher's or has been trained, for ids that are not its tokens
            or too few; at the first layer that is not finite.
    """
    settings = settings or Settings()
    _check(teacher, student, ids)
    ids, warnings = cut(ids, settings.chunk)
    check_enough(ids)
    fitted = fitted_tokens(ids).to(settings.device)
    total = sum(layer_bytes(teacher.plan, i) for i in range(teacher.config.num_hidden_layers))
    if not allow_nonfinite:
        _refuse_nonfinite(teacher, [name for name in teacher.plan if layer_index(name) is None])
    state = cache.load(settings.device) if cache is not None else None
    if state is None:
        _check_origin(teacher, student, progress)
    mixers = replace(student, plan={name: recipe for name, recipe in student.plan.items() if is_attention(name)})
    with (
        torch.no_grad(),
        bar(progress, "calibrating", total) as advance,
        Walk({TEACHER: teacher, STUDENT: mixers}, device=settings.device, workers=settings.workers) as walk,
    ):
        if state is None:
            state = State(0, walk[TEACHER].start(ids).x)
        if state.layer:
            advance(sum(layer_bytes(teacher.plan, i) for i in range(state.layer)), "resumed")
        step = _Step(walk, fitted, settings, allow_nonfinite)
        for _ in walk.layers(range(state.layer, teacher.config.num_hidden_layers)):
            fit = step.layer(state)
            prefix = mixer_prefix(state.layer)
            tensors = {prefix + name: values.cpu() for name, values in fit.tensors.items()} if fit else {}
            state.done.append(Done(state.layer, tensors, fit.report if fit else None))
            state.layer += 1
            if cache is not None:
                cache.save(state)
                # From now on they are read from their file.
                state.done[-1] = replace(state.done[-1], tensors={})
            advance(layer_bytes(teacher.plan, state.layer - 1), f"layer {state.layer - 1}")
    report = CalibrationReport(
        tokens=ids.numel(),
        fitted_tokens=int(fitted.sum()),
        settings=settings.of_result(),
        layers=tuple(done.report for done in state.done if done.report is not None),
        warnings=warnings,
    )
    return Calibration(_plan(student, state, cache), report)


def unfitted(ids: Tensor, settings: Settings) -> Calibration:
    """A calibration that fits no layer."""
    return Calibration(
        {}, CalibrationReport(tokens=ids.numel(), fitted_tokens=0, settings=settings.of_result(), layers=())
    )


def cut(ids: Tensor, chunk: int) -> tuple[Tensor, tuple[str, ...]]:
    """Rows longer than the chunk in equal pieces; (ids, warnings)."""
    pieces = -(-ids.shape[1] // chunk)
    length = ids.shape[1] // pieces
    lost = ids.shape[1] - pieces * length
    ids = ids[:, : pieces * length].reshape(-1, length)
    return ids, (f"{lost} tokens at the end of each row are left out: {pieces} equal pieces",) if lost else ()


def fitted_tokens(ids: Tensor) -> Tensor:
    """1.0 for the first three quarters of all tokens, row after row, 0.0 for the rest, (B, T)."""
    count = ids.numel()
    return (torch.arange(count) < count * 3 // 4).float().view(ids.shape)


def check_enough(ids: Tensor) -> None:
    """Refuse token ids (B, T) of which too few are left to judge a fit by.

    Raises:
        HxaconvError: with how many are needed.
    """
    total, fitted = ids.numel(), int(fitted_tokens(ids).sum())
    if total - fitted < FEWEST_TO_JUDGE:
        raise HxaconvError(
            f"{total} calibration {'token is' if total == 1 else 'tokens are'} too few: after the first three quarters,"
            f" which are fitted, {total - fitted} would judge the fit, and {FEWEST_TO_JUDGE} are needed",
            hint=f"{4 * FEWEST_TO_JUDGE} tokens are the least; a thousand of real text are a good start.",
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
            f"token ids from {low} to {high}, but {teacher.label} knows {teacher.config.vocab_size} tokens",
            hint="Were they made by another tokenizer?",
        )


def _check_origin(teacher: Model, student: Model, progress: Progress | None) -> None:
    """Refuse a student that `init-from-teacher` would not make of this teacher."""
    problems: list[str] = []
    with bar(progress, "comparing student and teacher", total_bytes(student.plan)) as advance:
        for layer in (None, *range(student.config.num_hidden_layers)):
            part = {name: recipe for name, recipe in student.plan.items() if layer_index(name) == layer}
            model = replace(student, plan=part)
            problems += [f"{name} is not {expected}" for name, expected in touched_tensors(model, teacher).items()]
            problems += [f"{name} is not the teacher's" for name in foreign_tensors(model, teacher)]
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
        count = sum(count_nonfinite(piece, recipe.dtype) for piece in recipe.pieces(buffers))
        if count:
            problems.append(f"{name}: {count} of {recipe.numel} values are NaN or infinite")
    raise_all(f"{model.label}: {summary}:", problems, hint=NONFINITE_HINT)


@dataclass(frozen=True, slots=True)
class _Step:
    """What is done with each layer."""

    walk: Walk
    fitted: Tensor
    settings: Settings
    allow_nonfinite: bool

    def layer(self, state: State) -> Fit | None:
        """Fit one layer and let the teacher's residual stream pass it."""
        teacher, layer, pool = self.walk[TEACHER], state.layer, self.walk.pool
        config = teacher.config
        weights = self._mixer(TEACHER, layer)
        x = teacher.normed(state.x, layer)
        rope = layer not in config.nope_layers
        heads = attention.attend(attention.project(x, weights, config, pool), config, pool, rope=rope)
        said = pool.linear(heads, weights["o_proj.weight"])
        self._check_finite(said, layer)
        bias = weights.get("o_proj.bias")
        seen = Attention(x, heads, said, weights["o_proj.weight"], bias, self.fitted)
        del weights, x, heads
        fit = self._fit(seen, state)
        del seen
        after = state.x + (said if bias is None else said + bias)
        mlp = {name: self._whole(TEACHER, name) for name in self.walk.held(TEACHER) if not is_attention(name)}

        def get(name: str) -> Tensor:
            return mlp[name] if name in mlp else self._whole(TEACHER, name)

        # An expert is read once for all tokens that go to it.
        tokens = after.flatten(0, 1)[None]
        pieces = torch.split(tokens, tokens.shape[1] if config.has_experts(layer) else ROWS, dim=1)
        moved = pool.map(lambda s: llama.feed_forward(s, get, config, layer), pieces)
        state.x = torch.cat(moved, dim=1).view_as(after)
        self._check_finite(state.x, layer)
        return fit

    def _fit(self, seen: Attention, state: State) -> Fit | None:
        student, layer = self.walk[STUDENT].model, state.layer
        config = student.student
        rwkv = config.layer_kind(layer) == "rwkv"
        mixer, prefix = self._mixer(STUDENT, layer), mixer_prefix(layer)
        dtypes = {name: torch_dtype(student.plan[prefix + name].dtype) for name in mixer}
        if not rwkv and layer in self.walk[TEACHER].config.nope_layers:
            return None  # there is no RoPE to lose
        if not rwkv:
            return attention.fit_kept(seen, mixer, dtypes, config, layer, self.walk.pool, fold=self.settings.fold_rope)
        fit = fit_layer(seen, mixer, dtypes, state.first, config, layer, self.settings, self.walk.pool)
        state.first = fit.first
        return fit

    def _check_finite(self, values: Tensor, layer: int) -> None:
        """Stop at the first layer whose hidden states are not finite, with the weights that made them so."""
        if self.allow_nonfinite or bool(torch.isfinite(values).all()):
            return
        teacher = self.walk[TEACHER].model
        names = [name for name in teacher.plan if layer_index(name) == layer]
        _refuse_nonfinite(teacher, names, f"layer {layer} is not finite")
        summary = f"the hidden states of layer {layer} are not finite, although its weights are"
        raise HxaconvError(f"{teacher.label}: {summary}", hint=NONFINITE_HINT)

    def _mixer(self, role: str, layer: int) -> dict[str, Tensor]:
        """One layer's mixer by short name: `w0`, `key.weight`."""
        names = [name for name in self.walk.held(role) if name.startswith(mixer_prefix(layer))]
        return {name.partition(".self_attn.")[2]: self._whole(role, name) for name in names}

    def _whole(self, role: str, name: str) -> Tensor:
        """A weight in float32, in memory of its own."""
        held = self.walk.held(role).get(name)
        values = tensor(self.walk[role].model.plan[name]) if held is None else held.values
        return values.to(self.walk.device, torch.float32, copy=True)


def _plan(student: Model, state: State, cache: Cache | None) -> Plan:
    plan: Plan = {}
    for done in state.done:
        for name in done.tensors or (cache.names(done.layer) if cache else ()):
            function = functools.partial(cache.read, done.layer, name) if cache else done.tensors[name].clone
            recipe = student.plan[name]
            make = Computed(function, recipe.dtype, "calibrated")
            plan[name] = Recipe(recipe.dtype, recipe.shape, make, f"calibrated from {recipe.origin}")
    return plan
