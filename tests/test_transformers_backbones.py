"""Any `AutoBackbone` of transformers as the backbone: made, saved, loaded, trained, and refused in a sentence."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hub_server import HubServer
from huggingface_hub import HfApi
from transformers import (
    ConvNextV2Backbone,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    Dinov2Config,
    PreTrainedConfig,
    ResNetConfig,
    SwinConfig,
)

from boneage_hf.configuration_boneage import BoneAgeConfig
from boneage_hf.data import prepare_phantoms
from boneage_hf.errors import InputError
from boneage_hf.initial_weights import load_transformers_backbone, read_backbone_config
from boneage_hf.modeling_boneage import BoneAgeModel
from boneage_hf.prepared import PreparedImages
from boneage_hf.recipes import Recipe
from boneage_hf.training import build_model, train

WIDTHS: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
CONFIGS: dict[str, PreTrainedConfig] = {
    "resnet": ResNetConfig(embedding_size=8, **WIDTHS),
    "convnextv2": ConvNextV2Config(**WIDTHS),
    "dinov2": Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56),
    "swin": SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, image_size=64),
}
RECIPE = Recipe(backbone="auto", image_size=64, source_size=None, epochs=1, batch_size=16, ema=0.0)


def auto(name: str, **options: Any) -> BoneAgeConfig:
    settings: dict[str, Any] = {"image_size": 64, "backbone_config": CONFIGS[name].to_dict()} | options
    return BoneAgeConfig(backbone="auto", **settings)


@pytest.fixture(autouse=True)
def forget_precision() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A classifier as it is published: its weights lack the norms that only backbones have."""
    torch.manual_seed(0)
    ConvNextV2ForImageClassification(ConvNextV2Config(**WIDTHS)).save_pretrained(tmp_path / "convnextv2")
    return tmp_path / "convnextv2"


@pytest.fixture(scope="module")
def images() -> PreparedImages:
    pixels = np.zeros((4, 64, 64), np.uint8)
    return PreparedImages(pixels, np.zeros(4, np.int64), np.array([50, 80, 120, 150], np.float32), tuple("abcd"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_backbone_of_transformers_reads_bone_age_and_attends_on_its_own_grid(name: str) -> None:
    torch.manual_seed(0)
    model = BoneAgeModel(auto(name)).eval()
    with torch.no_grad():
        output = model(torch.randn(2, 3, 64, 64), output_features=True)
    assert output.bone_age_months.shape == (2,)
    assert output.attention.shape[1:] == output.features.shape[2:]


@pytest.mark.parametrize("image_size", [64, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_grid_is_that_of_a_real_forward_pass(name: str, image_size: int) -> None:
    model = BoneAgeModel(auto(name, image_size=image_size)).eval()
    with torch.no_grad():
        maps = model.backbone(torch.zeros(1, 3, image_size, image_size))
    assert model.backbone.grid(image_size) == maps.shape[2] == maps.shape[3]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_with_such_a_backbone_loads_and_answers_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BoneAgeModel(auto(name, sex_input="embedding")).eval()
    model.save_pretrained(tmp_path)
    loaded = BoneAgeModel.from_pretrained(tmp_path).eval()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    images, sex = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    with torch.no_grad():  # to rounding: the loaded weights lie at other addresses, which decides the order of sums
        torch.testing.assert_close(
            loaded(images, sex=sex).bone_age_months, model(images, sex=sex).bone_age_months, rtol=0, atol=1e-4
        )


def test_a_frozen_backbone_of_transformers_stays_in_evaluation_mode_and_does_not_train() -> None:
    model = BoneAgeModel(auto("resnet", freeze_backbone=True)).train()
    assert not any(module.training for module in model.backbone.modules())
    assert not any(value.requires_grad for value in model.backbone.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "auto"}, "belong together"),
        ({"backbone": "vgg19", "backbone_config": {"model_type": "resnet"}}, "belong together"),
        ({"backbone": "auto", "backbone_config": {"depths": [1]}}, 'needs a "model_type"'),
    ],
)
def test_a_configuration_without_a_usable_backbone_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BoneAgeConfig(**settings)


@pytest.mark.parametrize("model_type", ["bert", "no-such-network"])
def test_a_network_that_is_no_backbone_is_refused(model_type: str) -> None:
    with pytest.raises(InputError, match="transformers makes no backbone"):
        BoneAgeModel(BoneAgeConfig(backbone="auto", image_size=64, backbone_config={"model_type": model_type}))


def test_published_weights_reach_the_backbone(pretrained: Path, images: PreparedImages) -> None:
    model, initial = build_model(RECIPE, initial_weights=str(pretrained), train=images)
    published = ConvNextV2Backbone.from_pretrained(pretrained).state_dict()
    own = model.backbone.state_dict()
    assert all(torch.equal(own[f"model.{name}"], value) for name, value in published.items())
    assert initial["source"] == "convnextv2"
    assert len(initial["sha256"]) == 64


def test_weights_from_the_hub_tell_their_commit_and_licence(
    pretrained: Path, images: PreparedImages, hub: HubServer
) -> None:
    (pretrained / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A card\n")
    api = HfApi(endpoint=hub.url)
    api.create_repo("clinic/convnext")
    api.upload_folder(repo_id="clinic/convnext", folder_path=pretrained)
    _, initial = build_model(RECIPE, initial_weights="clinic/convnext", train=images)
    assert initial == {
        "source": "clinic/convnext",
        "revision": hub.repository("clinic/convnext").branches["main"],
        "sha256": hashlib.sha256((pretrained / "model.safetensors").read_bytes()).hexdigest(),
        "licence": "cc-by-nc-4.0",
    }


def test_published_weights_that_lack_a_layer_are_refused(pretrained: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(pretrained / "model.safetensors")
    del tensors["convnextv2.encoder.stages.0.layers.0.dwconv.weight"]
    save_file(tensors, pretrained / "model.safetensors", metadata={"format": "pt"})
    model = BoneAgeModel(
        BoneAgeConfig(backbone="auto", image_size=64, backbone_config=read_backbone_config(str(pretrained)))
    )
    with pytest.raises(InputError, match="lacks weights of its backbone"):
        load_transformers_backbone(model.backbone, str(pretrained))  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["random", "weights.safetensors"])
def test_such_a_backbone_starts_from_a_model_of_transformers_only(source: str, images: PreparedImages) -> None:
    with pytest.raises(InputError, match="starts from a model of transformers"):
        build_model(RECIPE, initial_weights=source, train=images)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no model of transformers"):
        read_backbone_config(str(tmp_path))


def test_a_run_trains_such_a_backbone_and_another_goes_on_from_its_checkpoint(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BONEAGE_RUNS", str(tmp_path / "runs"))
    prepare_phantoms(60, tmp_path / "phantoms", size=64, progress=False)
    first = train(
        tmp_path / "phantoms", tmp_path / "first", RECIPE, initial_weights=str(pretrained), progress_bar=False
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    again = dataclasses.replace(RECIPE, seed=1)
    second = train(
        tmp_path / "phantoms", tmp_path / "second", again, initial_weights=str(first.checkpoint), progress_bar=False
    )
    assert np.isfinite(second.validation_mae_months)
    assert BoneAgeModel.from_pretrained(second.checkpoint).config.backbone_config["model_type"] == "convnextv2"
