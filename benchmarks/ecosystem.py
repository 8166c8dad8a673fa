"""What the usual libraries do with a converted folder: each check is run, timed, and put into a table with versions.

    python -m venv eco && eco/bin/pip install torch transformers accelerate peft trl datasets optimum-quanto torchao \
        lm-eval mergekit -e .
    eco/bin/python benchmarks/ecosystem.py [--out TABLE.md] [CHECK ...]

The model is a student of the small teacher that this package ships, on a CPU, without network. A library that is not
installed is named as such. Every check compares with something: logits before and after, a loss that falls, a text.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch

PROJECTIONS = ["receptance", "key", "value", "output", "q_proj", "k_proj", "v_proj", "o_proj"]
TEXT = "The old man walked along the river and looked at the boats. He had been there every day of that summer. " * 4


def make_student(folder: Path) -> Path:
    """A student with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import hxaconv

    teacher = Path(hxaconv.__file__).parent / "commands" / "embedded" / "teacher"
    hxaconv.init_from_teacher(str(teacher), str(folder), gqa_layers="2,5")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0], pad_token=alphabet[1])
    fast.save_pretrained(folder)
    return folder


def load(folder: Path, **how: Any) -> Any:
    """The model by transformers, in float32 unless `how` says otherwise."""
    import transformers

    newer = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56)
    settings = {"dtype" if newer else "torch_dtype": torch.float32} | how
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


IDS = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS.to(model.device)).logits.float().cpu()
    return found


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def rows(folder: Path) -> Any:
    """Token ids of several lengths, as a data set."""
    import datasets

    ids = tokenizer_of(folder)(TEXT)["input_ids"]
    return datasets.Dataset.from_list([{"input_ids": ids[i : i + 20 + i % 30]} for i in range(0, 160, 10)])


