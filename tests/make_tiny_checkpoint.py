"""Writes what the tests load: a checkpoint of tens of kB, a drawn hand, and what the one says about the other.

    python tests/make_tiny_checkpoint.py

Run it when the network, the image preparation or the checkpoint format is changed on purpose, and commit what it
writes together with that change.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from boneage_hf import BoneAgeConfig, BoneAgeImageProcessor, BoneAgeModel, radiograph
from boneage_hf.hub import save_checkpoint
from boneage_hf.phantom import draw, save_png

TESTS = Path(__file__).resolve().parent
CHECKPOINT = TESTS / "checkpoints" / "tiny"
GOLDEN = TESTS / "golden"


def tiny_config() -> BoneAgeConfig:
    return BoneAgeConfig(
        backbone="tiny",
        freeze_backbone=False,
        image_size=64,
        sex_input="embedding",
        sex_embedding_size=8,
        attention_channels=[16, 8],
        head_size=32,
        age_mean_months=120.0,
        age_sd_months=40.0,
        loss="smooth_l1",
        provenance={
            "initial_weights": {"source": "random"},
            "data": {"kind": "none"},
            "note": "random numbers, for tests; what it predicts means nothing",
            "made_by": "tests/make_tiny_checkpoint.py",
            "licence": "Apache-2.0",
        },
    )


def tiny_processor() -> BoneAgeImageProcessor:
    return BoneAgeImageProcessor(size={"height": 64, "width": 64})


@torch.no_grad()
def tiny_model() -> BoneAgeModel:
    """Random weights; BatchNorm statistics, shifts and biases too, so that no number of the network is left out."""
    model = BoneAgeModel(tiny_config()).eval()
    # numpy promises the same stream on every machine, torch does not.
    rng = np.random.default_rng(2017)
    for name, value in sorted(model.state_dict().items()):
        if not value.is_floating_point() or name == "attention.expand.weight":
            continue
        drawn = rng.standard_normal(tuple(value.shape)).astype(np.float32)
        if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
            drawn = np.exp(0.2 * drawn)
        elif value.ndim == 1 or name.endswith("local.bias"):
            drawn = 0.2 * drawn
        else:
            # The fan in is the product of all dimensions but the first; of position-wise weights it is the last one.
            fan_in = value.shape[-1] if name.endswith("local.weight") else int(np.prod(value.shape[1:]))
            # Twice that in the head, so that images and sexes differ visibly in months.
            gain = 2.0 if name.startswith("head.") else 1.0
            drawn = drawn * np.float32(gain * fan_in**-0.5)
        value.copy_(torch.from_numpy(drawn))
    return model


def main() -> None:
    model = tiny_model()
    save_checkpoint(model, tiny_processor(), CHECKPOINT)

    # What is stored is float16, so the golden numbers are those of the stored weights.
    model = BoneAgeModel.from_pretrained(CHECKPOINT).eval()
    GOLDEN.mkdir(exist_ok=True)
    save_png(draw(100.0, "female", seed=7, size=160), GOLDEN / "hand.png")
    image = radiograph.read(GOLDEN / "hand.png").image
    processor = tiny_processor()
    prepared = torch.from_numpy(processor.prepare(image))[None]
    with torch.no_grad():
        output = model(
            pixel_values=processor.to_pixel_values(prepared.expand(2, -1, -1)),
            sex=torch.tensor([0, 1]),
            output_features=True,
        )
    save_file(
        {
            "prepared": prepared.contiguous(),
            "features": output.features[:1].contiguous(),
            "attention": output.attention[:1].contiguous(),
            "months": output.bone_age_months,
        },
        GOLDEN / "hand.safetensors",
        metadata={"months": "female, male"},
    )
    fingerprints = {name: sha256(settings.prepare(image)) for name, settings in processors().items()}
    (GOLDEN / "prepared.json").write_text(json.dumps(fingerprints, indent=2) + "\n")


def processors() -> dict[str, BoneAgeImageProcessor]:
    """Settings whose `prepare` of the drawn hand is fingerprinted."""
    return {
        "tiny": tiny_processor(),
        "reference": BoneAgeImageProcessor(),
        "source_size": BoneAgeImageProcessor(size={"height": 224, "width": 224}, source_size=299),
        "pad": BoneAgeImageProcessor(size={"height": 96, "width": 64}, resize_mode="pad", stretch_percentiles=None),
    }


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


if __name__ == "__main__":
    main()
