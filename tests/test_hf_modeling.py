"""The modelling code of Hugging Face folders, as users meet it: loaded from a folder with trust_remote_code.

Runs under any installed transformers from 4.51 on; `tests/hf_matrix.sh` repeats it under several.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import shutil
import socket
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

from hxaconv.model.architecture import expected_tensors  # noqa: E402
from hxaconv.model.config import StudentConfig, state_bytes  # noqa: E402
from hxaconv.model.hf import modeling_hxa079 as code  # noqa: E402
from hxaconv.model.hf.configuration_hxa079 import AUTO_MAP, REQUIRED, Hxa079Config  # noqa: E402
from hxaconv.model.variants import hxa079  # noqa: E402
from hxaconv.save.documents import student_json  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
CASES = ("reka_tiny", "reka_tiny_init", "qwen3_tiny")
CODE_FILES = ("configuration_hxa079.py", "modeling_hxa079.py")
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
DTYPE_KEY = "torch_dtype" if VERSION < (4, 56) else "dtype"
FROM_TEACHER = (
    *("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "hidden_act"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "use_cache", "torch_dtype"),
)

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def isolated(modules_cache: None) -> Iterator[None]:
    """No network; transformers' copies of the modelling code go to a temporary place."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a folder must load without network access")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


def config_of(case: str) -> dict[str, Any]:
    facts = json.loads((GOLDEN / case / "case.json").read_text())
    teacher = json.loads((GOLDEN / case / "teacher" / "config.json").read_text())
    gqa = facts["gqa_layers"]
    return {key: teacher[key] for key in FROM_TEACHER} | {
        "architectures": ["Hxa079ForCausalLM"],
        "model_type": "hxa079",
        "auto_map": AUTO_MAP,
        "dtype": teacher["torch_dtype"],
        "rope_parameters": {"rope_type": "default", "rope_theta": teacher["rope_theta"]},
        "rwkv_architecture": "hxa079",
        "transformer_layers": gqa,
        "rwkv_layers": [i for i in range(facts["n_layer"]) if i not in gqa],
        "lora_rank_decay": 256,
        "lora_rank_iclr": 32,
        "lora_rank_value_residual_mix": 32,
        "lora_rank_key_residual_mix": 32,
        "lora_rank_gate": 256,
        "enable_qk_norm": facts["qk_norm"],
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "nope_in_transformer": True,
        "nope_in_rwkv": False,
    }


def make_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in CODE_FILES:
        shutil.copy(Path(code.__file__).with_name(name), folder)
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("folders")

    @functools.cache
    def make(case: str) -> Path:
        return make_folder(root / case, config_of(case), load_file(GOLDEN / case / "student_hf" / "model.safetensors"))

    return make