def arguments(where: Path, **more: Any) -> dict[str, Any]:
    plain = {"output_dir": str(where), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    return plain | {"logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no"} | more


def falls(trainer: Any) -> str:
    """Train, and say how the loss moved."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0], losses
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps"


def check_load(folder: Path, work: Path) -> str:
    """transformers: load, save_pretrained, load again."""
    model = load(folder)
    model.save_pretrained(work / "saved")
    assert torch.equal(logits(load(work / "saved")), logits(model))
    return f"{sum(p.numel() for p in model.parameters()):,} parameters; equal after save_pretrained"


def check_generate(folder: Path, work: Path) -> str:
    """transformers: greedy generation with and without the cache, and by pipeline()."""
    from transformers import pipeline

    model, tokenizer = load(folder), tokenizer_of(folder)
    prompt = tokenizer("The old man", return_tensors="pt")
    how = {"max_new_tokens": 20, "do_sample": False}
    one, two = model.generate(**prompt, **how), model.generate(**prompt, **how, use_cache=False)
    assert torch.equal(one, two)
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("The old man", **how)[0]["generated_text"]
    assert text.startswith("The old man")
    return f"{one.shape[1] - prompt['input_ids'].shape[1]} tokens, the same with and without cache, and by pipeline()"


def check_trainer(folder: Path, work: Path) -> str:
    """transformers: Trainer, padded rows."""
    import transformers

    tokenizer = tokenizer_of(folder)
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    how = transformers.TrainingArguments(**arguments(work))
    return falls(transformers.Trainer(load(folder), how, train_dataset=rows(folder), data_collator=collate))


def check_flattening(folder: Path, work: Path) -> str:
    """transformers: Trainer on DataCollatorWithFlattening, a row of several sequences."""
    import transformers

    model, data = load(folder), rows(folder)
    collate = transformers.DataCollatorWithFlattening()
    batch = collate([data[i] for i in range(3)], return_tensors="pt")
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([data[i]["input_ids"]])).logits for i in range(3)], 1)
        apart = far(model(**batch).logits, alone)
        mixed = far(model(batch["input_ids"]).logits, alone)
    assert apart < 1e-5 < 1e-2 < mixed, (apart, mixed)
    how = transformers.TrainingArguments(**arguments(work))
    loss = falls(transformers.Trainer(model, how, train_dataset=data, data_collator=collate))
    return f"{loss}; sequences differ from single ones by {apart:.0e} (not told apart: {mixed:.2f})"


def check_device_map(folder: Path, work: Path) -> str:
    """accelerate: device_map, the same model from a map of devices."""
    import accelerate

    model = load(folder, device_map="auto")
    assert torch.equal(logits(model), logits(load(folder)))
    with accelerate.init_empty_weights():
        empty = load_empty(folder)
    placed = accelerate.infer_auto_device_map(empty, {"cpu": 3_000_000, "disk": 10**9}, list(empty._no_split_modules))
    return f"logits equal; a layer is kept whole in {len(placed)} places"


def load_empty(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=True)


def check_disk_offload(folder: Path, work: Path) -> str:
    """accelerate: four of six layers on disk."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(6)}
    model = load(folder, device_map=places, offload_folder=str(work / "offloaded"))
    assert any(p.device.type == "meta" for p in model.parameters())
    with torch.no_grad():
        found = model(IDS).logits
    assert torch.equal(found, logits(load(folder)))
    return "logits equal"


def check_peft(folder: Path, work: Path) -> str:
    """peft: LoRA on every projection, trained, saved, loaded, merged."""
    import peft
    import transformers

    config = peft.LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(load(folder), config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    collate = transformers.DataCollatorForLanguageModeling(tokenizer_of(folder), mlm=False)
    how = transformers.TrainingArguments(**arguments(work))
    loss = falls(transformers.Trainer(model, how, train_dataset=rows(folder), data_collator=collate))
    model.save_pretrained(work / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), work / "adapter")
    model.eval()
    assert far(logits(again), logits(model)) < 1e-6
    merged = far(logits(again.merge_and_unload()), logits(model))
    assert merged < 1e-5
    return f"{trained:,} trained, {loss}; merged differs by {merged:.0e}"


def quantized(folder: Path, config: Any) -> str:
    model, plain = load(folder, quantization_config=config), load(folder)
    apart = far(logits(model), logits(plain))
    assert 0 < apart < 0.2, apart
    out = model.generate(IDS[:1, :8], attention_mask=torch.ones(1, 8), max_new_tokens=8, do_sample=False)
    assert out.shape[1] == 16
    return f"int8 weights: logits differ by {apart:.3f}, generates"


def check_quanto(folder: Path, work: Path) -> str:
    """optimum-quanto, by transformers' QuantoConfig."""
    from transformers import QuantoConfig

    return quantized(folder, QuantoConfig(weights="int8"))


def check_quanto_alone(folder: Path, work: Path) -> str:
    """optimum-quanto's own quantize and freeze."""
    from optimum.quanto import freeze, qint8, quantize

    model, plain = load(folder), load(folder)
    quantize(model, weights=qint8)
    freeze(model)
    apart = far(logits(model), logits(plain))
    assert 0 < apart < 0.2, apart
    return f"int8 weights: logits differ by {apart:.3f}"


def check_torchao(folder: Path, work: Path) -> str:
    """torchao, by transformers' TorchAoConfig."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return quantized(folder, TorchAoConfig(Int8WeightOnlyConfig()))


def check_trl(folder: Path, work: Path) -> str:
    """trl: SFTTrainer, packing without padding: sequences do not see each other."""
    import trl

    seen: list[dict[str, Any]] = []
    model = load(folder)
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    how = trl.SFTConfig(**arguments(work), packing=True, padding_free=True, max_length=128, bf16=False)
    trainer = trl.SFTTrainer(model, args=how, train_dataset=rows(folder), processing_class=tokenizer_of(folder))
    loss = falls(trainer)
    positions = seen[0].get("position_ids")
    assert positions is not None and (positions.diff() < 0).any(), "the rows were not packed"
    return f"{loss}; {int((positions == 0).sum())} sequences in the first row"


def check_lm_eval(folder: Path, work: Path) -> str:
    """lm-eval: log-likelihoods and generation by its HFLM."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = load(folder)
    judge = HFLM(pretrained=model, tokenizer=tokenizer_of(folder), batch_size=2)
    pairs = [("The old man walked", " along the river"), ("He had been", " there every day of")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = judge.loglikelihood(requests)
    tokenizer = judge.tokenizer
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            shares = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        assert abs(float(shares[start - 1 :].sum()) - value) < 1e-3
    asked = Instance("generate_until", {}, ("The old man", {"until": ["\n"], "max_gen_toks": 8}), 0)
    assert len(judge.generate_until([asked])) == 1
    return "log-likelihoods are those of the logits; generates"


def check_mergekit(folder: Path, work: Path) -> str:
    """mergekit: passthrough of all layers, which leaves the modelling code out; verify says so."""
    source = f"- sources:\n  - model: {folder}\n    layer_range: [0, 6]\n"
    (work / "merge.yaml").write_text(f"merge_method: passthrough\ndtype: bfloat16\nslices:\n{source}")
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(work / "merge.yaml"), str(work / "merged")]
    done = subprocess.run([*command, "--trust-remote-code"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    missing = not (work / "merged" / "modeling_hxa079.py").exists()
    command = [sys.executable, "-m", "hxaconv", "verify", str(work / "merged"), "--json"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    warned = "modeling_hxa079.py" in said.stdout + said.stderr
    assert warned or not missing, said.stdout[-500:] + said.stderr[-500:]
    again = subprocess.run(
        [sys.executable, "-m", "hxaconv", "to-hf", str(work / "merged"), str(work / "whole"), "-q"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert again.returncode == 0, again.stderr
    apart = far(logits(load(work / "whole")), logits(load(folder)))
    assert apart < 1e-6, apart
    code = "leaves modeling_hxa079.py out, verify says so" if missing else "keeps the modelling code"
    return f"{code}; after to-hf the logits are equal"


CHECKS: dict[str, tuple[Callable[[Path, Path], str], tuple[str, ...]]] = {
    "load": (check_load, ("transformers",)),
    "generate": (check_generate, ("transformers",)),
    "Trainer": (check_trainer, ("transformers",)),
    "Trainer, flattened": (check_flattening, ("transformers",)),
    "device_map": (check_device_map, ("accelerate",)),
    "disk offload": (check_disk_offload, ("accelerate",)),
    "LoRA": (check_peft, ("peft",)),
    "QuantoConfig": (check_quanto, ("optimum-quanto",)),
    "quanto": (check_quanto_alone, ("optimum-quanto",)),
    "TorchAoConfig": (check_torchao, ("torchao",)),
    "SFTTrainer, packing": (check_trl, ("trl",)),
    "HFLM": (check_lm_eval, ("lm-eval",)),
    "passthrough": (check_mergekit, ("mergekit",)),
}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(name: str, folder: Path) -> dict[str, str]:
    """One row of the table."""
    function, packages = CHECKS[name]
    versions = {package: version(package) for package in packages}
    row = {"check": name, "library": ", ".join(f"{package} {v}" for package, v in versions.items())}
    if None in versions.values():
        return row | {"result": "not installed"}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                result = function(folder, Path(work))
        except Exception as error:
            traceback.print_exc()
            said = str(error).strip().splitlines()
            result = f"FAILED: {type(error).__name__}: {said[0][:200] if said else ''}"
    return row | {"result": result, "seconds": f"{time.perf_counter() - begin:.1f}"}


def main() -> None:
    """Run what is asked for, or everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder = make_student(Path(root) / "student")
        found = [run(name, folder) for name in options.checks or CHECKS]
    lines = [f"torch {torch.__version__}, transformers {version('transformers')}, CPU", ""]
    lines += ["| library | check | result | s |", "|---|---|---|--:|"]
    lines += [f"| {r['library']} | {r['check']} | {r['result']} | {r.get('seconds', '')} |" for r in found]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    sys.exit(any(r["result"].startswith("FAILED") for r in found))


if __name__ == "__main__":
    main()
