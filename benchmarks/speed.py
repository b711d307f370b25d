"""Images per second of the training loop, and what reading, augmenting and standardising the images costs of it."""

import dataclasses
import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from boneage_hf import augmentation
from boneage_hf.errors import InputError
from boneage_hf.files import write_text
from boneage_hf.prepared import PreparedImages
from boneage_hf.recipes import Recipe
from boneage_hf.training import TrainingRun, augmentation_generator, build_model, make_batch, make_processor

from .provenance import check_out, seal

#: Where the images of a step come from, see [`TrainingSpeed`].
SOURCES = ("from_disk", "from_memory", "ready")

#: Images in the trial data set. Freshly written, they lie in the system's cache of files, as prepared images do after
#: the first epoch; a first read from a slow disk is not measured.
_IMAGES = 2048


@dataclasses.dataclass(frozen=True)
class TrainingSpeed:
    """Median images per second of whole training steps, by where their images come from.

    Args:
        from_disk: as training does: prepared uint8 images in a memory-mapped file, then augmentation.
        from_memory: the same from an array in memory.
        ready: batches made beforehand, neither read nor augmented: the network and the optimizer alone.
    """

    recipe: Recipe
    steps: int
    from_disk: float
    from_memory: float
    ready: float

    def __str__(self) -> str:
        recipe = self.recipe
        return "\n".join(
            [
                f"{recipe.backbone}, {recipe.image_size} px, batch {recipe.batch_size}, median of {self.steps} steps:",
                f"  prepared images on disk    {self.from_disk:7.1f} images/s",
                f"  prepared images in memory  {self.from_memory:7.1f} images/s",
                f"  batches made beforehand    {self.ready:7.1f} images/s",
                f"  disk against memory {self.from_disk / self.from_memory:.1%}, "
                f"against batches made beforehand {self.from_disk / self.ready:.1%}",
            ]
        )


def training_speed(
    recipe: Recipe, *, steps: int = 20, mixed_precision: str = "bf16", out: Path | None = None
) -> TrainingSpeed:
    """Time the training loop on pictures of noise, the three sources in turn so that a busy moment meets all alike.

    Args:
        out: gets `training.csv` (images per second by source) and `manifest.json`.

    Raises:
        InputError: fewer than one step, or `out` holds something else or cannot be written.
    """
    if steps < 1:
        raise InputError(f"The number of steps must be 1 or more, not {steps}.")
    if out is not None:
        check_out(out, ("training.csv", "manifest.json"), task="training-speed")
    generator = np.random.default_rng(0)
    shape = (_IMAGES, recipe.image_size, recipe.image_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prepared.npy"
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        np.save(path, pixels)
        memory = PreparedImages(
            pixels=pixels,
            sex=generator.integers(0, 2, _IMAGES),
            bone_age_months=generator.uniform(1, 228, _IMAGES).astype(np.float32),
            ids=tuple(map(str, range(_IMAGES))),
        )
        disk = dataclasses.replace(memory, pixels=np.load(path, mmap_mode="r"))
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.accelerator.is_available())
        processor = make_processor(recipe)
        model, _ = build_model(recipe, initial_weights="random", train=memory)
        run = TrainingRun(
            accelerator,
            Path(folder),
            recipe,
            model,
            processor,
            train_images=disk,
            validation_images=memory,
            accumulation=1,
        )
        run.wrapped.train()
        order = generator.permutation(_IMAGES)
        size = recipe.batch_size
        ready = make_batch(
            memory,
            order[:size],
            augmentation.sample(
                augmentation.AUGMENTATIONS[recipe.augmentation], size, augmentation_generator(recipe, 0, 0)
            ),
            processor=processor,
            uses_sex=model.config.uses_sex,
            device=accelerator.device,
        )
        seconds: dict[str, list[float]] = {source: [] for source in SOURCES}
        for step in range(steps + 2):
            for source, times in seconds.items():
                began = time.perf_counter()
                if source == "ready":
                    run.step([ready], epoch=0, step=0)
                else:
                    run.train_images = disk if source == "from_disk" else memory
                    run.step(run.batches(order, epoch=0, step=step % (_IMAGES // size)), epoch=0, step=0)
                if step >= 2:  # the first two warm up
                    times.append(time.perf_counter() - began)
        found = TrainingSpeed(
            recipe=recipe,
            steps=steps,
            **{source: size / statistics.median(times) for source, times in seconds.items()},
        )
    if out is not None:
        _write(found, mixed_precision, out)
    return found


def _write(found: TrainingSpeed, mixed_precision: str, out: Path) -> None:
    rows = [f"{source},{getattr(found, source):.4g}" for source in SOURCES]
    table = "\n".join(["images_from,images_per_second", *rows, ""])
    manifest = {
        "task": "training-speed",
        "recipe": dataclasses.asdict(found.recipe),
        "steps": found.steps,
        "mixed_precision": mixed_precision,
        "table_sha256": hashlib.sha256(table.encode()).hexdigest(),
        **seal(),
    }
    write_text(out / "training.csv", table)
    write_text(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")
