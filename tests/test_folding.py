"""A trained `vgg19_bn` checkpoint becomes a plain VGG19 that answers the same."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from make_tiny_checkpoint import CHECKPOINT

from boneage_hf.cli import main
from boneage_hf.configuration_boneage import BoneAgeConfig
from boneage_hf.errors import InputError
from boneage_hf.evaluation import float16_difference, predict_prepared
from boneage_hf.folding import fold_checkpoint, fold_model
from boneage_hf.hub import load_pipeline, save_checkpoint
from boneage_hf.image_processing_boneage import BoneAgeImageProcessor
from boneage_hf.modeling_boneage import BoneAgeModel


@pytest.fixture(scope="module")
def model() -> BoneAgeModel:
    """With statistics as after a training: neither 0 nor 1."""
    torch.manual_seed(0)
    config = BoneAgeConfig(backbone="vgg19_bn", image_size=64, age_mean_months=127.0, age_sd_months=41.0)
    model = BoneAgeModel(config).eval()
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


@pytest.fixture(scope="module")
def checkpoint(model: BoneAgeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bn") / "checkpoint"
    save_checkpoint(model, BoneAgeImageProcessor(size={"height": 64, "width": 64}), folder)
    return folder


@torch.no_grad()
def test_a_folded_model_answers_within_a_hundredth_of_a_month(model: BoneAgeModel) -> None:
    images = torch.randn(2, 3, 64, 64)
    own, folded = model(images), fold_model(model)(images)
    assert torch.all((own.bone_age_months - folded.bone_age_months).abs() < 1e-2)
    torch.testing.assert_close(own.attention, folded.attention, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_folded_model_is_exact_in_double_precision(model: BoneAgeModel) -> None:
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    double = BoneAgeModel(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    torch.testing.assert_close(double.backbone(images), fold_model(double).backbone(images), atol=1e-6, rtol=0)


def test_a_folded_checkpoint_is_the_reference_network_and_says_what_it_was(checkpoint: Path, tmp_path: Path) -> None:
    folded = fold_checkpoint(str(checkpoint), tmp_path / "folded")
    pipe = load_pipeline(tmp_path / "folded")
    assert pipe.model.config.backbone == "vgg19"
    assert folded.values == sum(value.numel() for value in pipe.model.parameters())
    assert len((pipe.model.config.provenance or {})["folded_from"]) == 12


def test_a_folded_checkpoint_is_not_rounded_and_does_not_tell_of_the_rounding_of_other_weights(
    model: BoneAgeModel, tmp_path: Path
) -> None:
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head.output.weight.mul_(20)  # so that float16 would move predictions by more than may be
    model.config.provenance = {"epoch": 3, "float16_storage": {"n": 32, "mean_months": 0.01, "largest_months": 0.02}}
    processor = BoneAgeImageProcessor(size={"height": 64, "width": 64})
    save_checkpoint(model, processor, tmp_path / "bn", dtype=torch.float32)
    fold_checkpoint(str(tmp_path / "bn"), tmp_path / "folded")
    pipe = load_pipeline(tmp_path / "folded", device="cpu")
    assert set(pipe.model.config.provenance or {}) == {"epoch", "folded_from"}
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64), dtype=np.uint8)
    sex = np.zeros(8, np.int64)
    assert not float16_difference(pipe.model, processor, pixels, sex).allowed
    own, folded = (predict_prepared(each, processor, pixels, sex) for each in (model, pipe.model))
    assert np.abs(own - folded).mean() < 0.05


def test_another_backbone_is_not_folded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this backbone is tiny"):
        fold_checkpoint(str(CHECKPOINT), tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_a_checkpoint_is_not_folded_onto_itself(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="is the checkpoint itself"):
        fold_checkpoint(str(checkpoint), checkpoint)


def test_the_command_prints_values_revision_and_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fold", str(checkpoint), str(tmp_path / "folded")]) == 0
    printed = capsys.readouterr().out
    assert "vgg19 with " in printed
    assert str(tmp_path / "folded") in printed
