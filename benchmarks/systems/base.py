"""What every system is: a name, what it was trained on, and one method from images to months."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from boneage_hf.errors import InputError
from boneage_hf.sex import SEXES

from ..protocol import TRAINING_PARTS, Protocol, did_you_mean

#: Begins the name of data that hold no RSNA image, as somebody says who knows.
OTHER_DATA = "other:"

_LABELS = "labels "


@dataclass(frozen=True, kw_only=True)
class SystemOptions:
    """What the command line says about a system beside its kind.

    Attributes:
        data: folder of the prepared data set, for what is fitted to its training split.
        batch_size: images at a time in a network.
        flip_average: average the predictions for an image and its mirror image, where the system can; None: as
            the checkpoint says.
        device: as `torch.device` takes it; None chooses.
        trained_on: as [`check_trained_on`] allows, where the system cannot know itself; None is unknown.
        trust_remote_code: the user allows Python code from the Hub to run.
        crop_model: Hub id or folder of a model that crops before the model itself.
        histogram_matching: match grey levels to the model's reference image before it.
        unit: of a table of predictions, "months" or "years"; id_column, prediction_column, truth_column: its columns.
    """

    data: Path
    batch_size: int = 32
    flip_average: bool | None = None
    device: str | None = None
    trained_on: tuple[str, ...] | None = None
    trust_remote_code: bool = False
    crop_model: str | None = None
    histogram_matching: bool = True
    unit: str = "months"
    id_column: str = "id"
    prediction_column: str = "predicted_months"
    truth_column: str | None = None


class System(abc.ABC):
    """A bone-age system on trial.

    Attributes:
        name: as reports show it.
        revision: names all that decides a prediction: a commit, a version, a hash.
        trained_on: what it has seen: names in `protocol.TRAINING_PARTS`, "other: ..." for data that somebody says is
            no part of them, "labels ..." with the first 12 digits of a label fingerprint of no known part; None is
            unknown.
        preprocessing: what is done to an image before the network sees it.
        uses_sex: whether a prediction depends on the sex that is given with an image; None is unknown.
        interval: what its intervals are made with (`interval` of a `BoneAgeConfig`), a function of the prediction
            alone; None where it has none or they come otherwise.
        reads_images: whether its predictions rest on the images of the prepared data set.
        flip_average: whether predictions are averages over an image and its mirror image.
        resumable: whether predictions are dear enough to be kept part by part while a run lasts.
    """

    name: str
    revision: str
    trained_on: tuple[str, ...] | None = None
    preprocessing: str = "not stated"
    uses_sex: bool | None = None
    interval: dict[str, Any] | None = None
    reads_images: bool = True
    flip_average: bool = False
    resumable: bool = True

    @abc.abstractmethod
    def predict(self, dataset: Any) -> pd.DataFrame:
        """Predict a data set with the columns `id`, `image`, `sex` (and its reference ages, which are not for it).

        Returns:
            One row per image: `id`, `predicted_months`; optionally `interval_low_months`, `interval_high_months`.
        """


def leakage(trained_on: Sequence[str] | None, protocol: Protocol) -> str:
    """ "none", "unknown", or "trained on ..." where a system has seen images of the test.

    Data that are known by the fingerprint of their labels alone may hold images of the test: "unknown", unless the
    fingerprint is that of the test.
    """
    if trained_on is None:
        return "unknown"
    own = f"{_LABELS}{(protocol.ground_truth_fingerprint or '')[:12]}"
    seen = [part for part in trained_on if part in protocol.overlaps or part == own]
    if seen:
        return f"trained on {', '.join(seen)}"
    known = all(part in TRAINING_PARTS or part.startswith(OTHER_DATA) for part in trained_on)
    return "none" if known else "unknown"


def labels_name(fingerprint: str) -> str:
    """Name of data in `trained_on` by the fingerprint of their labels: that of a known part, or "labels ..."."""
    by_fingerprint = {digest: name for name, digest in TRAINING_PARTS.items()}
    return by_fingerprint.get(fingerprint, f"{_LABELS}{fingerprint[:12]}")


def check_trained_on(parts: Sequence[str]) -> tuple[str, ...]:
    """What a user says that a system has seen: names in `TRAINING_PARTS`, or "other: ..." in own words.

    Raises:
        InputError: another name, which would pass for data without an image of the test.
    """
    for part in parts:
        if part not in TRAINING_PARTS and not (part.startswith(OTHER_DATA) and part.removeprefix(OTHER_DATA).strip()):
            raise InputError(
                f'there is no training part "{part}"; {did_you_mean(part, TRAINING_PARTS)} For data without any RSNA '
                f'image write "{OTHER_DATA} NAME".'
            )
    return tuple(parts)


def sexes_of(dataset: Any) -> list[str]:
    """ "female" or "male" for every image of a split, in its order."""
    return [SEXES[code] for code in dataset["sex"]]
