"""What is asked of the Hub: ids, downloads into its cache, and one clear sentence for whatever goes wrong there."""

import errno
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
)

from .errors import InputError

Kind = Literal["model", "dataset", "space"]
NAMES: dict[Kind, str] = {"model": "model", "dataset": "data set", "space": "Space"}

#: Longest silence of the Hub within one request. Taking in a commit of many large files is the slowest of them.
TIMEOUT_SECONDS = 120.0

#: OWNER/NAME, optionally @REVISION (a branch, tag or commit); letters as the Hub allows them in names.
_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


def is_hub_id(source: str | Path) -> bool:
    """Whether a source is sought on the Hub: `OWNER/NAME` or `OWNER/NAME@REVISION`, and no file or folder."""
    return _ID.fullmatch(str(source)) is not None and not Path(source).exists()


def split_id(source: str | Path) -> tuple[str, str | None]:
    """`OWNER/NAME@REVISION` -> id and revision, the latter None where there is none."""
    match = _ID.fullmatch(str(source))
    return (match["id"], match["revision"]) if match else (str(source), None)


def check_id(repo_id: str) -> None:
    """Refuse what cannot name a repository to publish to.

    Raises:
        InputError: it is not of the form OWNER/NAME.
    """
    match = _ID.fullmatch(repo_id)
    if match is None or match["revision"]:
        raise InputError(f"{repo_id!r} is no name on the Hub: give OWNER/NAME, as in clinic/bone-age.")


def download(
    repo_id: str, patterns: Sequence[str] | None = None, *, kind: Kind = "model", revision: str | None = None
) -> Path:
    """The folder of a repository's files in the cache of the Hub; its name is the commit.

    Files that are there already are not fetched again. Without a connection the cache alone is used.

    Args:
        patterns: of the files to fetch, all by default.
        revision: branch, tag or commit, the main branch by default.

    Raises:
        InputError: whatever is in the way.
    """
    wanted = None if patterns is None else list(patterns)
    with hub_sentences(repo_id, kind, revision=revision), with_timeout(), no_bars():
        return Path(snapshot_download(repo_id, repo_type=kind, revision=revision, allow_patterns=wanted))


@contextmanager
def with_timeout() -> Iterator[None]:
    """Within the block no request waits longer than [`TIMEOUT_SECONDS`] for the next byte, instead of for ever."""

    # Some requests ask for no limit in so many words, so setting the client's own is not enough.
    def limit(request: Any) -> None:
        asked = request.extensions.get("timeout", {})
        parts = ("connect", "read", "write", "pool")
        limits = {part: asked.get(part) for part in parts}
        request.extensions["timeout"] = {
            part: TIMEOUT_SECONDS if seconds is None else seconds for part, seconds in limits.items()
        }

    session = get_session()
    before = session.event_hooks
    session.event_hooks = {**before, "request": [*before["request"], limit]}
    try:
        yield
    finally:
        session.event_hooks = before


@contextmanager
def no_bars() -> Iterator[None]:
    """Within the block huggingface_hub shows no progress bar."""
    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()


@contextmanager
def hub_sentences(repo_id: str, kind: Kind, *, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Within the block, whatever the Hub or the way to it brings up becomes an [`InputError`] of one sentence."""
    try:
        yield
    except InputError:
        raise
    # RuntimeError: what the library makes of an upload that failed; ValueError: of metadata that the Hub refuses, and
    # of an answer that is no JSON.
    except (HTTPError, OSError, EOFError, RuntimeError, ValueError) as error:
        sentence = _sentence(error, repo_id, NAMES[kind], revision=revision, writing=writing)
        if sentence is None:
            raise
        raise InputError(sentence) from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """Status of the answer that an error or one of its causes is about."""
    return next((one.response.status_code for one in _causes(error) if isinstance(one, HfHubHTTPError)), None)


def _sentence(error: BaseException, repo_id: str, what: str, *, revision: str | None, writing: bool) -> str | None:
    causes = list(_causes(error))
    full = any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in causes)
    if full:
        return (
            "The disk is full: make room for the cache of the Hub, or let HF_HOME name a folder on another disk, and "
            "try again."
        )
    if any(isinstance(one, HFValidationError) for one in causes):
        return f"{repo_id!r} is no name on the Hub: give OWNER/NAME, as in clinic/bone-age."
    if any(isinstance(one, OfflineModeIsEnabled) for one in causes):
        return (
            f"The {what} {repo_id} was not downloaded before, and HF_HUB_OFFLINE forbids the connection: check the "
            "spelling, or unset it."
        )
    if any(isinstance(one, LocalTokenNotFoundError) for one in causes):
        return "You are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN."
    if "Invalid metadata" in str(error):
        return (
            "The Hub does not accept the metadata of README.md: make the card again with this version of boneage-hf."
        )
    if type(error).__name__ == "JSONDecodeError":
        return "The Hub gave an answer that cannot be read: try again later."
    status = status_of(error)
    if status is not None:
        if any(isinstance(one, RevisionNotFoundError) for one in causes):
            return f"The {what} {repo_id} has no branch, tag or commit {revision or 'main'}: check its spelling."
        return _by_status(status, repo_id, what, writing=writing)
    # By name: the classes belong to the HTTP library of huggingface_hub, which it may exchange.
    kinds = [type(one).__name__ for one in causes]
    if any("Timeout" in kind for kind in kinds):
        return (
            "The Hub did not answer in time: check the connection and try again (HF_HUB_DOWNLOAD_TIMEOUT and "
            "HF_HUB_ETAG_TIMEOUT give it more seconds)."
        )
    if any(isinstance(one, HTTPError | ConnectionError | EOFError) for one in causes) or isinstance(
        error, FileNotFoundError
    ):
        return f"The Hub cannot be reached for the {what} {repo_id}: check the connection and try again."
    return None


def _by_status(status: int, repo_id: str, what: str, *, writing: bool) -> str:
    if status == 401:
        if writing:
            return "The Hub does not accept your token (401): run `hf auth login`, or set HF_TOKEN to a valid one."
        return (
            f"The Hub does not show you a {what} {repo_id} (401): check the spelling and, if it is private, log in "
            "with `hf auth login` or set HF_TOKEN."
        )
    if status == 403:
        can = "write to" if writing else "read"
        return f"Your token may not {can} {repo_id} (403): use one that may, or ask its owner for access."
    if status == 404:
        return (
            f"There is no {what} {repo_id} on the Hub that you may see (404): check the spelling, and whether your "
            "token may read it."
        )
    if status == 429:
        return "The Hub has had too many requests from you (429): wait a few minutes and try again."
    if status >= 500:
        return f"The Hub is in trouble (error {status}): try again later."
    return f"The Hub refused the request (error {status}): check the name {repo_id} and the permissions of your token."
