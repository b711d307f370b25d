"""The floor: every girl gets the mean of the girls in the training split, every boy that of the boys."""

from typing import Any

import numpy as np
import pandas as pd

from boneage_hf.data import load_split, read_manifest
from boneage_hf.errors import InputError
from boneage_hf.sex import SEXES

from .base import System, SystemOptions, labels_name, sexes_of


class ConstantSystem(System):
    """Says the training mean by sex and looks at no image."""

    name = "Constant (training mean by sex)"
    preprocessing = "none: it looks at no image"
    uses_sex = True
    reads_images = False
    resumable = False

    def __init__(self, mean_months: dict[str, float], *, trained_on: tuple[str, ...] | None) -> None:
        self.mean_months, self.trained_on = mean_months, trained_on
        self.revision = ", ".join(f"{sex} {mean_months[sex]:.4f}" for sex in SEXES)

    @classmethod
    def build(cls, argument: str, options: SystemOptions) -> "ConstantSystem":
        """Fitted to the training split of the prepared data set; takes no argument."""
        if argument:
            raise InputError(
                '"constant" takes nothing after its name; it is fitted to the data set\'s training split.'
            )
        columns = load_split(options.data, "train").select_columns(["sex", "bone_age_months"])
        sexes = np.asarray(sexes_of(columns), dtype=object)
        months = np.asarray(columns["bone_age_months"], dtype=np.float64)
        for sex in SEXES:
            if not (sexes == sex).any():
                raise InputError(f"no {sex} child is in the training split, so there is no mean; prepare more images.")
        digest = read_manifest(options.data)["splits"]["train"]["fingerprint"]
        means: dict[str, float] = {sex: float(months[sexes == sex].mean()) for sex in SEXES}
        return cls(means, trained_on=(labels_name(digest),))

    def predict(self, dataset: Any) -> pd.DataFrame:
        months = [self.mean_months[sex] for sex in sexes_of(dataset)]
        return pd.DataFrame({"id": dataset["id"], "predicted_months": months})
