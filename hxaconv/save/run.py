"""The end of every command that writes: what it planned becomes a checkpoint, verified, and uploaded where asked."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv import ranks
from hxaconv.errors import HxaconvError
from hxaconv.formats.files import SourceFile
from hxaconv.formats.hub import explain, hub_utils, network_errors
from hxaconv.load.files import tokenizer_warnings
from hxaconv.load.models import download, will_download
from hxaconv.model.plan import source_files
from hxaconv.options import Write
from hxaconv.save.interruption import interruptible
from hxaconv.save.outcome import Outcome, planned
from hxaconv.save.output import Output
from hxaconv.save.writer import Check, refuse, write

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def save(
    output: Output,
    options: Write,
    *,
    check: Check | None = None,
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Outcome:
    """Write an output, verify it before it gets its name, and upload it where asked; a dry run refuses the same.

    The progress that the command was called with is shown the plan, once nothing stands in the way of it.

    Raises:
        HxaconvError: when the target is refused, or something fails; the target is as before then.
        CheckFailed: when the output did not pass; it is left beside the target for inspection.
    """
    progress, sources = output.record.call.progress, list(output.record.sources.values())
    if output.format == "hf":
        warnings = [*warnings, *tokenizer_warnings(sources, copied=output.copy_code)]
    to_come = will_download(sources, source_files(output.tensors))
    notes = [*notes, *([to_come] if to_come else [])]
    outcome = planned(output, options.max_shard_bytes, warnings, notes)
    if options.push_to:
        check_push(options.push_to)
    if options.dry_run:
        with ranks.together():
            refuse(output, options)
        return replace(outcome, notes=[*outcome.notes, "Dry run: nothing was written."])
    if check is not None and options.verify:
        # It takes a second of one core, which the writing leaves idle.
        threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()

    def prepare(needed: Sequence[SourceFile]) -> None:
        models = [output.student] if output.student is not None and ranks.rank() == 0 else []
        if progress is not None and ranks.rank() == 0:
            progress.show(outcome)
        download(output.record.sources.values(), needed, models, progress)

    written = write(output, options, check=check, prepare=prepare, progress=progress)
    pushed = _push(written.path, options.push_to) if options.push_to else None
    left = [
        f"{path} is left from an interrupted run with other options or sources; delete it if nobody will resume it."
        for path in written.leftovers
    ]
    return replace(
        outcome,
        written=written,
        report=written.report,
        notes=[*outcome.notes, *left],
        pushed_to=pushed,
    )


def _push(path: Path, repo_id: str) -> str | None:
    if ranks.rank():
        return None
    kept = f"{path} is complete; `hf upload {repo_id} {path}` sends it as well."
    with interruptible(lambda: kept):
        try:
            return push_folder(path, repo_id)
        except HxaconvError as error:
            error.hint = f"{error.hint} {kept}".strip()
            raise


def check_push(repo_id: str) -> None:
    """Refuse, before any work, what the Hub would refuse of an upload after it.

    Raises:
        HxaconvError: for a name that no repository can have, without a token, and where the token may not write.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    asked = f"--push-to {repo_id}"
    try:
        hub_utils().validate_repo_id(repo_id)
        user = HfApi().whoami() if "/" in repo_id else None
    except HFValidationError as error:
        raise HxaconvError(f"{asked}: {str(error).splitlines()[0]}", hint="It takes ORG/NAME.") from None
    except LocalTokenNotFoundError:
        raise HxaconvError(f"{asked}: nobody is logged in", hint="`hf auth login`, or set HF_TOKEN.") from None
    except network_errors() as error:
        raise explain(error, repo_id, None) from None
    if user is None:
        raise HxaconvError(f"{asked} names no owner", hint="It takes ORG/NAME.")
    owners = [str(user.get("name")), *(str(org.get("name")) for org in user.get("orgs") or [])]
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise HxaconvError(f"{asked}: the token of {owners[0]} may only read", hint="Use one that may write.")
    if repo_id.partition("/")[0] not in owners:
        raise HxaconvError(f"{asked}: {owners[0]} may write to {', '.join(owners)}", hint="Name one of these.")


def push_folder(path: Path, repo_id: str) -> str:
    """Upload a finished folder, or a `.pth` with its sidecar, creating a private repository where there is none.

    Returns its address. An interrupted upload is continued by the same call: what has arrived is not
    sent again.

    Raises:
        HxaconvError: when there is nothing finished at `path`, or the Hub refuses.
    """
    from huggingface_hub import HfApi

    if ".partial-" in path.name or not (path.is_file() or (path / "config.json").is_file()):
        raise HxaconvError(
            f"{path} is no finished model: expected a folder with config.json, or a .pth",
            hint="Run the command that makes it to its end first.",
        )
    api = HfApi()
    try:
        _upload(api, path, repo_id)
    except network_errors() as error:
        raise explain(error, repo_id, None) from None
    except ValueError as error:
        raise HxaconvError(f"{repo_id!r} cannot be uploaded to: {str(error).splitlines()[0]}") from None
    return f"{api.endpoint}/{repo_id}"


def _upload(api: HfApi, path: Path, repo_id: str) -> None:
    api.create_repo(repo_id, private=True, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        folder_path=path if path.is_dir() else path.parent,
        commit_message=f"Upload {path.name}",
        allow_patterns=None if path.is_dir() else [path.name, path.with_suffix(".json").name],
        ignore_patterns=[".*", "*.partial-*", "__pycache__/*"],
    )
