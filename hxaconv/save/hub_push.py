"""A finished model goes to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv.errors import HxaconvError
from hxaconv.formats.hub_client import explain, network_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi


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
            hint="Complete it first: hxaconv finish.",
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
