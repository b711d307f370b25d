"""The one prediction loop: a split of a data set -> a table of predictions and its error measures."""

import datetime
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from . import __version__
from .data import fingerprint, load_split, read_manifest
from .errors import InputError
from .evaluation_plots import draw_evaluation
from .files import write_text
from .hub import storage_tensors
from .image_processing_boneage import BoneAgeImageProcessor
from .interval_boneage import interval_months
from .memory import keep_freed_memory
from .metrics import by_group, coverage_metrics, error_metrics, error_over_age, over_age
from .modeling_boneage import BoneAgeModel
from .pipeline_boneage import BoneAgePipeline, predict_batch
from .prepared import prepare_image, without_decoding
from .sex import SEXES
from .splits import REFERENCE_SEED


@torch.inference_mode()
def predict_prepared(
    model: BoneAgeModel,
    processor: BoneAgeImageProcessor,
    pixels: np.ndarray,
    sex: np.ndarray,
    *,
    batch_size: int = 64,
    flip_average: bool | None = None,
) -> np.ndarray:
    """Predict bone age for images that `processor.prepare` has seen.

    Args:
        model: put into evaluation mode.
        pixels: (N, S, S) uint8.
        sex: (N,) integers, 0 female and 1 male; unused by a model without sex input.

    Returns:
        (N,) float32, months.
    """
    model.eval()
    device = model.device
    months = []
    for start in range(0, len(pixels), batch_size):
        part = slice(start, start + batch_size)
        batch = torch.from_numpy(np.array(pixels[part])).to(device)  # a copy: a memory map is not writable
        pixel_values = processor.to_pixel_values(batch).to(model.dtype)
        codes = torch.from_numpy(np.asarray(sex[part])).to(device) if model.config.uses_sex else None
        output = predict_batch(model, pixel_values, sex=codes, flip_average=flip_average)
        months.append(output.bone_age_months.float().cpu().numpy())
    return np.concatenate(months) if months else np.empty(0, np.float32)


@dataclass(frozen=True)
class StorageDifference:
    """By how much float16 storage moves predictions, in months, over `n` images."""

    n: int
    mean_months: float
    largest_months: float

    @property
    def allowed(self) -> bool:
        """Far below what a reader could see: 0.05 month on average and 0.5 at most."""
        return self.mean_months < 0.05 and self.largest_months <= 0.5


def float16_difference(
    model: BoneAgeModel, processor: BoneAgeImageProcessor, pixels: np.ndarray, sex: np.ndarray
) -> StorageDifference:
    """Predictions with the weights as they are against those with the weights as float16 would store them.

    Args:
        pixels, sex: as of [`predict_prepared`]; at least one image.

    Raises:
        InputError: a weight does not fit into float16.
    """
    # Fresh models: a training model may run in mixed precision, whose rounding is larger than what is looked for.
    exact, stored = BoneAgeModel(model.config), BoneAgeModel(model.config)
    for own in (exact, stored):
        torch.nn.Module.to(own, model.device)  # transformers' own `to` has no types
    exact.load_state_dict(model.state_dict())
    stored.load_state_dict({name: value.float() for name, value in storage_tensors(model).items()}, strict=True)
    months = [predict_prepared(own, processor, pixels, sex).astype(np.float64) for own in (exact, stored)]
    moved = np.abs(months[0] - months[1])
    return StorageDifference(len(moved), float(moved.mean()), float(moved.max()))


def predict_dataset(
    pipe: BoneAgePipeline,
    dataset: Any,
    *,
    batch_size: int = 32,
    flip_average: bool | None = None,
    progress: bool = True,
    alter: Callable[[Image.Image], Image.Image] | None = None,
) -> pd.DataFrame:
    """Predictions of a pipeline for a split, in its order.

    Args:
        alter: changes each 8-bit grey picture before the image processor gets it, for tests of robustness.

    Returns:
        Columns `id`, `predicted_months`, `reference_months`, `sex`; where the model has an interval also
        `interval_low_months`, `interval_high_months`.

    Raises:
        InputError: an image cannot be read (its row id is named), the split is empty, or the batch size is below 1.
    """
    if len(dataset) == 0:
        raise InputError("This split holds no image; choose another one.")
    if batch_size < 1:
        raise InputError(f"The batch size must be 1 or more, not {batch_size}.")
    if pipe.model.device.type == "cpu":
        keep_freed_memory()
    undecoded = without_decoding(dataset)
    parts = []
    with tqdm(total=len(dataset), desc="predict", unit="image", disable=not progress) as bar:
        for batch in undecoded.iter(batch_size=batch_size):
            pixels = np.stack(
                [
                    prepare_image(image["bytes"], pipe.image_processor, row_id=row_id, alter=alter)
                    for row_id, image in zip(batch["id"], batch["image"], strict=True)
                ]
            )
            sex = np.asarray(batch["sex"], dtype=np.int64)
            months = predict_prepared(
                pipe.model, pipe.image_processor, pixels, sex, batch_size=batch_size, flip_average=flip_average
            )
            parts.append(
                pd.DataFrame(
                    {
                        "id": batch["id"],
                        "predicted_months": months.astype(np.float64),
                        "reference_months": np.asarray(batch["bone_age_months"], dtype=np.float64),
                        "sex": [SEXES[code] for code in sex],
                    }
                )
            )
            bar.update(len(pixels))
    table = pd.concat(parts, ignore_index=True)
    if pipe.model.config.interval is not None:
        low, high = interval_months(table["predicted_months"].to_numpy(), pipe.model.config.interval)
        table = table.assign(interval_low_months=low, interval_high_months=high)
    return table