def load(folder: Path, dtype: Any = torch.float32, auto: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    loaded, info = auto.from_pretrained(
        str(folder), trust_remote_code=True, output_loading_info=True, **{DTYPE_KEY: dtype}, **kwargs
    )
    if auto is AutoModelForCausalLM:
        assert not any(info.values()), info  # missing, unexpected, mismatched, errors
    return loaded


@pytest.fixture(params=("reka_tiny", "qwen3_tiny"))
def model(request: pytest.FixtureRequest, folder_of: Callable[[str], Path]) -> Any:
    return load(folder_of(request.param))


@pytest.fixture
def reka(folder_of: Callable[[str], Path]) -> Any:
    return load(folder_of("reka_tiny"))


def ids(rows: int = 2, tokens: int = 40, seed: int = 0) -> Any:
    return torch.randint(1, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def distance(one: Any, other: Any) -> float:
    return float((one.detach().double() - other.detach().double()).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_logits_and_hidden_states_are_golden(case: str, folder_of: Callable[[str], Path]) -> None:
    golden = load_file(GOLDEN / case / "expected.safetensors")
    model = load(folder_of(case))
    with torch.no_grad():
        out = model(golden["input_ids"], output_hidden_states=True)
        # float32 against float64; logits are of size 2.
        assert distance(out.logits, golden["student_logits"]) < 2e-5
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        for i, hidden in enumerate(golden["student_hidden"][:-1], start=1):
            assert distance(out.hidden_states[i], hidden) < 2e-5
        normed = model.model.norm(golden["student_hidden"][-1].float())
        assert distance(out.hidden_states[-1], normed) < 2e-5

        shifted = model(golden["input_ids"], position_ids=torch.arange(1, 34)[None]).logits
        # Decays per channel make RoPE absolute, if weakly.
        assert distance(shifted, golden["student_logits"]) > 2e-4
        for name, parameter in model.named_parameters():
            if name.endswith(".k0"):
                parameter.fill_(-100.0)  # k_first is mixed in no more
        assert distance(model(golden["input_ids"]).logits, golden["student_logits"]) > 1e-3


def recurrence_inputs(tokens: int, size: int, dtype: Any, decay: float = 0.0, rows: int = 2) -> list[Any]:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    shape = (rows, tokens, 3, size)
    r, k, v = draw(shape), draw(shape), draw(shape)
    log_neg_log_decay = -torch.nn.functional.softplus(-(draw(shape) + decay)) - 0.5
    iclr = torch.sigmoid(draw(shape))
    kk = torch.nn.functional.normalize(k, dim=-1)
    k = k * (1 - log_neg_log_decay + iclr)
    state = draw(rows, 3, size, size)
    return [x.to(dtype) for x in (r, -log_neg_log_decay.exp(), k, v, -kk, kk * iclr, state)]


@pytest.mark.parametrize("decay", [-6.0, 0.0, 30.0])  # hardly any, mixed, the strongest that is possible
@pytest.mark.parametrize(("tokens", "size"), [(2, 12), (31, 12), (32, 5), (33, 96), (129, 12)])
def test_chunked_recurrence_is_the_loop(tokens: int, size: int, decay: float) -> None:
    exact = recurrence_inputs(tokens, size, torch.float64, decay)
    expected, state = code.wkv_loop(*exact)
    for chunk in (16, code.CHUNK, 128):
        y, last = code.wkv_chunked(*exact, chunk=chunk)
        assert distance(y, expected) < 1e-11 * float(expected.abs().max())
        assert distance(last, state) < 1e-11 * float(state.abs().max())
    y, last = code.wkv_chunked(*recurrence_inputs(tokens, size, torch.float32, decay))
    assert distance(y, expected) < 2e-6 * float(expected.abs().max())  # ten roundings of float32
    assert distance(last, state) < 2e-6 * float(state.abs().max())

    r, log_decay, k, v, a, b, start = exact
    for wrong in ([r, log_decay, k, v, a, -b, start], [r, 0 * log_decay, k, v, a, b, start]):
        assert distance(code.wkv_chunked(*wrong)[0], expected) > 1e-3 * float(expected.abs().max())


STARTS = torch.zeros(2, 129, dtype=torch.bool)
STARTS[0, [0, 3, 31, 32, 33, 70]] = STARTS[1, [1, 128]] = True  # within, at and across the bounds of chunks


@pytest.mark.parametrize("chunk", [16, 32, 128])
def test_packed_recurrence_begins_anew(chunk: int) -> None:
    inputs = recurrence_inputs(129, 12, torch.float64)
    for row in range(2):
        *tokens, state = (x[row : row + 1] for x in inputs)
        bounds = [0, *STARTS[row].nonzero().flatten().tolist(), 129]
        expected = []
        for begin, end in itertools.pairwise(bounds):
            state = torch.zeros_like(state) if begin or STARTS[row, 0] else state
            if end > begin:
                y, state = code.wkv_loop(*(x[:, begin:end] for x in tokens), state)
                expected.append(y)
        alone = torch.cat(expected, 1)
        forms = (code.wkv_loop, functools.partial(code.wkv_chunked, chunk=chunk))
        for form in forms:
            y, last = form(*inputs, starts=STARTS)
            assert distance(y[row : row + 1], alone) < 1e-11 * float(alone.abs().max())
            assert distance(last[row : row + 1], state) < 1e-11 * float(state.abs().max())
            assert distance(form(*inputs)[0][row : row + 1], alone) > 1e-2  # one sequence after the other


@pytest.mark.parametrize(("tokens", "starts"), [(70, None), (129, STARTS)], ids=["one sequence", "packed"])
def test_chunked_recurrence_has_the_gradients_of_the_loop(tokens: int, starts: Any) -> None:
    gradients = []
    for form in (code.wkv_loop, code.wkv_chunked):
        inputs = [x.requires_grad_() for x in recurrence_inputs(tokens, 8, torch.float64)]
        y, state = form(*inputs, starts=starts)
        (y.sin().sum() + state.cos().sum()).backward()
        gradients.append([x.grad for x in inputs])
    for one, other in zip(*gradients, strict=True):
        assert distance(one, other) < 1e-10 * float(one.abs().max())
    # Packed, row 0 starts anew at once: its state has no part.
    assert (distance(gradients[0][6][0], torch.zeros(())) == 0) == (starts is not None)
    assert distance(gradients[0][6][1], torch.zeros(())) > 0


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


def test_chunked_recurrence_never_holds_a_state_per_token() -> None:
    tokens, size, heads = 320, 48, 3
    inputs = recurrence_inputs(tokens, size, torch.float32, rows=1)
    with LargestTensor() as seen:
        code.wkv_chunked(*inputs)
    assert seen.numel <= 2 * tokens * heads * size
    with LargestTensor() as naive:
        inputs[3][..., None] * inputs[2][..., None, :]  # v k^T for all tokens
    assert naive.numel == size * tokens * heads * size


def test_long_inputs_go_through_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = recurrence_inputs(100, 12, torch.float64)
    expected, state = code.wkv_loop(*inputs)
    monkeypatch.setattr(code, "SEGMENT", 40)
    y, last = code.wkv(*inputs, dtype=torch.float64, use_fla=True)
    assert y.shape == expected.shape
    assert distance(y, expected) < 1e-10
    assert distance(last, state) < 1e-10
    packed = code.wkv_loop(*inputs, starts=STARTS[:, :100])[0]
    assert distance(code.wkv(*inputs, dtype=torch.float64, use_fla=True, starts=STARTS[:, :100])[0], packed) < 1e-10


def fake_fla_kernel(
    r: Any, w: Any, k: Any, v: Any, a: Any, b: Any, scale: float, initial_state: Any, output_final_state: bool
) -> tuple[Any, Any]:
    """The kernel's contract as a loop: w is the log of the decay, the state is [k, v], everything contiguous."""
    assert scale == 1.0
    assert output_final_state
    assert all(x.is_contiguous() for x in (r, w, k, v, a, b, initial_state))
    assert r.dtype == k.dtype == v.dtype == a.dtype == b.dtype == torch.bfloat16
    assert w.dtype == initial_state.dtype == torch.float32
    state, out = initial_state, []
    for t in range(r.shape[1]):
        delta = torch.einsum("bhk,bhkv->bhv", a[:, t].float(), state)
        state = state * w[:, t].exp()[..., None]
        state = state + b[:, t].float()[..., None] * delta[..., None, :]
        state = state + k[:, t].float()[..., None] * v[:, t].float()[..., None, :]
        out.append(torch.einsum("bhk,bhkv->bhv", r[:, t].float(), state))
    return torch.stack(out, 1).to(r.dtype), state


def fake_fla_kernel_of_packed_rows(cu_seqlens: Any = None, **inputs: Any) -> tuple[Any, Any]:
    """One row, a state per sequence, as the kernel has it where it is given bounds."""
    if cu_seqlens is None:
        return fake_fla_kernel(**inputs)
    fixed = ("scale", "initial_state", "output_final_state")
    tokens = {name: x for name, x in inputs.items() if name not in fixed}
    assert {len(x) for x in tokens.values()} == {1}
    assert len(inputs["initial_state"]) == len(cu_seqlens) - 1
    results = []
    for i, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        part = {name: x[:, begin:end].contiguous() for name, x in tokens.items()}
        settings = {name: inputs[name] for name in fixed} | {"initial_state": inputs["initial_state"][i : i + 1]}
        results.append(fake_fla_kernel(**part, **settings))
    return torch.cat([y for y, _ in results], 1), torch.cat([state for _, state in results])


def install_fla(patch: pytest.MonkeyPatch, kernel: Any) -> None:
    for name in ("fla", "fla.ops", "fla.ops.rwkv7"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        module.__path__ = []
        patch.setitem(sys.modules, name, module)
    sys.modules["fla.ops.rwkv7"].chunk_rwkv7 = kernel  # type: ignore[attr-defined]
    code.fla_kernel.cache_clear()


@pytest.fixture
def _fresh_fla() -> Iterator[None]:
    code.fla_kernel.cache_clear()
    yield
    code.fla_kernel.cache_clear()


@pytest.mark.usefixtures("_fresh_fla")
def test_fla_gets_its_arguments_right(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fla(monkeypatch, fake_fla_kernel)
    # Values that bfloat16 holds, so that only the output is rounded.
    inputs = [x.bfloat16().float() for x in recurrence_inputs(20, 12, torch.float32, decay=-6.0)]
    expected, state = code.wkv_loop(*inputs)
    y, last = code.wkv_fla(*inputs, dtype=torch.bfloat16)
    assert y.dtype == last.dtype == torch.float32
    assert distance(y, expected) < 2**-8 * float(expected.abs().max())
    assert distance(last, state) < 1e-5 * float(state.abs().max())
    inputs[6] = inputs[6].mT
    assert distance(code.wkv_fla(*inputs, dtype=torch.bfloat16)[1], state) > 0.1


@pytest.mark.usefixtures("_fresh_fla")
def test_fla_gets_the_bounds_of_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(r: Any, w: Any, k: Any, v: Any, a: Any, b: Any, cu_seqlens: Any = None, **fixed: Any) -> Any:
        return fake_fla_kernel_of_packed_rows(cu_seqlens, r=r, w=w, k=k, v=v, a=a, b=b, **fixed)

    install_fla(monkeypatch, kernel)
    assert code.fla_kernel(packed=True) is kernel
    inputs = [x.bfloat16().float() for x in recurrence_inputs(129, 12, torch.float32, decay=-6.0)]
    expected, state = code.wkv_loop(*inputs, starts=STARTS)
    y, last = code.wkv_fla(*inputs, starts=STARTS, dtype=torch.bfloat16)
    assert distance(y, expected) < 2**-8 * float(expected.abs().max())
    assert distance(last, state) < 1e-5 * float(state.abs().max())
    assert distance(code.wkv_fla(*inputs, dtype=torch.bfloat16)[0], expected) > 0.1
    install_fla(monkeypatch, fake_fla_kernel)
    assert code.fla_kernel(packed=False) is fake_fla_kernel
    assert code.fla_kernel(packed=True) is None


@pytest.mark.usefixtures("_fresh_fla")
def test_fla_is_used_only_where_it_can_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(r: Any, w: Any, k: Any, v: Any, a: Any, b: Any) -> None:
        raise AssertionError("called on a CPU")

    install_fla(monkeypatch, forbidden)
    assert code.fla_kernel(packed=False) is forbidden
    code.wkv(*recurrence_inputs(5, 4, torch.float32), dtype=torch.bfloat16, use_fla=True)
    install_fla(monkeypatch, lambda r, k, v, a, b, w=None, log_w=None: None)  # an older convention
    assert code.fla_kernel(packed=False) is None
    install_fla(monkeypatch, None)
    del sys.modules["fla.ops.rwkv7"].chunk_rwkv7
    assert code.fla_kernel(packed=False) is None


def test_pieces_with_the_cache_equal_one_run(model: Any) -> None:
    tokens = ids(2, 45)
    with torch.no_grad():
        whole = model(tokens, use_cache=False)
        assert whole.past_key_values is None
        cache, logits, start = None, [], 0
        for end in (7, 8, 41, 42, 43, 45):
            out = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, end
            logits.append(out.logits)
        # Chunk boundaries fall elsewhere: float32 rounding.
        assert distance(torch.cat(logits, 1), whole.logits) < 1e-5
        forgetful = model(tokens[:, 7:]).logits
        assert distance(forgetful, whole.logits[:, 7:]) > 1e-2


def test_cache_holds_states_in_float32_and_keys_of_gqa_layers_only(folder_of: Callable[[str], Path]) -> None:
    model = load(folder_of("reka_tiny"), torch.bfloat16)
    cache = model(ids(3, 11)).past_key_values
    config = model.config
    assert sorted(cache.keys_values) == config.transformer_layers == [2, 4]
    assert sorted(cache.states) == config.rwkv_layers == [0, 1, 3]
    for key, value in cache.keys_values.values():
        assert key.shape == value.shape == (3, config.num_key_value_heads, 11, config.head_dim)
        assert key.dtype == torch.bfloat16
    for state in cache.states.values():
        assert state.shape == (3, config.num_attention_heads, config.head_dim, config.head_dim)
        assert state.dtype == torch.float32
    assert cache.get_seq_length() == 11


def left_padded(lengths: tuple[int, ...], seed: int = 3) -> tuple[Any, Any]:
    longest = max(lengths)
    tokens, mask = ids(len(lengths), longest, seed), torch.ones(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, : longest - length] = 0
        mask[row, : longest - length] = 0
    return tokens, mask


@torch.no_grad()
def test_left_padded_rows_equal_single_runs(model: Any) -> None:
    tokens, mask = left_padded((37, 5, 1))
    batch = model(tokens, attention_mask=mask).logits
    unmasked = model(tokens).logits
    assert torch.isfinite(batch).all()
    for row, length in enumerate((37, 5, 1)):
        single = model(tokens[row : row + 1, -length:]).logits
        assert distance(batch[row, -length:], single[0]) < 1e-5
    assert distance(unmasked[1, -5:], batch[1, -5:]) > 1e-2


@torch.no_grad()
def test_right_padding_changes_nothing_before_it_and_continues_after_it(model: Any) -> None:
    tokens = ids(1, 30)
    mask = torch.ones(1, 30, dtype=torch.long)
    mask[0, 10:14] = 0
    real = torch.cat([tokens[:, :10], tokens[:, 14:]], 1)
    single, holed = model(real).logits, model(tokens, attention_mask=mask).logits
    assert distance(torch.cat([holed[:, :10], holed[:, 14:]], 1), single) < 1e-5


@torch.no_grad()
def test_the_cache_remembers_padding(model: Any) -> None:
    tokens, mask = left_padded((20, 6))
    full = model(tokens, attention_mask=mask).logits
    for second in (mask, mask[:, 15:], None):
        cache = model(tokens[:, :15], attention_mask=mask[:, :15], use_cache=True).past_key_values
        rest = model(tokens[:, 15:], attention_mask=second, past_key_values=cache).logits
        assert distance(rest, full[:, 15:]) < 1e-5
    cache.token_mask = None
    forgotten = model(tokens[:, 15:], past_key_values=model(tokens[:, :15], use_cache=True).past_key_values).logits
    assert distance(forgotten[1], full[1, 15:]) > 1e-2


LENGTHS = (1, 34, 7, 22)


def packed_row() -> tuple[Any, dict[str, dict[str, Any]]]:
    """64 tokens of several sequences, and what tells them apart, as transformers passes it."""
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None].int()
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 34, "max_length_k": 34}
    return ids(1, sum(LENGTHS)), {
        "position_ids": {"position_ids": positions},
        "from one": {"position_ids": positions + 1},
        "seq_idx": {"seq_idx": numbers},
        "cu_seq_lens": flash,
        "all": {"position_ids": positions, "seq_idx": numbers} | flash,
        "positions count on": {"position_ids": torch.arange(64)[None], "seq_idx": numbers},
        "a mask": {"position_ids": positions, "attention_mask": torch.ones(1, 64)},
    }


@torch.no_grad()
@pytest.mark.parametrize("key", list(packed_row()[1]))
def test_packed_sequences_do_not_see_each_other(model: Any, key: str) -> None:
    tokens, told = packed_row()
    first = 1 if key == "from one" else 0
    alone = [
        model(part, position_ids=torch.arange(first, first + part.shape[1])[None]).logits
        for part in tokens.split(LENGTHS, 1)
    ]
    expected = torch.cat(alone, 1)
    assert distance(model(tokens, **told[key]).logits, expected) < 1e-5
    assert distance(model(tokens).logits, expected) > 1e-2
    # With the cache: the second call goes on in the middle of a sequence, the third starts another.
    if "position_ids" in told[key] and len(told[key]) == 1:
        cache, outs = None, []
        for begin, end in ((0, 20), (20, 35), (35, 63), (63, 64)):
            out = model(
                tokens[:, begin:end],
                position_ids=told[key]["position_ids"][:, begin:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            outs.append(out.logits)
        assert distance(torch.cat(outs, 1), expected) < 1e-5


@torch.no_grad()
def test_packed_rows_may_be_several_and_padded(model: Any) -> None:
    a, b, c, d = (ids(1, n, seed=n) for n in (5, 9, 3, 6))
    pad = torch.zeros(1, 4, dtype=torch.long)
    rows = torch.cat([torch.cat([pad[:, :2], a, pad[:, :1], b], 1), torch.cat([c, d, pad, pad], 1)])
    count = [torch.arange(n)[None] for n in (5, 9, 3, 6)]
    for filler in (pad, pad - 1, pad + 9):
        top = torch.cat([filler[:, :2], count[0], filler[:, :1], count[1]], 1)
        positions = torch.cat([top, torch.cat([count[2], count[3], filler, filler], 1)])
        mask = torch.ones_like(rows)
        mask[0, [0, 1, 7]] = mask[1, 9:] = 0
        out = model(rows, attention_mask=mask, position_ids=positions, use_cache=True)
        for x, part in ((a, out.logits[:1, 2:7]), (b, out.logits[:1, 8:]), (c, out.logits[1:, :3])):
            assert distance(model(x).logits, part) < 1e-5
        assert distance(model(d).logits, out.logits[1:, 3:9]) < 1e-5
        # The last sequence of each row goes on.
        more = ids(2, 3, seed=1)
        going_on = model(more, past_key_values=out.past_key_values).logits
        for row, x in ((0, b), (1, d)):
            whole = model(torch.cat([x, more[row : row + 1]], 1)).logits
            assert distance(going_on[row], whole[0, -3:]) < 1e-5


def test_packed_training_has_the_gradients_of_single_sequences(model: Any) -> None:
    tokens, told = packed_row()
    labels = tokens.clone()
    labels[:, [0, *torch.tensor(LENGTHS).cumsum(0)[:-1].tolist()]] = -100

    def gradients(rows: list[tuple[Any, Any, dict[str, Any]]]) -> list[Any]:
        model.zero_grad()
        for x, y, how in rows:
            model(x, labels=y, num_items_in_batch=60, **how).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model.train()
    parts = zip(tokens.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True)
    alone = gradients([(x, y, {}) for x, y in parts if x.shape[1] > 1])
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        packed = gradients([(tokens, labels, told["position_ids"])])
        assert max(distance(one, other) for one, other in zip(packed, alone, strict=True)) < 1e-5
        leaking = gradients([(tokens, labels, {})])
        assert max(distance(one, other) for one, other in zip(leaking, alone, strict=True)) > 1e-3


@pytest.mark.skipif(VERSION < (4, 57), reason="its collator returns less")
def test_batches_of_the_flattening_collator(model: Any) -> None:
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    rows = [ids(1, n, seed=n)[0].tolist() for n in (12, 5, 20)]
    batch = collate([{"input_ids": row} for row in rows], return_tensors="pt")
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([row])).logits for row in rows], 1)
        assert distance(model(**batch).logits, alone) < 1e-5


def test_a_packed_prompt_goes_on_with_its_last_sequence(model: Any) -> None:
    tokens, told = packed_row()
    last = tokens[:, -LENGTHS[-1] :]
    settings = GREEDY | {"max_new_tokens": 12}
    expected = model.generate(last, attention_mask=torch.ones_like(last), **settings)[:, -12:].tolist()
    every = torch.ones_like(tokens)
    assert model.generate(tokens, attention_mask=every, **settings)[:, -12:].tolist() != expected
    names = ("position_ids", "seq_idx", "cu_seq_lens_q")
    for key in ("position_ids", "seq_idx", "cu_seq_lens"):
        how = {name: value for name, value in told[key].items() if name in names}
        ways: list[dict[str, Any]] = [{}, {"use_cache": False}]
        ways += [{"num_return_sequences": 2, "num_beams": 2}] if key == "position_ids" else []
        # Versions 4.53 to 4.57 put positions of their own in place of the given ones when they read in parts.
        ways += [{"prefill_chunk_size": 25}] if ((5, 0) if key == "position_ids" else (4, 53)) <= VERSION else []
        for way in ways:
            out = model.generate(tokens, attention_mask=every, **how, **settings, **way)
            if "num_beams" in way:
                beams = model.generate(last, attention_mask=torch.ones_like(last), **settings, **way)
                assert out[:, -12:].tolist() == beams[:, -12:].tolist()
            else:
                assert out[:, -12:].tolist() == expected
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        model(tokens, cu_seq_lens_q=torch.tensor([0, 3]))


GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def test_greedy_generation_with_and_without_cache(model: Any) -> None:
    prompt = ids(2, 9)
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, **GREEDY)
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, use_cache=False, **GREEDY)
    assert cached.tolist() == plain.tolist()
    tokens = prompt
    for _ in range(40):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert cached.tolist() == tokens.tolist()
    assert cached[0, 9:].tolist() != cached[1, 9:].tolist()


