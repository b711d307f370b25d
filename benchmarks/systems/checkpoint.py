"""A checkpoint of this package: the packaged one, a folder, or a Hub id."""

from pathlib import Path
from typing import Any

import pandas as pd

from boneage_hf.evaluation import predict_dataset
from boneage_hf.hub import checkpoint_revision, load_pipeline
from boneage_hf.pipeline_boneage import BoneAgePipeline

from ..protocol import TRAINING_PARTS
from .base import System, SystemOptions


class CheckpointSystem(System):
    """Predicts with the loop of `boneage evaluate`."""

    preprocessing = "the image processor saved with the checkpoint"

    def __init__(
        self, pipe: BoneAgePipeline, *, name: str, batch_size: int = 32, flip_average: bool | None = None
    ) -> None:
        self.pipe, self.name, self.batch_size = pipe, name, batch_size
        self.flip_average = pipe.model.config.flip_average if flip_average is None else flip_average
        self.revision = checkpoint_revision(pipe)
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
    """Names of the data in a checkpoint's provenance, that of its initial weights included; None if it has none."""
    by_fingerprint = {fingerprint: name for name, fingerprint in TRAINING_PARTS.items()}
    found: list[str] = []
    while provenance:
        fingerprint = provenance.get("train_fingerprint")
        if not isinstance(fingerprint, str):
            return None
        name = by_fingerprint.get(fingerprint, f"labels {fingerprint[:12]}")
        # Whoever trains on the whole training part selects and calibrates on the challenge's validation part.
        found += [name, "rsna-validation-1425"] if name == "rsna-training-12611" else [name]
        initial = provenance.get("initial_weights")
        provenance = initial.get("provenance") if isinstance(initial, dict) else None
    return tuple(dict.fromkeys(found)) or None