def predictions_csv(table: pd.DataFrame) -> str:
    """The text of a prediction file that may be published: `id, predicted_months` with four decimals, nothing else."""
    return table[["id", "predicted_months"]].to_csv(index=False, float_format="%.4f", lineterminator="\n")


def summarise(
    table: pd.DataFrame, *, checkpoint: str, revision: str, protocol: str, split: str, flip_average: bool
) -> dict[str, Any]:
    """Error measures of a prediction table with all that a reported figure has to carry.

    `interval` holds the coverage, see [`boneage_hf.metrics.coverage_metrics`], or None if the model has no interval;
    `bland_altman` and `equal_over_age` are as of [`boneage_hf.metrics.over_age`].
    """
    predicted, reference = table["predicted_months"].to_numpy(), table["reference_months"].to_numpy()
    groups = by_group(predicted, reference, sex=table["sex"].tolist())
    return {
        "checkpoint": checkpoint,
        "revision": revision,
        "protocol": protocol,
        "split": split,
        "n": len(table),
        "flip_average": flip_average,
        "metrics": error_metrics(predicted, reference),
        "groups": groups.astype(object).where(groups.notna(), None).to_dict(orient="records"),
        "error_over_age": error_over_age(predicted, reference),
        # Of predictions as the published file has them: whoever has it and the labels finds the very same p-value.
        **over_age(table.assign(predicted_months=predicted.round(4))),
        "interval": coverage_metrics(table) if "interval_low_months" in table.columns else None,
        "data_fingerprint": fingerprint(table["id"].tolist(), table["reference_months"].tolist()),
        "predictions_sha256": hashlib.sha256(predictions_csv(table).encode()).hexdigest(),
        "package_version": __version__,
        "commit": git_commit(),
        "versions": package_versions(("torch", "transformers", "datasets", "numpy", "pillow")),
        "date": datetime.date.today().isoformat(),
    }


def evaluate_checkpoint(
    checkpoint: str,
    dataset: str | Path,
    *,
    split: str,
    out: Path,
    batch_size: int = 32,
    flip_average: bool | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Predict a split and write `predictions.csv`, `table.csv`, `metrics.json` and three plots into the folder `out`.

    `predictions.csv` holds ids and predictions only; `table.csv` adds references, sex and the ends of the
    interval, for the user's disk only.

    Args:
        checkpoint: folder, Hub id or `"default"`.
        dataset: folder written by `boneage prepare`.
        split: train, validation, selection, calibration or test.

    Returns:
        The content of `metrics.json`.
    """
    from .hub import checkpoint_revision, load_pipeline

    rows, manifest = load_split(dataset, split), read_manifest(dataset)
    pipe = load_pipeline(checkpoint)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The results cannot be written ({error.strerror}); give another --out.") from None
    table = predict_dataset(pipe, rows, batch_size=batch_size, flip_average=flip_average, progress=progress)
    summary = summarise(
        table,
        checkpoint=Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint,
        revision=checkpoint_revision(pipe),
        protocol=protocol_name(manifest, split, len(table)),
        split=split,
        flip_average=pipe.model.config.flip_average if flip_average is None else flip_average,
    )
    write_text(out / "predictions.csv", predictions_csv(table))
    write_text(out / "table.csv", table.to_csv(index=False))
    write_text(out / "metrics.json", json.dumps(summary, indent=2) + "\n")
    draw_evaluation(table, out, title=f"{summary['checkpoint']} {summary['revision']}, {summary['protocol']}")
    return summary


def protocol_name(manifest: Mapping[str, Any], split: str, n: int) -> str:
    """`reference-test-1024` for the test part of the RSNA training set, the like for other parts and counts.

    Args:
        manifest: as [`boneage_hf.data.read_manifest`] returns it. The challenge's own parts are `official-...`, drawn
            hands `phantom-...`; a reference split with another seed ends in it.
    """
    if manifest["kind"] != "rsna":
        return f"{manifest['kind']}-{split}-{n}"
    rule, seed = manifest["settings"]["split"], manifest["settings"]["seed"]
    other_seed = f"-seed{seed}" if rule == "reference" and seed != REFERENCE_SEED else ""
    return f"{rule}-{split}-{n}{other_seed}"


def package_versions(names: Sequence[str]) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def git_commit() -> str | None:
    """Commit of the checkout that the package runs from, with `-dirty` where it differs; None outside of one."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def hardware() -> dict[str, Any]:
    """Architecture, processor, logical cores, torch's threads and accelerator; None where the system does not say."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None
