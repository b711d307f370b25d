"""Images as the image processor leaves them, once per data set and processor: uint8 at the model's size, on disk."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from .errors import InputError
from .image_processing_boneage import BoneAgeImageProcessor
from .radiograph import read

_BATCH = 256

#: Raised whenever `radiograph.read` or the image processor gives other pixels for the same file and settings, so that
#: what an earlier version cached is not used.
_PREPARATION_VERSION = 1


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
        InputError: an image cannot be read (its row id is named), or the cache cannot be written.
    """
    undecoded = without_decoding(dataset)
    months = np.asarray(undecoded["bone_age_months"], dtype=np.float32)
    sex = np.asarray(undecoded["sex"], dtype=np.int64)
    ids = tuple(undecoded["id"])
    shape = (len(ids), processor.size["height"], processor.size["width"])
    if cache is None:
        pixels = np.empty(shape, np.uint8)
        for index, image in enumerate(_prepared(undecoded, processor, name=name, progress=progress)):
            pixels[index] = image
        return PreparedImages(pixels, sex, months, ids)
    target = cache / f"{_content_key(undecoded, processor)}.npy"
    if not target.is_file():
        try:
            _write(target, shape, _prepared(undecoded, processor, name=name, progress=progress))
        except OSError as error:
            raise InputError(
                f"The cache of prepared images cannot be written ({error.strerror}): make room, or let "
                "BONEAGE_RUNS name a folder on another disk."
            ) from None
    return PreparedImages(np.load(target, mmap_mode="r"), sex, months, ids)


def _write(target: Path, shape: tuple[int, ...], images: Iterable[np.ndarray]) -> None:
    """A .npy file of `images`, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp.npy")
    try:
        # In order and not through a memory map: there a full disk kills the process (SIGBUS).
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for image in images:
                file.write(image.tobytes())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def without_decoding(dataset: Any) -> Any:
    from datasets import Image

    return dataset.cast_column("image", Image(decode=False))


def _content_key(undecoded: Any, processor: BoneAgeImageProcessor) -> str:
    """sha256 of the processor's settings and of every image's bytes in order."""
    settings = {key: value for key, value in processor.to_dict().items() if key not in ("auto_map", "processor_class")}
    settings["preparation_version"] = _PREPARATION_VERSION
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for batch in undecoded.select_columns(["id", "image"]).iter(batch_size=_BATCH):
        for row_id, image in zip(batch["id"], batch["image"], strict=True):
            digest.update(row_id.encode())
            digest.update(image["bytes"])
    return digest.hexdigest()[:32]


def _prepared(undecoded: Any, processor: BoneAgeImageProcessor, *, name: str, progress: bool) -> Iterator[np.ndarray]:
    with tqdm(total=len(undecoded), desc=f"prepare {name}", unit="image", disable=not progress) as bar:
        for batch in undecoded.iter(batch_size=_BATCH):
            for row_id, image in zip(batch["id"], batch["image"], strict=True):
                yield prepare_image(image["bytes"], processor, row_id=row_id)
            bar.update(len(batch["id"]))


def prepare_image(
    content: bytes,
    processor: BoneAgeImageProcessor,
    *,
    row_id: str,
    alter: Callable[[Image.Image], Image.Image] | None = None,
) -> np.ndarray:
    """One stored image -> (S, S) uint8, read exactly as the pipeline reads a file.

    Args:
        alter: takes and returns a picture of mode "L"; what it returns is what the processor gets.
    """
    try:
        grey = read(content).image
        return processor.prepare(grey if alter is None else alter(grey))
    except InputError as error:
        raise InputError(f"Image of row {row_id}: {error}") from None
