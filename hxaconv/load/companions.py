"""Files beside the weights that other programs need: tokenizers, templates, generation settings.

They travel along with a checkpoint; what they begin with is looked at before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from hxaconv.errors import raise_all
from hxaconv.formats.contents import show
from hxaconv.formats.files import TEMPLATES, SourceFile
from hxaconv.formats.json_files import MAX_JSON_BYTES, parse_json
from hxaconv.model.model import Checkpoint

TOKENIZERS = re.compile(
    r"tokenizer\.json|tokenizer(\.mm)?\.model(\.v\d+(m\d+)?)?|tekken\.json|spiece\.model|sentencepiece(\.bpe)?\.model"
    r"|(source|target)\.spm|spm\.model|vocab\.(json|txt|bpe)|[\w.-]+\.tiktoken|rwkv_vocab\w*\.txt|bpe\.codes|\w+\.bpe"
)
"""What holds a vocabulary: the names that tokenizers of transformers, mistral-common and llama.cpp read."""
OTHERS = re.compile(
    r"tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|merges\.txt|generation_config\.json"
    r"|chat_template\.(jinja|json)|normalizer\.json|SYSTEM_PROMPT\.txt"
    rf"|{TEMPLATES}/[\w.-]+\.jinja"
)


def is_companion(name: str) -> bool:
    """Whether a file of this name (relative to the checkpoint) is copied along."""
    return bool(TOKENIZERS.fullmatch(name) or OTHERS.fullmatch(name))


def refuse_broken(checkpoints: Iterable[Checkpoint]) -> None:
    """Stop before a file is copied that is not what its name says.

    Raises:
        HxaconvError: listing LFS pointers, web pages and empty files.
    """
    found = [line for checkpoint in checkpoints for line in broken_companions(checkpoint.companions)]
    raise_all(
        "files that would be copied along are not what their names say:",
        found,
        hint="Run `git lfs pull` in that folder, or download them again; delete what the model works without.",
    )


def broken_companions(companions: Mapping[str, SourceFile]) -> list[str]:
    """A line for each that is a pointer, a web page, or empty; those that are still on the Hub are not looked at."""
    found = []
    for file in companions.values():
        if file.path is None and file.size:
            continue
        start = file.read(0, min(file.size, 512)).lstrip() if file.size else b""
        file.close()
        what = None
        if start.startswith(b"version https://git-lfs"):
            what = "a Git LFS pointer, not the file itself"
        elif start.lower().startswith((b"<!doctype", b"<html")):
            what = "a web page"
        elif not start and not file.name.endswith((".jinja", ".txt")):
            what = "empty"
        if what is not None:
            found.append(f"{file.label} is {what}")
    return found


def missing_code(checkpoint: Checkpoint, *, copied: bool) -> list[str]:
    """A line for each code file that tokenizer_config.json names and that will not be beside it.

    `copied` says whether the code files of the checkpoint are taken along.
    """
    file = checkpoint.companions.get("tokenizer_config.json")
    if file is None or file.path is None or file.size > MAX_JSON_BYTES:
        return []
    try:
        raw = parse_json(file.read(0, file.size))
    except ValueError:
        return [f"{file.label} is not valid JSON"]
    finally:
        file.close()
    named = raw.get("auto_map") if isinstance(raw, dict) else None
    entries = list(named.values()) if isinstance(named, dict) else [named]
    flat = [item for entry in entries for item in (entry if isinstance(entry, list) else [entry])]
    needed = {f"{item.partition('.')[0]}.py" for item in flat if isinstance(item, str) and "--" not in item}
    absent = sorted(name for name in needed if name not in checkpoint.code_files)
    left = sorted(needed - set(absent)) if not copied else []
    lines = [f"{file.label}: its auto_map names {show(name)}, which is not there" for name in absent]
    return lines + [f"{file.label}: its auto_map needs {name}; --copy-code takes it along" for name in left]


def warnings(checkpoints: Iterable[Checkpoint], *, copied: bool) -> list[str]:
    """What will be amiss with the tokenizer of an output made of these checkpoints, for people."""
    found = list(checkpoints)
    lines = [line for checkpoint in found for line in missing_code(checkpoint, copied=copied)]
    if not any(TOKENIZERS.fullmatch(name) for checkpoint in found for name in checkpoint.companions):
        lines.append("no tokenizer is copied along: none of the sources has one beside its weights")
    return lines
