"""A model from the Hub that brings its own code: ianpan/bone-age behind its crop model, or one with its interface."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModel

from boneage_hf.errors import InputError
from boneage_hf.prepared import without_decoding
from boneage_hf.radiograph import read

from .base import System, SystemOptions, sexes_of

MODEL, CROP_MODEL = "ianpan/bone-age", "ianpan/bone-age-crop"
REFERENCE_IMAGE = "ref_img.png"


class TransformersRemoteSystem(System):
    """Crops, matches grey levels to the model's reference image if asked to, predicts.

    Args:
        model: `preprocess(grey uint8 H x W)`, then `model(x (1, 1, h, w), female (1,) 0 or 1)` -> months.
        crop: `preprocess`, then `crop(x (1, 1, h, w), img_shape [[H, W]])` -> xmin, ymin, xmax, ymax in pixels.
        reference_image: (H, W) uint8 to match histograms to, or None for no matching.
    """

    uses_sex = True

    def __init__(
        self,
        model: Any,
        crop: Any,
        *,
        name: str,
        revision: str,
        trained_on: tuple[str, ...] | None,
        reference_image: np.ndarray | None = None,
        device: str = "cpu",
    ) -> None:
        self.model, self.crop = model.eval().to(device), crop.eval().to(device)
        self.device, self.reference_image = device, reference_image
        matched = (
            f"histogram matched to its {REFERENCE_IMAGE}" if reference_image is not None else "no histogram match"
        )
        # Wrong crop or skipped matching moves this model's result by more than 10 months: that is part of the system.
        self.preprocessing = f"cropped by its crop model; {matched}; its own preprocess"
        self.name, self.revision, self.trained_on = name, f"{revision}; {matched}", trained_on

    @classmethod
    def build(cls, argument: str, options: SystemOptions) -> "TransformersRemoteSystem":
        """`argument`: `ID[@REVISION]`, by default ianpan/bone-age; the crop model's id is that with `-crop`.

        Raises:
            InputError: remote code is not allowed, a model cannot be had, its code needs a package that is not
                installed, or ianpan/bone-age is told what it was trained on.
        """
        if not options.trust_remote_code:
            raise InputError(
                "this system runs Python code from its repository; read that code, then allow it with "
                "--trust-remote-code."
            )
        source, revision = _split(argument or MODEL)
        if source == MODEL and options.trained_on is not None:
            raise InputError(f"the card of {MODEL} says what it was trained on; leave out --trained-on.")
        crop_source, crop_revision = _split(options.crop_model or f"{source}-crop")
        model, crop = _load(source, revision), _load(crop_source, crop_revision)
        name = Path(source).name if Path(source).is_dir() else source
        # The card: all 14,036 images of training and validation.
        trained_on = ("rsna-training-12611", "rsna-validation-1425") if source == MODEL else options.trained_on
        return cls(
            model,
            crop,
            name=f"{name} + crop",
            revision=f"{_commit(model, revision)}, crop {_commit(crop, crop_revision)}",
            trained_on=trained_on,
            reference_image=_reference_image(source, revision) if options.histogram_matching else None,
            device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )

    def predict(self, dataset: Any) -> pd.DataFrame:
        undecoded = without_decoding(dataset)
        months = []
        for row_id, image, sex in zip(undecoded["id"], undecoded["image"], sexes_of(undecoded), strict=True):
            try:
                grey = np.asarray(read(image["bytes"]).image)
                months.append(self._predict_one(grey, female=sex == "female"))
            except InputError as error:
                raise InputError(f"Image of row {row_id}: {error}") from None
        return pd.DataFrame({"id": undecoded["id"], "predicted_months": months})

    @torch.inference_mode()
    def _predict_one(self, grey: np.ndarray, *, female: bool) -> float:
        shape = torch.tensor([grey.shape], device=self.device)
        box = torch.as_tensor(self.crop(self._tensor(self.crop.preprocess(grey)), shape)).reshape(-1)
        if box.numel() != 4 or not bool(torch.isfinite(box).all()):
            raise InputError("the crop model gave no box; check its revision.")
        height, width = grey.shape
        left, top, right, bottom = (round(float(end)) for end in box)
        left, right, top, bottom = max(left, 0), min(right, width), max(top, 0), min(bottom, height)
        if left >= right or top >= bottom:
            raise InputError("the crop model's box is empty; look at the image, or use another revision.")
        cropped = grey[top:bottom, left:right]
        if self.reference_image is not None:
            cropped = match_histograms(cropped, self.reference_image)
        months = self.model(self._tensor(self.model.preprocess(cropped)), torch.tensor([int(female)]).to(self.device))
        return float(torch.as_tensor(months).float().reshape(-1)[0])

    def _tensor(self, prepared: Any) -> torch.Tensor:
        """(h, w) of any number type -> (1, 1, h, w) float32."""
        return torch.as_tensor(np.asarray(prepared)).float()[None, None].to(self.device)


def match_histograms(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Map grey levels so that their cumulative distribution becomes that of another image.

    The rule of `skimage.exposure.match_histograms` for one channel: quantiles of the levels that occur, interpolated
    linearly. (Gonzalez RC, Woods RE: Digital Image Processing, histogram matching.)

    Args:
        image, reference: uint8 of any shape.

    Returns:
        uint8, shape of `image`.
    """
    _, where, counts = np.unique(image.ravel(), return_inverse=True, return_counts=True)
    wanted, wanted_counts = np.unique(reference.ravel(), return_counts=True)
    quantiles = np.cumsum(counts) / image.size
    mapped = np.interp(quantiles, np.cumsum(wanted_counts) / reference.size, wanted)
    return mapped[where].reshape(image.shape).astype(np.uint8)


def _split(argument: str) -> tuple[str, str | None]:
    source, _, revision = argument.partition("@")
    return source, revision or None


def _load(source: str, revision: str | None) -> Any:
    try:
        return AutoModel.from_pretrained(source, revision=revision, trust_remote_code=True)
    except ImportError as error:
        # transformers names them in its sentence, Python's own import in an attribute.
        named = re.search(r"not found in your environment: ([^\s,]+(?:, [^\s,]+)*?)\.(?:\s|$)", str(error))
        package = named[1] if named else error.name or "that it does not name"
        raise InputError(f"the model's code needs the package {package}; install it, then run again.") from None
    except (OSError, ValueError):
        raise InputError(
            "the model or its crop model is neither a folder nor a model that the Hub gives; check the spelling, the "
            "revision and the connection."
        ) from None


def _commit(model: Any, revision: str | None) -> str:
    return str(getattr(model.config, "_commit_hash", None) or revision or "local")


def _reference_image(source: str, revision: str | None) -> np.ndarray:
    try:
        local = Path(source) / REFERENCE_IMAGE
        path = local if Path(source).is_dir() else Path(hf_hub_download(source, REFERENCE_IMAGE, revision=revision))
        return np.asarray(read(path).image)
    except (OSError, InputError):
        raise InputError(
            f"the model has no readable {REFERENCE_IMAGE} to match histograms to; add --no-histogram-matching, which "
            "makes it another system."
        ) from None
