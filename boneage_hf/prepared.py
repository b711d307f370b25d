"""Images as the image processor leaves them, once per data set and processor: uint8 at the model's size, on disk."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .errors import InputError
from .image_processing_boneage import BoneAgeImageProcessor
from .radiograph import read

_BATCH = 256


@dataclass(frozen=True)
class PreparedImages:
    """One split, ready for the network.

    Args:
        pixels: (N, S, S) uint8, a memory map or an array.
        sex: (N,) int64, 0 female and 1 male.
        bone_age_months: (N,) float32.
        ids: N row ids.
    """

    pixels: np.ndarray
    sex: np.ndarray
    bone_age_months: np.ndarray
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


def prepare_images(
    dataset: Any, processor: BoneAgeImageProcessor, *, cache: Path | None, name: str, progress: bool = True
) -> PreparedImages:
    """Run the image processor over a split, or reuse what an earlier run with the same images and settings wrote.

    Args:
        dataset: a split as [`boneage_hf.data.load_split`] returns it.
        processor: its `prepare` is applied to each image.
        cache: folder of the cache, or None to keep the pixels in memory only.
        name: shown beside the progress bar.

    Raises:
        InputError: an image cannot be read (its row id is named).
    """
    undecoded = _without_decoding(dataset)
    months = np.asarray(undecoded["bone_age_months"], dtype=np.float32)
    sex = np.asarray(undecoded["sex"], dtype=np.int64)
    ids = tuple(undecoded["id"])
    shape = (len(ids), processor.size["height"], processor.size["width"])
    if cache is None:
        pixels = np.empty(shape, np.uint8)
        _fill(pixels, undecoded, processor, name=name, progress=progress)
        return PreparedImages(pixels, sex, months, ids)
    target = cache / f"{_content_key(undecoded, processor)}.npy"
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}.tmp.npy")
        try:
            written = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            _fill(written, undecoded, processor, name=name, progress=progress)
            written.flush()
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    return PreparedImages(np.load(target, mmap_mode="r"), sex, months, ids)


def _without_decoding(dataset: Any) -> Any:
    from datasets import Image

    return dataset.cast_column("image", Image(decode=False))


def _content_key(undecoded: Any, processor: BoneAgeImageProcessor) -> str:
    """sha256 of the processor's settings and of every image's bytes in order."""
    settings = {key: value for key, value in processor.to_dict().items() if key not in ("auto_map", "processor_class")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for batch in undecoded.select_columns(["id", "image"]).iter(batch_size=_BATCH):
        for row_id, image in zip(batch["id"], batch["image"], strict=True):
            digest.update(row_id.encode())
            digest.update(image["bytes"])
    return digest.hexdigest()[:32]


def _fill(
    pixels: np.ndarray, undecoded: Any, processor: BoneAgeImageProcessor, *, name: str, progress: bool
) -> None:
    position = 0
    with tqdm(total=len(pixels), desc=f"prepare {name}", unit="image", disable=not progress) as bar:
        for batch in undecoded.iter(batch_size=_BATCH):
            for row_id, image in zip(batch["id"], batch["image"], strict=True):
                pixels[position] = prepare_image(image["bytes"], processor, row_id=row_id)
                position += 1
            bar.update(len(batch["id"]))


def prepare_image(content: bytes, processor: BoneAgeImageProcessor, *, row_id: str) -> np.ndarray:
    """One stored image -> (S, S) uint8, read exactly as the pipeline reads a file."""
    try:
        return processor.prepare(read(content).image)
    except InputError as error:
        raise InputError(f"Image of row {row_id}: {error}") from None
