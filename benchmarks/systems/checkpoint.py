"""A checkpoint of this package: the packaged one, a folder, or a Hub id."""

from pathlib import Path
from typing import Any

import pandas as pd

from boneage_hf.evaluation import predict_dataset
from boneage_hf.hub import checkpoint_revision, load_pipeline
from boneage_hf.pipeline_boneage import BoneAgePipeline

from .base import System, SystemOptions, labels_name


class CheckpointSystem(System):
    """Predicts with the loop of `boneage evaluate`."""

    preprocessing = "the image processor saved with the checkpoint"

    def __init__(
        self, pipe: BoneAgePipeline, *, name: str, batch_size: int = 32, flip_average: bool | None = None
    ) -> None:
        self.pipe, self.name, self.batch_size = pipe, name, batch_size
        self.flip_average = pipe.model.config.flip_average if flip_average is None else flip_average
        self.revision = checkpoint_revision(pipe)
        self.uses_sex, self.interval = pipe.model.config.uses_sex, pipe.model.config.interval
        self.trained_on = trained_on(pipe.model.config.provenance)

    @classmethod
    def build(cls, argument: str, options: SystemOptions) -> "CheckpointSystem":
        """`argument`: "default" or "", a folder, or a Hub id."""
        checkpoint = argument or "default"
        name = Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint
        pipe = load_pipeline(checkpoint, device=options.device)
        return cls(pipe, name=name, batch_size=options.batch_size, flip_average=options.flip_average)

    def predict(self, dataset: Any) -> pd.DataFrame:
        table = predict_dataset(
            self.pipe, dataset, batch_size=self.batch_size, flip_average=self.flip_average, progress=False
        )
        return table.drop(columns=["reference_months", "sex"])


def trained_on(provenance: dict[str, Any] | None) -> tuple[str, ...] | None:
    """Names of the data in a checkpoint's provenance, with those that its initial weights, its teacher and a local
    calibration have seen; None if any of these does not say."""
    if not provenance:
        return None
    found: list[str] = []
    waiting: list[Any] = [provenance]
    while waiting:
        one = waiting.pop(0)
        fingerprint = one.get("train_fingerprint")
        if not isinstance(fingerprint, str):
            return None
        name = labels_name(fingerprint)
        # Whoever trains on the whole training part selects and calibrates on the challenge's validation part.
        found += [name, "rsna-validation-1425"] if name == "rsna-training-12611" else [name]
        calibration = one.get("local_calibration")
        if isinstance(calibration, dict):
            found.append(labels_name(str(calibration.get("fingerprint", "unknown"))))
        initial, teacher = one.get("initial_weights"), one.get("teacher")
        if isinstance(initial, dict) and initial.get("provenance"):
            waiting.append(initial["provenance"])
        if isinstance(teacher, dict):
            waiting.append(teacher.get("provenance") or {})
    return tuple(dict.fromkeys(found))
