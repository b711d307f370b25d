"""What every result folder says of the machine, the code and the day that made it."""

import datetime
from pathlib import Path
from typing import Any

from boneage_hf import __version__
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


def public_name(checkpoint: str) -> str:
    """Of a folder its own name only, a Hub id or "default" as it is."""
    return Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint
