"""What every result folder says of the machine, the code and the day that made it."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

from boneage_hf import __version__
from boneage_hf.evaluation import git_commit, package_versions


def seal() -> dict[str, Any]:
    """Package version, commit, versions, hardware and time (UTC) for a manifest; no name of the machine, no path."""
    return {
        "package_version": __version__,
        "commit": git_commit(),
        "versions": package_versions(("torch", "transformers", "datasets", "numpy", "scipy", "pillow", "matplotlib")),
        "hardware": hardware(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def hardware() -> dict[str, Any]:
    """Architecture, processor, logical cores, torch's threads and accelerator; None where the system does not say."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def public_name(checkpoint: str) -> str:
    """Of a folder its own name only, a Hub id or "default" as it is."""
    return Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None
