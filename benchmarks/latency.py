"""Seconds from file to months and of the network alone, memory, cold start, and what the networks of peers take.

`boneage-benchmark speed CHECKPOINT ... --out DIR`. Peers' networks run with random weights: their speed does not
depend on the values. They are stand-ins built from transformers' own classes at the published input size, without the
peers' preprocessing, masks or heads, so their times are lower bounds.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from boneage_hf.configuration_boneage import BoneAgeConfig
from boneage_hf.errors import InputError
from boneage_hf.files import write_text
from boneage_hf.hub import checkpoint_revision, load_pipeline
from boneage_hf.modeling_boneage import BoneAgeModel
from boneage_hf.phantom import draw, png_bytes
from boneage_hf.pipeline_boneage import BoneAgePipeline

from .provenance import check_out, public_name, seal
from .statistics import ENOUGH_FOR_P95

#: Columns of `speed.csv`. Times in milliseconds per image; `gflop` counts a multiplication and an addition as two.
COLUMNS = (
    *("system", "what", "image_size", "batch", "precision", "threads", "repeats"),
    *("median_ms", "p95_ms", "images_per_second", "gflop_per_image", "share_of_peak"),
)

#: Height and width of the drawn file that stands for an original, px.
FILE_SIZE = (2000, 1500)

_PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Sides of the square matrices, and channels, side and batch of the 3 x 3 convolution, that the peak is measured with:
#: libraries reach their best at different sizes, and some reach it in convolutions only.
_MATMUL_SIDES = (1024, 2048, 4096)
_CONVOLUTION = (256, 56, 4)


@dataclass(frozen=True)
class Speed:
    """What [`measure_speed`] found.

    Attributes:
        table: columns as in `COLUMNS`.
        manifest: what the figures rest on, with `peak_gflop_per_second` (see [`measured_peak`]) and, per checkpoint,
            revision and `cold_start` (`seconds`, `peak_memory_mb`).
        files: what was written.
    """

    table: pd.DataFrame
    manifest: dict[str, Any]
    files: tuple[Path, ...]

    def __str__(self) -> str:
        shown = self.table[
            ["system", "what", "batch", "precision", "threads", "median_ms", "p95_ms", "gflop_per_image"]
        ]
        lines = [
            shown.to_string(index=False, na_rep="-", float_format="{:.1f}".format),
            *(
                f"{one['checkpoint']}: cold start to the first answer {one['cold_start']['seconds']:.1f} s, peak "
                f"memory {one['cold_start']['peak_memory_mb']:.0f} MB"
                for one in self.manifest["checkpoints"]
            ),
            *(f"wrote {path}" for path in self.files),
        ]
        return "\n".join(lines)


_FILES = ("speed.csv", "manifest.json")


def measure_speed(
    checkpoints: Sequence[str],
    *,
    out: Path,
    repeats: int = 20,
    batches: Sequence[int] = (1, 8, 32),
    peers: bool = True,
    progress: bool = True,
) -> Speed:
    """Time checkpoints, and in the same run the networks of peers, on this machine's CPU.

    Args:
        checkpoints: each a folder, a Hub id or `"default"`; at least one.
        out: gets `speed.csv` and `manifest.json`.
        repeats: timed calls of each kind, after two that warm up; slow ones get a fifth, but 3 at least. With fewer
            than `ENOUGH_FOR_P95` a row has no 95th percentile.
        batches: batch sizes of the network alone; the largest of them up to 8 is also read from files.
        peers: also time the networks of [`peer_networks`].

    Raises:
        InputError: the checkpoint cannot be loaded, fewer than 3 repeats, an empty or impossible batch, or `out`
            holds something else or cannot be written.
    """
    if repeats < 3:
        raise InputError(f"The number of repeats must be 3 or more, not {repeats}: a median needs them.")
    if not batches or min(batches) < 1:
        raise InputError("Batch sizes must be 1 or more.")
    names = [public_name(checkpoint) for checkpoint in checkpoints]
    if not names or len(set(names)) < len(names):
        raise InputError("Name one checkpoint or more, each once and under a name of its own.")
    check_out(out, _FILES, task="speed")
    pipes = {name: load_pipeline(source, device="cpu") for name, source in zip(names, checkpoints, strict=True)}
    revisions = {name: checkpoint_revision(pipe) for name, pipe in pipes.items()}
    check_out(out, _FILES, task="speed", checkpoints=partial(_are_of, revisions=list(revisions.values())))
    all_threads = torch.get_num_threads()
    threads_tried = sorted({1, all_threads})
    before = _peaks(threads_tried)
    rows: list[dict[str, Any]] = []

    def add(
        system: str,
        what: str,
        size: int,
        batch: int,
        precision: str,
        threads: int,
        times: list[float],
        gflop: float | None,
    ) -> None:
        per_image = [1000 * seconds / batch for seconds in times]
        median = statistics.median(per_image)
        p95 = float(np.percentile(per_image, 95)) if len(times) >= ENOUGH_FOR_P95 else None
        setting = (system, what, size, batch, precision, threads, len(times))
        found = (median, p95, 1000 / median, gflop, None)
        rows.append(dict(zip(COLUMNS, (*setting, *found), strict=True)))

    networks: list[tuple[str, nn.Module, int, tuple[int, ...]]] = [
        (name, pipe.model, pipe.model.config.image_size, tuple(batches)) for name, pipe in pipes.items()
    ]
    if peers:
        networks += [(peer, network, size, (1,)) for peer, network, size in peer_networks()]
    settings = [
        (system, network, size, batch, precision, threads)
        for system, network, size, sizes in networks
        for precision in _PRECISIONS
        for threads in threads_tried
        for batch in sizes
    ]
    gflops = {system: gflop_per_image(_call(network, size, 1)) for system, network, size, _ in networks}
    # Each of batch, precision and threads changed alone, on top of what a user gets: one file, fp32, all threads.
    several = max((batch for batch in batches if batch <= 8), default=1)
    ways = dict.fromkeys(
        [(1, "fp32", all_threads), (1, "bf16", all_threads), (1, "fp32", 1), (several, "fp32", all_threads)]
    )
    reads = [
        (name, pipe, what, content, *way)
        for name, pipe in pipes.items()
        for what, content in _files().items()
        for way in ways
    ]
    with tqdm(total=len(settings) + len(reads), desc="speed", unit="setting", disable=not progress) as bar:
        for name, pipe, what, content, batch, precision, threads in reads:
            with _threads(threads), _autocast(precision):
                times = timed(_file_to_months(pipe, content, batch), repeats=repeats)
            add(name, what, pipe.model.config.image_size, batch, precision, threads, times, None)
            bar.update()
        for system, network, size, batch, precision, threads in settings:
            with _threads(threads), _autocast(precision), torch.inference_mode():
                times = timed(_call(network, size, batch), repeats=repeats)
            add(system, "network", size, batch, precision, threads, times, gflops[system])
            bar.update()
    # Before and after, and the better of both: a machine that was busy for a while would seem to be a weaker one.
    after = _peaks(threads_tried)
    peaks = {
        name: {what: max(value, after[name][what]) for what, value in one.items()} for name, one in before.items()
    }
    for row in rows:
        if row["gflop_per_image"] is not None:
            peak = max(peaks[_peak_name(row["precision"], row["threads"])].values())
            row["share_of_peak"] = row["gflop_per_image"] / (row["median_ms"] / 1000) / peak
    table = pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, float_format="%.4g", lineterminator="\n")
    manifest = {
        "task": "speed",
        "checkpoints": [
            {"checkpoint": name, "revision": revisions[name], "cold_start": cold_start(source)}
            for name, source in zip(names, checkpoints, strict=True)
        ],
        "table_sha256": hashlib.sha256(table.encode()).hexdigest(),
        "peak_gflop_per_second": {name: max(found.values()) for name, found in peaks.items()},
        "peaks_found": peaks,
        "file_size": list(FILE_SIZE),
        **seal(),
    }
    write_text(out / "speed.csv", table)
    write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
    return Speed(pd.DataFrame(rows, columns=list(COLUMNS)), manifest, tuple(out / name for name in _FILES))


def _are_of(checkpoints: object, *, revisions: Sequence[str]) -> bool:
    """Whether `checkpoints` of a manifest are those of just these revisions."""
    found = checkpoints if isinstance(checkpoints, list) else []
    return [one.get("revision") for one in found if isinstance(one, dict)] == list(revisions)


# --- what is timed --------------------------------------------------------------------------------------------------


def peer_networks() -> Iterator[tuple[str, nn.Module, int]]:
    """Name, network with random weights, side of its input: of peers, and the reference network of this field.

    Deeplasia is an ensemble of EfficientNets at 512 px (Rassmann et al., Pediatr Radiol 2024, doi
    10.1007/s00247-023-05789-1); ianpan/bone-age holds three ConvNeXtV2-tiny at 512 px (its model card).
    """
    from transformers import ConvNextV2Config, ConvNextV2Model, EfficientNetConfig, EfficientNetModel

    def efficientnet(width: float, depth: float, top: int) -> nn.Module:
        # transformers scales all channels by the width but those of the last BatchNorm, whose default is B7's.
        config = EfficientNetConfig(width_coefficient=width, depth_coefficient=depth, hidden_dim=top, image_size=512)
        return EfficientNetModel(config).eval()

    torch.manual_seed(0)
    # Width and depth: table 1 and the scaling of Tan & Le, ICML 2019, arXiv:1905.11946.
    yield "EfficientNet-B0, 512 px (Deeplasia's kind)", efficientnet(1.0, 1.0, 1280), 512
    yield "EfficientNet-B4, 512 px (Deeplasia's kind)", efficientnet(1.4, 1.8, 1792), 512
    tiny = ConvNextV2Config(depths=[3, 3, 9, 3], hidden_sizes=[96, 192, 384, 768])
    yield (
        "three ConvNeXtV2-tiny, 512 px (ianpan's kind)",
        _Ensemble([ConvNextV2Model(tiny).eval() for _ in range(3)]),
        512,
    )
    yield "VGG19 with attention, 384 px (the reference)", BoneAgeModel(BoneAgeConfig()).eval(), 384


class _Ensemble(nn.Module):
    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, pixel_values: torch.Tensor) -> list[Any]:
        return [member(pixel_values) for member in self.members]


def _call(network: nn.Module, size: int, batch: int) -> Callable[[], object]:
    """A forward pass on noise, in the memory layout that the pipeline uses."""
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.contiguous(memory_format=torch.channels_last)
    module: Any = network.eval()  # torch's stubs lack this argument of Module.to
    module.to(memory_format=torch.channels_last)
    if isinstance(network, BoneAgeModel) and network.config.uses_sex:
        sex = torch.zeros(batch, dtype=torch.int64)
        return lambda: network(images, sex=sex)
    return lambda: network(images)


def _files() -> dict[str, bytes]:
    from PIL import Image

    small = draw(120, "female", seed=0)
    large = small.resize((FILE_SIZE[1], FILE_SIZE[0]), Image.Resampling.BICUBIC)
    side = small.resize((299, 299), Image.Resampling.BICUBIC)
    name = f"file to months, PNG {FILE_SIZE[1]} x {FILE_SIZE[0]}"
    return {name: png_bytes(large), "file to months, PNG 299 x 299": png_bytes(side)}


def _file_to_months(pipe: BoneAgePipeline, content: bytes, batch: int) -> Callable[[], object]:
    sex = "female" if pipe.model.config.uses_sex else None
    if batch == 1:
        return lambda: pipe(content, sex=sex)
    return lambda: pipe([content] * batch, sex=[sex] * batch if sex else None, batch_size=batch)


def timed(call: Callable[[], object], *, repeats: int) -> list[float]:
    """Seconds of each call, after two that warm up; calls of over a second get a fifth of the repeats, but 3."""
    call()
    began = time.perf_counter()
    call()
    if time.perf_counter() - began > 1:
        repeats = max(3, repeats // 5)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def gflop_per_image(call: Callable[[], object]) -> float:
    """Billions of floating point operations (a multiplication and an addition are two) of convolutions and matrix
    products in one call, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 1e9


def measured_peak(dtype: torch.dtype, *, threads: int) -> dict[str, float]:
    """GFLOP/s that this machine reaches at best: of square matrix products of three sizes, and of a large 3 x 3
    convolution in the memory layout that the pipeline uses, which is a matrix product too. Fastest of five each.

    Returns:
        "matmul" and "convolution" -> GFLOP/s, a multiplication and an addition counted as two.
    """
    found = {"matmul": 0.0}
    with _threads(threads), torch.inference_mode():
        for side in _MATMUL_SIDES:
            one, other = (torch.randn(side, side).to(dtype) for _ in range(2))
            times = timed(partial(torch.mm, one, other), repeats=5)
            found["matmul"] = max(found["matmul"], 2 * side**3 / min(times) / 1e9)
        channels, side, batch = _CONVOLUTION
        layer = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        network: Any = layer.to(dtype)  # torch's stubs lack this argument of Module.to
        network.to(memory_format=torch.channels_last)
        images = torch.randn(batch, channels, side, side).to(dtype).contiguous(memory_format=torch.channels_last)
        times = timed(partial(network, images), repeats=5)
        found["convolution"] = batch * 2 * channels * channels * 9 * side**2 / min(times) / 1e9
    return found


def _peaks(threads_tried: Sequence[int]) -> dict[str, dict[str, float]]:
    return {
        _peak_name(precision, threads): measured_peak(dtype, threads=threads)
        for precision, dtype in _PRECISIONS.items()
        for threads in threads_tried
    }


def _peak_name(precision: str, threads: int) -> str:
    return f"{precision}, {threads} threads"


# A process takes over the peak of ru_maxrss from the one that started it, which is larger here: on Linux VmHWM is its
# own.
_COLD_START = """
import json, resource, sys, time
from pathlib import Path
began = time.perf_counter()
from boneage_hf import load_pipeline
pipe = load_pipeline(sys.argv[1], device="cpu")
pipe(sys.argv[2], sex="female" if pipe.model.config.uses_sex else None)
seconds = time.perf_counter() - began
try:
    lines = Path("/proc/self/status").read_text().splitlines()
    memory = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
except (OSError, StopIteration):
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([seconds, memory]))
"""


def cold_start(checkpoint: str) -> dict[str, float]:
    """Seconds from the first import to the first answer in a fresh process, and its peak memory.

    Raises:
        InputError: the fresh process gave no answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drawn.png"
        path.write_bytes(next(iter(_files().values())))
        done = subprocess.run(
            [sys.executable, "-c", _COLD_START, checkpoint, str(path)], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise InputError("A fresh process could not read a drawn hand with this checkpoint: try `boneage predict`.")
    seconds, memory = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": seconds, "peak_memory_mb": memory / 1024**2}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
