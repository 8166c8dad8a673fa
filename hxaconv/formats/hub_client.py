"""Around huggingface_hub: its errors in words, broken connections tried again, its bars kept off the screen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from hxaconv.errors import HxaconvError

T = TypeVar("T")

ATTEMPTS = 3
"""Of a request whose connection breaks."""
_LOGIN = "Log in with `hf auth login` (or set HF_TOKEN)"


@contextlib.contextmanager
def bars_off() -> Iterator[None]:
    """No bars of huggingface_hub's own: ours is on the screen, or none is wanted."""
    utils = hub_utils()
    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def hub_utils() -> Any:
    """huggingface_hub.utils, which exports its functions without saying so to type checkers."""
    from huggingface_hub import utils

    return utils


def network_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises: OSError covers requests, the other base httpx (huggingface_hub >= 1.0)."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, HfHubHTTPError.__bases__[0])


def retried(action: Callable[[], T]) -> T:
    """The action's result; it is tried again where the connection broke."""
    for _ in range(ATTEMPTS - 1):
        try:
            return action()
        except network_errors() as error:
            if status_of(error) is not None or getattr(error, "errno", None) is not None:
                raise
    return action()


def status_of(error: Exception) -> int | None:
    """The status that the Hub answered with, None where it did not answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error: Exception, repo: str, revision: str | None) -> HxaconvError:
    """One sentence and the next step; the texts of HTTP errors are left out, as they may quote headers."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    status = status_of(error)
    if isinstance(error, errors.GatedRepoError):
        return HxaconvError(
            f"{repo} is gated: its authors let in who accepts their conditions",
            hint=f"Accept them at {page}, then log in: `hf auth login` (or set HF_TOKEN).",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HxaconvError(
            f"{repo}: no such path here, and no such model on the Hub, or a private one without access",
            hint=f"Check the spelling. {_LOGIN} if it is private.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HxaconvError(
            f"{repo} has no revision {revision!r}", hint=f"Branches, tags and commits are listed at {page}/tree/main."
        )
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return HxaconvError(f"{repo}: a file that the model lists is not there", hint=f"See {page}/tree/main.")
    if status in (401, 403):
        return HxaconvError(
            f"The Hub refuses access to {repo} (status {status})",
            hint=f"{_LOGIN}; the token needs the permission for this repository.",
        )
    if status is not None:
        return HxaconvError(f"The Hub answers {status} for {repo}", hint="Try again in a few minutes.")
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return HxaconvError(
            f"{repo} is not in the Hub's cache, and the Hub is not used (HF_HUB_OFFLINE)",
            hint=f"Unset HF_HUB_OFFLINE, or download it where there is network: hf download {repo}",
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return HxaconvError(f"{error.filename or repo}: {error.strerror}")
    return HxaconvError(
        f"{repo}: no such path here, and the Hub cannot be reached ({type(error).__name__})",
        hint="Check the network (HTTPS_PROXY, HF_ENDPOINT); finished parts of a download are kept.",
    )