def test_left_padded_generation_equals_single_runs(model: Any) -> None:
    tokens, mask = left_padded((13, 4))
    batch = model.generate(tokens, attention_mask=mask, max_new_tokens=20, **GREEDY)
    for row, length in enumerate((13, 4)):
        alone = tokens[row : row + 1, -length:]
        single = model.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=20, **GREEDY)
        assert batch[row, 13:].tolist() == single[0, length:].tolist()
    assert model.generate(tokens, attention_mask=torch.ones_like(mask), max_new_tokens=20, **GREEDY)[1].tolist() != (
        batch[1].tolist()
    )


def test_sampling_is_reproducible_by_seed(reka: Any) -> None:
    def sample(seed: int, **kwargs: Any) -> list[list[int]]:
        torch.manual_seed(seed)
        prompt = ids(1, 6)
        settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "num_return_sequences": 3}
        out = reka.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=15, **(GREEDY | settings | kwargs)
        )
        return list(out.tolist())

    assert sample(1) == sample(1) == sample(1, use_cache=False)
    assert sample(1) != sample(2)


def test_beam_search_reorders_the_cache(reka: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, mask = left_padded((8, 5))
    settings = GREEDY | {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 15, "output_scores": True}
    settings |= {"return_dict_in_generate": True, "attention_mask": mask}
    cached, plain = reka.generate(tokens, **settings), reka.generate(tokens, use_cache=False, **settings)
    assert cached.sequences.tolist() == plain.sequences.tolist()
    assert distance(cached.sequences_scores, plain.sequences_scores) < 1e-5
    monkeypatch.setattr(type(cached.past_key_values), "reorder_cache", lambda *_: None)
    assert distance(reka.generate(tokens, **settings).sequences_scores, plain.sequences_scores) > 1e-3


@torch.no_grad()
def test_generation_goes_on_from_a_prepared_cache(model: Any) -> None:
    tokens = ids(1, 24)
    every = torch.ones_like(tokens)
    expected = model.generate(tokens, attention_mask=every, max_new_tokens=10, **GREEDY)
    prefix = model(tokens[:, :17], use_cache=True).past_key_values
    for _ in range(2):
        out = model.generate(
            tokens, attention_mask=every, past_key_values=copy.deepcopy(prefix), max_new_tokens=10, **GREEDY
        )
        assert out.tolist() == expected.tolist()
    prefix.batch_repeat_interleave(3)
    assert model(tokens[:, 17:].repeat(3, 1), past_key_values=prefix).logits.shape[:2] == (3, 7)
    assert prefix.get_seq_length() == 24
    with pytest.raises(ValueError, match="nothing is left to compute"):
        model.generate(tokens[:1], past_key_values=prefix, attention_mask=every, max_new_tokens=1, **GREEDY)


@pytest.mark.skipif(VERSION < (4, 53), reason="that version compiles every part, in one graph")
def test_long_prompts_may_be_read_in_parts(reka: Any) -> None:
    tokens, mask = left_padded((50, 20))
    for seen in (mask, torch.ones_like(mask)):  # recent versions drop a mask of ones
        settings = GREEDY | {"attention_mask": seen, "max_new_tokens": 10}
        parts = reka.generate(tokens, prefill_chunk_size=16, **settings)
        assert parts.tolist() == reka.generate(tokens, **settings).tolist()


def test_speculation_is_refused_because_a_state_cannot_be_rolled_back(reka: Any) -> None:
    with pytest.raises(ValueError, match="stateful"):
        reka.generate(ids(1, 20), max_new_tokens=5, prompt_lookup_num_tokens=3, **GREEDY)


def test_generation_from_embeddings(model: Any) -> None:
    tokens, mask = left_padded((12, 7))
    embeddings = model.get_input_embeddings()(tokens)
    expected = model.generate(tokens, attention_mask=mask, max_new_tokens=8, **GREEDY)[:, 12:]
    for use_cache in (True, False):
        out = model.generate(
            inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **GREEDY
        )
        assert out.tolist() == expected.tolist()


def test_forward_options(reka: Any) -> None:
    tokens, mask = left_padded((12, 7))
    with torch.no_grad():
        out = reka(tokens, attention_mask=mask, output_hidden_states=True)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        same = reka(inputs_embeds=reka.get_input_embeddings()(tokens), attention_mask=mask, position_ids=positions)
        assert torch.equal(out.logits, same.logits)
        assert same.hidden_states is None
        last = reka(tokens, attention_mask=mask, logits_to_keep=2).logits
        assert distance(last, out.logits[:, -2:]) < 1e-6
        logits, cache = reka(tokens, attention_mask=mask, use_cache=True, return_dict=False)
        assert torch.equal(logits, out.logits)
        assert cache.get_seq_length() == 12
        reka.config.output_hidden_states = True
        assert len(reka(tokens).hidden_states) == 6
    for arguments, message in (
        ({}, "exactly one"),
        ({"input_ids": tokens, "inputs_embeds": tokens}, "exactly one"),
        ({"input_ids": tokens, "output_attentions": True}, "no attention maps"),
        ({"input_ids": tokens, "attention_mask": mask[:, :5]}, r"expected \(2, 12\)"),
        ({"input_ids": tokens, "attention_mask": mask[:, None, None]}, "attention_mask has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            reka(**arguments)
    with pytest.raises(TypeError, match="Hxa079Cache"):
        reka(tokens, past_key_values=transformers.DynamicCache())
    with pytest.raises(NotImplementedError, match="cannot be cut back"):
        cache.crop(3)


def gradients(model: Any, tokens: Any) -> dict[str, Any]:
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_reach_everything_that_takes_part(model: Any) -> None:
    model.train()
    tokens = ids(2, 40)
    found = gradients(model, tokens)
    # The first RWKV layer has nothing to mix in: its v0..v2 and k0..k2 exist and are read by nobody.
    first = min(model.config.rwkv_layers)
    idle = {f"model.layers.{first}.self_attn.{letter}{n}" for letter in "vk" for n in range(3)}
    silent = {name for name, grad in found.items() if grad is None or not grad.abs().max() > 0}
    assert silent == idle
    assert all(torch.isfinite(grad).all() for grad in found.values() if grad is not None)


@pytest.mark.parametrize("gqa", [[], [0], [0, 1, 2]])
def test_unusual_layer_maps(gqa: list[int]) -> None:
    torch.manual_seed(0)
    model = code.Hxa079ForCausalLM(tiny_config(transformer_layers=gqa, initializer_range=0.3)).eval()
    tokens, mask = left_padded((12, 7))
    settings = GREEDY | {"attention_mask": mask, "max_new_tokens": 8}
    assert model.generate(tokens, **settings).tolist() == model.generate(tokens, use_cache=False, **settings).tolist()
    before = model(tokens).logits
    for layer in {0, 1, 2} - set(gqa):
        with torch.no_grad():
            model.model.layers[layer].self_attn.k0.fill_(5.0)
        # The first RWKV layer takes its own v and k, whether or not it is layer 0.
        assert torch.equal(model(tokens).logits, before) == (layer == min({0, 1, 2} - set(gqa)))


def test_loss_is_shifted_cross_entropy(reka: Any) -> None:
    tokens, mask = left_padded((12, 7))
    labels = tokens.masked_fill(mask == 0, -100)
    out = reka(tokens, attention_mask=mask, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert distance(out.loss, expected) < 1e-6
    summed = reka(tokens, attention_mask=mask, labels=labels, num_items_in_batch=2).loss
    counted = (labels[:, 1:] != -100).sum()
    assert distance(summed, expected * counted / 2) < 1e-4


def test_a_training_step_lowers_the_loss(model: Any) -> None:
    model.train()
    tokens = ids(2, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(model: Any, use_reentrant: bool) -> None:
    model.train()
    tokens = ids(1, 40)
    plain = gradients(model, tokens)
    calls: list[int] = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed = gradients(model, tokens)
    assert len(calls) == 2  # once forward, once again for backward
    for name, grad in plain.items():
        if grad is None:
            assert checkpointed[name] is None or not checkpointed[name].any()
        else:
            assert distance(grad, checkpointed[name]) <= 1e-6 * float(grad.abs().max()), name


def test_autocast_leaves_the_recurrence_in_float32(reka: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    module = sys.modules[type(reka).__module__]
    original = module.wkv_chunked

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append((args[0] @ args[0].mT).dtype)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "wkv_chunked", watched)
    tokens = ids(2, 40)
    exact = reka(tokens).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loose = reka(tokens, labels=tokens)
    loose.loss.backward()
    assert set(seen) == {torch.float32}
    assert distance(loose.logits, exact) < 0.2  # bfloat16 elsewhere: 8 bits on logits of size 2
    assert all(torch.isfinite(p.grad).all() for p in reka.parameters() if p.grad is not None)


def test_trainer_runs(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[],
        save_strategy="no", use_cpu=True, gradient_checkpointing=True, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids(1, 20).repeat(6, 1)]
    trainer = transformers.Trainer(model=load(folder_of("reka_tiny")), args=settings, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["reka_tiny", "qwen3_tiny"])
def test_half_precision(case: str, dtype: Any, folder_of: Callable[[str], Path]) -> None:
    tokens, mask = left_padded((40, 11))
    model = load(folder_of(case), dtype)
    assert {x.dtype for x in model.state_dict().values()} == {dtype}
    with torch.no_grad():
        half = model(tokens, attention_mask=mask).logits
        exact = load(folder_of(case))(tokens, attention_mask=mask).logits
    assert half.dtype == dtype
    assert torch.isfinite(half).all()
    # Five layers of rounding to 8 (bfloat16) or 11 bits; logits are of size 2.
    assert distance(half[mask == 1], exact[mask == 1]) < (0.25 if dtype == torch.bfloat16 else 0.03)
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=5, **GREEDY)
    assert out.shape == (2, 45)
    model.train()
    assert all(torch.isfinite(g).all() for g in gradients(model, tokens).values() if g is not None)


def test_loading_and_saving_are_quiet_and_keep_the_dtype_of_the_config(
    folder_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.warning_once.cache_clear()
    folder = str(folder_of("reka_tiny"))
    automatic = {DTYPE_KEY: "auto"} if VERSION < (5, 0) else {}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **automatic)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    tokens, mask = left_padded((12, 7))
    model.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert not [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"]


def test_device_map(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    tokens, mask = left_padded((12, 7))
    expected = load(folder_of("qwen3_tiny")).generate(tokens, attention_mask=mask, max_new_tokens=6, **GREEDY)
    layers = {f"model.layers.{i}": "disk" if i in (0, 1, 3) else "cpu" for i in range(4)}
    split = layers | {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    for device_map in ("auto", split):
        model = load(folder_of("qwen3_tiny"), device_map=device_map, offload_folder=str(tmp_path / "offload"))
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=6, **GREEDY)
        assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("case", ["reka_tiny", "qwen3_tiny"])
def test_save_pretrained_round_trip(case: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    source, once, twice = folder_of(case), tmp_path / "once", tmp_path / "twice"
    load(source, torch.bfloat16).save_pretrained(once)
    load(once, torch.bfloat16).save_pretrained(twice, max_shard_size="60KB")
    shards = sorted(twice.glob("*.safetensors"))
    assert len(shards) > 1
    before = load_file(source / "model.safetensors")
    for after in (load_file(once / "model.safetensors"), {k: v for f in shards for k, v in load_file(f).items()}):
        assert set(after) == set(before)
        for name, tensor in before.items():
            assert after[name].dtype == tensor.dtype == torch.bfloat16
            assert after[name].shape == tensor.shape, name  # r_k stays (H, N), records stay 0-dim
            assert torch.equal(after[name].view(torch.int16), tensor.view(torch.int16)), name
    original = config_of(case)
    for folder in (once, twice):
        saved = json.loads((folder / "config.json").read_text())
        for key in (*REQUIRED, *original):
            assert saved.get(key) == original[key], key
        for name in CODE_FILES:
            assert (folder / name).read_bytes() == (source / name).read_bytes()
    tokens = ids()
    assert torch.equal(load(twice)(tokens).logits, load(source)(tokens).logits)


def test_tied_head_is_one_tensor(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = folder_of("qwen3_tiny")
    tensors = load_file(source / "model.safetensors")
    assert "lm_head.weight" not in tensors
    model = load(source)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # As an RWKV .pth converted without tying would be: the same tensor under both names.
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    both = load(make_folder(tmp_path / "both", config_of("qwen3_tiny"), tensors))
    assert torch.equal(both.lm_head.weight, both.model.embed_tokens.weight)  # 5.0 keeps two copies


def test_layer_records_are_optional(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    records = ("layer_architecture", "head_size_record")
    tensors = load_file(folder_of("reka_tiny") / "model.safetensors")
    bare = {name: tensor for name, tensor in tensors.items() if not name.endswith(records)}
    assert len(bare) == len(tensors) - 6
    folder = make_folder(tmp_path / "bare", config_of("reka_tiny") | {"has_layer_records": False}, bare)
    model = load(folder, torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(bare)
    tokens = ids()
    assert torch.equal(load(folder)(tokens).logits, load(folder_of("reka_tiny"))(tokens).logits)
    wrong = make_folder(tmp_path / "wrong", config_of("reka_tiny"), bare)
    with pytest.raises(AssertionError, match="layer_architecture"):
        load(wrong)


REKA = {
    "num_hidden_layers": 44,
    "hidden_size": 6144,
    "intermediate_size": 19648,
    "vocab_size": 100352,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 8e6,
    "tie_word_embeddings": False,
}


def student(**changes: Any) -> StudentConfig:
    facts = REKA | {"gqa_layers": (8, 15, 22, 29, 36, 43), "ranks": hxa079.ranks(6144)} | changes
    return StudentConfig(**facts)


def on_meta(config: StudentConfig) -> Any:
    document = student_json(config, {"eos_token_id": 100257}, "BF16")
    with torch.device("meta"):
        return code.Hxa079ForCausalLM(Hxa079Config.from_dict(document))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "layer_records": False, "num_hidden_layers": 3, "gqa_layers": (0,)},
        {"attention_bias": True, "qk_norm": True, "num_hidden_layers": 3, "gqa_layers": ()},
        {"output_bias": True, "mlp_bias": True, "num_attention_heads": 80, "num_hidden_layers": 3, "gqa_layers": (1,)},
    ],
)
def test_names_and_shapes_are_the_architecture(changes: dict[str, Any]) -> None:
    config = student(**changes)
    found = {name: tuple(tensor.shape) for name, tensor in on_meta(config).state_dict().items()}
    if config.tie_word_embeddings:
        del found["lm_head.weight"]
    assert found == expected_tensors(config)


def test_what_a_sequence_costs_at_the_size_of_reka_flash() -> None:
    model = on_meta(student()).bfloat16()
    cache = model(torch.zeros(1, 100, dtype=torch.long, device="meta"), use_cache=True).past_key_values
    per_token = sum(2 * key[0, :, 0].numel() * key.element_size() for key, _ in cache.keys_values.values())
    assert per_token == 6 * 2 * 8 * 96 * 2  # bytes in bfloat16; the teacher's 44 layers need 7.3 times as much
    assert sum(state.nbytes for state in cache.states.values()) == state_bytes(38, 64, 96) == 38 * 64 * 96 * 96 * 4


def test_base_model_loads_from_the_same_folder(folder_of: Callable[[str], Path]) -> None:
    base, model = load(folder_of("reka_tiny"), auto=AutoModel), load(folder_of("reka_tiny"))
    tokens = ids()
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def tiny_config(**changes: Any) -> Any:
    sizes = {"vocab_size": 258, "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 6}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "transformer_layers": [1], "rope_theta": 1e4}
    ranks = {"lora_rank_decay": 4, "lora_rank_iclr": 4, "lora_rank_gate": 4}
    return Hxa079Config(**(sizes | ranks | {"eos_token_id": 257, "pad_token_id": 257} | changes))


def test_config_round_trip_in_the_spelling_of_all_readers(tmp_path: Path) -> None:
    tiny_config(dtype="bfloat16", tie_word_embeddings=True).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {key: saved[key] for key in REQUIRED} == {
        "rwkv_architecture": "hxa079",
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }
    assert saved["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e4}
    assert saved["dtype"] == saved["torch_dtype"] == "bfloat16"
    assert saved["rwkv_layers"] == [0, 2]
    for name in CODE_FILES:
        shutil.copy(Path(code.__file__).with_name(name), tmp_path)
    again = AutoConfig.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert json.loads(again.to_json_string()) == saved
    again.auto_map = {key: f"someone/model--{value}" for key, value in AUTO_MAP.items()}  # as if from the Hub
    assert json.loads(again.to_json_string())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rwkv_architecture": "hxa078"}, "rwkv_architecture"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"nope_in_transformer": False}, "nope_in_transformer"),
        ({"nope_in_rwkv": True}, "nope_in_rwkv"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE"),
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear"}}, "lack some of"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "RoPE"),
        ({"transformer_layers": [3]}, "outside 0..2"),
        ({"rwkv_layers": [0, 1]}, "do not add up"),
        ({"num_key_value_heads": 3}, "multiple"),
    ],
)
def test_config_refuses_what_the_code_does_not_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_random_initialisation_is_usable(with_tokenizer: Path) -> None:
    config = AutoConfig.from_pretrained(str(with_tokenizer), trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    mixer = model.model.layers[0].self_attn
    assert (float(mixer.layer_architecture), float(mixer.head_size_record)) == (78.0, 6.0)
    assert mixer.k0.mean().item() == pytest.approx(0.73)
    tokens = ids(2, 50)
    assert torch.isfinite(model(tokens, labels=tokens).loss)


def save_byte_tokenizer(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "<sep>", "<|endoftext|>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left"
    )
    wrapped.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} <sep> {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    wrapped.save_pretrained(folder)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved from the class itself: the folder must load like any other."""
    folder = tmp_path_factory.mktemp("with_tokenizer")
    torch.manual_seed(0)
    code.Hxa079ForCausalLM(tiny_config(initializer_range=0.3)).save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


def test_the_usual_three_lines(with_tokenizer: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(with_tokenizer), trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(str(with_tokenizer), trust_remote_code=True)
    messages = [{"role": "user", "content": "Write a poem about large language models."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer([text, "short"], return_tensors="pt", padding=True)  # token_type_ids and all
    outputs = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert outputs.shape[1] <= inputs["input_ids"].shape[1] + 8
    assert isinstance(tokenizer.decode(outputs[0], skip_special_tokens=True), str)


def test_pipeline(with_tokenizer: Path) -> None:
    pipe = transformers.pipeline("text-generation", model=str(with_tokenizer), trust_remote_code=True, device="cpu")
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = pipe("Hello, world", **settings)[0]["generated_text"]
    assert expected.startswith("Hello, world")
    batched = pipe(["Hello, world", "A longer text to pad the other"], batch_size=2, **settings)
    assert batched[0][0]["generated_text"] == expected
    chat = pipe([{"role": "user", "content": "Who are you?"}], **settings)
    assert chat[0]["generated_text"][-1]["role"] == "assistant"
    ready = transformers.pipeline("text-generation", model=pipe.model, tokenizer=pipe.tokenizer)
    torch.manual_seed(0)
    sampled = ready("Hi", max_new_tokens=6, do_sample=True, temperature=0.7, top_k=50, top_p=0.95)
    assert sampled[0]["generated_text"].startswith("Hi")
