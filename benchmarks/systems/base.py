"""What every system is: a name, what it was trained on, and one method from images to months."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from boneage_hf.sex import SEXES

from ..protocol import Protocol


@dataclass(frozen=True, kw_only=True)
class SystemOptions:
    """What the command line says about a system beside its kind.

    Attributes:
        data: folder of the prepared data set, for what is fitted to its training split.
        batch_size: images at a time in a network.
        flip_average: average the predictions for an image and its mirror image, where the system can; None: as
            the checkpoint says.
        device: as `torch.device` takes it; None chooses.
        trained_on: names in `TRAINING_PARTS`, where the system cannot know itself; None is unknown.
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
        trained_on: names in `protocol.TRAINING_PARTS` (or of other data) that it has seen; None is unknown.
        preprocessing: what is done to an image before the network sees it.
        flip_average: whether predictions are averages over an image and its mirror image.
        resumable: whether predictions are dear enough to be kept part by part while a run lasts.
    """

    name: str
    revision: str
    trained_on: tuple[str, ...] | None = None
    preprocessing: str = "not stated"
    flip_average: bool = False
    resumable: bool = True

    @abc.abstractmethod
    def predict(self, dataset: Any) -> pd.DataFrame:
        """Predict a data set with the columns `id`, `image`, `sex` (and its reference ages, which are not for it).

        Returns:
            One row per image: `id`, `predicted_months`; optionally `interval_low_months`, `interval_high_months`.
        """


def leakage(trained_on: Sequence[str] | None, protocol: Protocol) -> str:
    """ "none", "unknown", or "trained on ..." where a system has seen images of the test."""
    if trained_on is None:
        return "unknown"
    seen = [part for part in trained_on if part in protocol.overlaps]
    return f"trained on {', '.join(seen)}" if seen else "none"


def sexes_of(dataset: Any) -> list[str]:
    """ "female" or "male" for every image of a split, in its order."""
    return [SEXES[code] for code in dataset["sex"]]
