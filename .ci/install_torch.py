"""Install PyTorch into the environment that runs this file, without CUDA packages on a machine that cannot use them.

On Linux the build of PyTorch on the Python Package Index needs several GB of CUDA packages; on macOS and Windows it is
the CPU build. On a Linux machine without an NVIDIA GPU this asks pip what it would install and, if that needs CUDA,
turns to PyTorch's own index of CPU builds. ``--index`` overrules all of it.

Only the standard library is used: nothing else is installed yet.
"""

import argparse
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: PyTorch's index of CPU builds: https://pytorch.org/get-started/locally
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

CURE = "Name another index or build: make TORCH_INDEX=<URL of an index> TORCH_SPEC=<torch==version or a wheel file>."


class NotToBeHadError(Exception):
    """No index that may be used has the build asked for; the message is for the person at the terminal."""


def has_nvidia_gpu() -> bool:
    """Whether NVIDIA's own tool is there and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def pip_command(spec: str, index: str | None) -> list[str]:
    """The pip call that installs ``spec``, in place of a build that is there already and may be of another kind."""
    command = [sys.executable, "-m", "pip", "install", "--force-reinstall", "--only-binary", ":all:"]
    return [*command, *(["--index-url", index] if index else []), spec]


def ask_pip(spec: str, index: str | None) -> dict[str, Any]:
    """pip's installation report for ``spec`` alone, without installing it.

    Raises:
        NotToBeHadError: pip finds no such build or does not reach the index.
    """
    # The requirements of PyTorch are read from its metadata, not resolved: resolving them could download them.
    options = ["--dry-run", "--no-deps", "--quiet", "--report", "-"]
    asked = subprocess.run([*pip_command(spec, index), *options], capture_output=True, text=True)
    if asked.returncode != 0:
        reasons = [line for line in asked.stderr.splitlines() if line.startswith("ERROR:")]
        raise NotToBeHadError(reasons[-1].removeprefix("ERROR:").strip() if reasons else "pip gave no reason")
    report: dict[str, Any] = json.loads(asked.stdout)
    return report


def cuda_requirements(report: dict[str, Any]) -> list[str]:
    """Names of the CUDA packages that the builds in pip's ``report`` require."""
    requirements = [
        requirement for item in report["install"] for requirement in item["metadata"].get("requires_dist", [])
    ]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0] for requirement in requirements}
    return sorted(name for name in names if re.match(r"(nvidia|cuda)[-_]", name, re.IGNORECASE))


def choose_index(
    spec: str, *, index: str | None, platform: str, gpu: bool, ask: Callable[[str, str | None], dict[str, Any]]
) -> str | None:
    """The index to install ``spec`` from; ``None`` stands for the one that pip is set up with.

    Raises:
        NotToBeHadError: a CPU build is needed and neither pip's own index nor PyTorch's has one within reach.
    """
    if index:
        return index
    if gpu or platform != "linux":
        return None
    try:
        cuda = cuda_requirements(ask(spec, None))
    except NotToBeHadError as reason:
        raise NotToBeHadError(f"pip finds no build of {spec} ({reason}). {CURE}") from None
    if not cuda:
        return None
    try:
        ask(spec, CPU_INDEX)
    except NotToBeHadError as reason:
        raise NotToBeHadError(
            f"this machine has no NVIDIA GPU, pip's own index offers {spec} with {len(cuda)} CUDA packages only, "
            f"and {CPU_INDEX} gave no CPU build ({reason}). {CURE}"
        ) from None
    return CPU_INDEX


def main() -> int:
    """Install the build, write the constraint file, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("spec", help="what pip installs, for example torch==2.13.0")
    parser.add_argument("--index", help="index to take it from, whatever the machine")
    parser.add_argument("--constraint", type=Path, help="file to write the installed version to, for pip --constraint")
    arguments = parser.parse_args()
    try:
        index = choose_index(
            arguments.spec, index=arguments.index, platform=sys.platform, gpu=has_nvidia_gpu(), ask=ask_pip
        )
    except NotToBeHadError as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    print(f"Installing {arguments.spec} from {index or 'the index that pip is set up with'}.", flush=True)
    installed = subprocess.run([*pip_command(arguments.spec, index), "--quiet"])
    if installed.returncode != 0:
        print(f"error: {arguments.spec} could not be installed. {CURE}", file=sys.stderr)
        return installed.returncode
    if arguments.constraint:
        arguments.constraint.write_text(f"torch=={importlib.metadata.version('torch')}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
