"""Feature maps of a frozen backbone, computed once and kept on disk: for training attention and head alone.

With a frozen backbone an epoch repeats the same costly pass over the same pixels. Here each image goes through the
backbone in a fixed number of augmented views (or one unchanged view), and training reads those.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock
from tqdm.auto import tqdm

from . import augmentation
from .errors import InputError
from .image_processing_boneage import BoneAgeImageProcessor
from .modeling_boneage import BoneAgeModel
from .prepared import PreparedImages

#: Raised whenever the same images, processor and backbone give other features.
_VERSION = 1

#: Seconds to wait for another computation of the same features before it is said what is waited for.
_PATIENCE = 1.0


@dataclass(frozen=True)
class CachedFeatures:
    """Feature maps of one split.

    Args:
        maps: (views * N, C, h, w) float16; view v of image i is row `v * N + i`.
        views: how many views there are.
    """

    maps: np.ndarray
    views: int

    def __len__(self) -> int:
        return len(self.maps) // self.views

    def of(self, indices: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Maps of some images in the view given for each: (n,) and (n,) -> (n, C, h, w) float16."""
        return np.stack([self.maps[view * len(self) + index] for index, view in zip(indices, views, strict=True)])


def cached_features(
    model: BoneAgeModel,
    processor: BoneAgeImageProcessor,
    images: PreparedImages,
    *,
    cache: Path,
    name: str,
    changes: augmentation.Augmentation,
    views: int,
    seed: int,
    bfloat16: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> CachedFeatures:
    """Run the backbone over every view of every image, or reuse what an earlier call with the same inputs wrote.

    The file is named by a hash of pixels, processor, backbone weights, augmentation, seed and precision. An
    interrupted computation goes on where it stopped, and gives the same features as an uninterrupted one. Of several
    at the same time one computes, and the others wait for it and read what it wrote.

    Args:
        model: its backbone, in evaluation mode, on the model's device.
        cache: folder of the cache; a view of VGG19 at 384 px takes 147 kB an image.
        name: shown beside the progress bar.
        changes: ranges of the augmentation; unchanged images for `AUGMENTATIONS["none"]`.
        views: 1 or more.
        seed: of the augmentation.
        bfloat16: run the backbone in bf16 autocast.

    Raises:
        InputError: features beyond the range of float16, a cache that cannot be written, or one that is damaged.
    """
    settings = {
        "version": _VERSION,
        "processor": {key: value for key, value in processor.to_dict().items() if key != "auto_map"},
        "backbone": hash_of_tensors(model.backbone),
        "changes": repr(changes),
        "views": views,
        "seed": seed,
        "batch_size": batch_size,  # decides which augmentation an image gets, and rounding
        "bfloat16": bfloat16,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    add_pixels(digest, images)
    shape = (views * len(images), int(model.backbone.num_features), model.grid, model.grid)
    target = cache / f"{digest.hexdigest()[:32]}.f16"
    if not target.is_file():
        batches = _Batches(model, processor, images, changes, seed=seed, bfloat16=bfloat16, batch_size=batch_size)
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _alone(target, name=name, progress=progress):
                if not target.is_file():  # else who was first has written it meanwhile
                    _write(target, batches, shape=shape, views=views, name=name, progress=progress)
        except OSError as error:
            raise InputError(
                f"The cache of features cannot be written ({error.strerror}): make room, lower cached_views, or let "
                "BONEAGE_RUNS name a folder on another disk."
            ) from None
    size, wanted = target.stat().st_size, _bytes_of(shape)
    if size != wanted:
        raise InputError(
            f"The cache of features {target} is damaged ({size} bytes instead of {wanted}): delete it, and it is "
            "computed anew."
        )
    return CachedFeatures(np.memmap(target, np.float16, mode="r", shape=shape), views)


@dataclass(frozen=True)
class _Batches:
    """The feature maps of a batch, whatever was computed before it."""

    model: BoneAgeModel
    processor: BoneAgeImageProcessor
    images: PreparedImages
    changes: augmentation.Augmentation
    seed: int
    bfloat16: bool
    batch_size: int

    @torch.inference_mode()
    def compute(self, view: int, start: int) -> np.ndarray:
        """Maps (n, C, h, w) float16 of the images from `start` on."""
        device = self.model.device
        pixels = torch.from_numpy(np.array(self.images.pixels[start : start + self.batch_size])).to(device)
        name = hashlib.sha256(f"view:{self.seed}:{view}:{start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(name[:8], "little") >> 1)
        parameters = augmentation.sample(self.changes, len(pixels), generator)
        if self.changes != augmentation.AUGMENTATIONS["none"]:
            pixels = augmentation.apply(pixels, parameters)
        values = self.processor.to_pixel_values(pixels).contiguous(memory_format=torch.channels_last)
        self.model.backbone.eval()
        with torch.autocast(device.type, torch.bfloat16) if self.bfloat16 else nullcontext():
            maps = self.model.backbone(values).half()
        if not bool(torch.isfinite(maps).all()):
            raise InputError("The backbone's features leave the range of float16: train without cached_views.")
        return maps.cpu().contiguous().numpy()


def _bytes_of(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * np.dtype(np.float16).itemsize


@contextmanager
def _alone(target: Path, *, name: str, progress: bool) -> Iterator[None]:
    """Within the block no other process on this disk is in the block for the same target. The lock file stays: to
    delete it would let one process lock the deleted file and another one a new one."""
    lock = target.with_suffix(".lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=_PATIENCE))
        except TimeoutError:
            if progress:
                tqdm.write(f"another training computes the features of {name}: waiting for it")
            stack.enter_context(WeakFileLock(lock))
        yield


def _write(target: Path, batches: _Batches, *, shape: tuple[int, ...], views: int, name: str, progress: bool) -> None:
    """The rows in order, appended to a file that gets its name only when it is whole."""
    unfinished = target.with_suffix(".part")
    images, size = len(batches.images), batches.batch_size
    row_bytes = _bytes_of(shape[1:])
    places = [(view, start) for view in range(views) for start in range(0, images, size)]
    with (
        unfinished.open("ab") as file,
        tqdm(total=shape[0], desc=f"features of {name}", unit="image", disable=not progress) as bar,
    ):
        done, whole = 0, 0
        for _, start in places:  # whole batches that an interrupted call has left
            rows = min(size, images - start)
            if (whole + rows) * row_bytes > file.tell():
                break
            done, whole = done + 1, whole + rows
        file.truncate(whole * row_bytes)
        file.seek(0, os.SEEK_END)
        bar.update(whole)
        for view, start in places[done:]:
            maps = batches.compute(view, start)
            file.write(maps.tobytes())
            bar.update(len(maps))
        file.flush()
        os.fsync(file.fileno())
    if unfinished.stat().st_size != _bytes_of(shape):
        unfinished.unlink()
        raise InputError(
            "The cache of features was written to by something else meanwhile and is deleted: start again, or let "
            "BONEAGE_RUNS name another folder."
        )
    unfinished.replace(target)


def add_pixels(digest: Any, images: PreparedImages) -> None:
    """Feed the pixels of the images to a hash of hashlib, a part at a time."""
    for start in range(0, len(images), 256):
        digest.update(np.ascontiguousarray(images.pixels[start : start + 256]).tobytes())


def hash_of_tensors(module: Any) -> str:
    """SHA-256 of a module's state: names, types and values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(str(value.dtype).encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
