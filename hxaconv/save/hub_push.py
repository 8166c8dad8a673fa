"""A finished model goes to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv.errors import HxaconvError
from hxaconv.formats.hub import explain, hub_utils, network_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi


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
