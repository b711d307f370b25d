"""A finished checkpoint as a teacher: what it sees in each training image is a further target of a new backbone.

Labels alone teach a backbone from random weights slowly: one noisy number an image. The features that a finished
network has of the same image are a thousand numbers without a reader's noise (regression of a teacher's features from
a linear map of the student's: Romero et al. 2015, "FitNets", there at every position; here of the pooled features,
which two grids of different size have in common). The teacher looks once at each unchanged image, at its own size; the
student sees augmented views, at its size, and must find the same. The child's sex enters neither side: a teacher's
features are those before its head.
"""

import hashlib
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from .errors import InputError
from .features import add_pixels, hash_of_tensors
from .image_processing_boneage import BoneAgeImageProcessor
from .modeling_boneage import BoneAgeModel, attention_mean
from .prepared import PreparedImages

#: Raised whenever the same images and teacher give other features.
_VERSION = 1

#: SD over images of a pooled channel, below which it counts as constant. At each position the features are normalised,
#: so that channels that say something have an SD of some tenths.
_SILENT = 1e-3


class Student(nn.Module):
    """A network and the linear map from its pooled features to its teacher's; what a training step runs.

    Args:
        model: the student.
        teacher_channels: of the teacher's pooled features.
        weight: of the features' mean squared error, beside the loss over ages (scaled, so of order one as well).
    """

    def __init__(self, model: BoneAgeModel, teacher_channels: int, *, weight: float) -> None:
        super().__init__()
        self.model, self.weight = model, weight
        self.projection = nn.Linear(int(model.backbone.num_features), teacher_channels)

    def forward(self, *, teacher_features: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Inputs of [`BoneAgeModel`], labels among them, and the teacher's features (B, T) -> scalar loss."""
        output = self.model(**inputs, output_features=True)
        weights = output.attention.unsqueeze(1)  # (B, 1, h, w)
        with torch.autocast(weights.device.type, enabled=False):
            pooled = attention_mean(output.features, weights, epsilon=self.model.config.rescale_epsilon)  # (B, C)
            found = self.projection(pooled)  # (B, T)
        return output.loss + self.weight * nn.functional.mse_loss(found, teacher_features.float())


def teacher_features(
    teacher: BoneAgeModel,
    processor: BoneAgeImageProcessor,
    images: PreparedImages,
    *,
    cache: Path,
    bfloat16: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> np.ndarray:
    """The teacher's pooled features of each image, each channel with mean 0 and SD 1 over the images; (N, T) float32.

    Computed once and kept in `cache`, in a file named by a hash of pixels, processor, weights and precision.

    Args:
        teacher: in evaluation mode, on its device.
        processor: the teacher's, which has prepared the `images`.
        bfloat16: run the backbone in bf16 autocast.

    Raises:
        InputError: features that are not finite, or the cache cannot be written.
    """
    settings = {
        "version": _VERSION,
        "processor": {key: value for key, value in processor.to_dict().items() if key != "auto_map"},
        "teacher": [hash_of_tensors(part) for part in (teacher.backbone, teacher.feature_norm, teacher.attention)],
        "batch_size": batch_size,  # decides rounding
        "bfloat16": bfloat16,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    add_pixels(digest, images)
    target = cache / f"{digest.hexdigest()[:32]}.safetensors"
    try:
        return load_file(target)["features"]
    except (OSError, SafetensorError):
        pass  # none yet, or one that was not written to its end
    parts = []
    with tqdm(total=len(images), desc="the teacher's features", unit="image", disable=not progress) as bar:
        for start in range(0, len(images), batch_size):
            pixels = torch.from_numpy(np.array(images.pixels[start : start + batch_size])).to(teacher.device)
            parts.append(_pooled(teacher, processor.to_pixel_values(pixels), bfloat16=bfloat16))
            bar.update(len(pixels))
    pooled = np.concatenate(parts).astype(np.float64)
    if not np.isfinite(pooled).all():
        raise InputError("The teacher's features are not all finite: take another teacher.")
    # A channel that never changes says nothing: what is left of it is rounding, and stays near 0.
    spread = pooled.std(axis=0)
    found = ((pooled - pooled.mean(axis=0)) / np.where(spread > _SILENT, spread, 1)).astype(np.float32)
    # Another training may ask the same teacher just now: both write the same, each its own file.
    temporary = target.with_suffix(f".{os.getpid()}.part")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        save_file({"features": found}, temporary)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"The cache of the teacher's features cannot be written ({error}): make room, or let BONEAGE_RUNS name a "
            "folder on another disk."
        ) from None
    return found


@torch.inference_mode()
def _pooled(teacher: BoneAgeModel, pixel_values: torch.Tensor, *, bfloat16: bool) -> np.ndarray:
    """(B, 3, S, S) -> what the teacher's head is given, without the sex; (B, T) float32"""
    teacher.eval()
    values = pixel_values.contiguous(memory_format=torch.channels_last)
    with torch.autocast(values.device.type, torch.bfloat16) if bfloat16 else nullcontext():
        features = teacher.backbone(values)
    pooled, _ = teacher.attention(teacher.feature_norm(features.to(teacher.feature_norm.weight.dtype)))
    return pooled.float().cpu().numpy()
