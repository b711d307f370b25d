"""What every result folder says of the machine, the code and the day that made it; and that it is nobody else's."""

import datetime
import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from boneage_hf import __version__
from boneage_hf.errors import InputError
from boneage_hf.evaluation import git_commit, hardware, package_versions


def seal() -> dict[str, Any]:
    """Package version, commit, versions, hardware and time (UTC) for a manifest; no name of the machine, no path."""
    return {
        "package_version": __version__,
        "commit": git_commit(),
        "versions": package_versions(("torch", "transformers", "datasets", "numpy", "scipy", "pillow", "matplotlib")),
        "hardware": hardware(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def check_out(out: Path, files: Collection[str], **subject: object) -> None:
    """Refuse a result folder that cannot be written or holds something else, before any work is done for it.

    Args:
        out: a new folder, or one of an earlier call about the same.
        files: names of all files that the command writes.
        subject: what the manifest of an earlier call must say, or a test of what it says; `task` at least.

    Raises:
        InputError: the folder holds other files or results of something else, or it cannot be written.
    """
    try:
        if out.exists() and not out.is_dir():
            raise InputError("--out is a file; name a folder.")
        earlier = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if earlier - set(files):
            raise InputError(f"--out holds files that are no {subject['task']} results; name another folder.")
        if "manifest.json" in earlier and not _is_about((out / "manifest.json").read_bytes(), subject):
            raise InputError("--out holds results of something else; delete that folder, or name another one.")
        # Permissions do not tell of a disk that is read-only; this file has no name or is deleted at once.
        with tempfile.TemporaryFile(dir=next(place for place in (out, *out.absolute().parents) if place.exists())):
            pass
    except OSError as error:
        raise InputError(f"The results cannot be written ({error.strerror}); give another --out.") from None


def _is_about(manifest: bytes, subject: dict[str, object]) -> bool:
    try:
        content = json.loads(manifest)
    except ValueError:
        return False
    return isinstance(content, dict) and all(
        expected(content.get(key)) if callable(expected) else content.get(key) == expected
        for key, expected in subject.items()
    )


def public_name(checkpoint: str) -> str:
    """Of a folder its own name only, a Hub id or "default" as it is."""
    return Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint
