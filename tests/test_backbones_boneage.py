"""Backbones: sizes, names, shapes, padding and the folding of batch normalisation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from boneage_hf.backbones_boneage import (
    BACKBONES,
    Backbone,
    EfficientNetLite,
    EfficientNetLite0,
    SameConv2d,
    TinyBackbone,
    Vgg19,
    Vgg19Bn,
    fold_batchnorm,
)
from boneage_hf.configuration_boneage import BACKBONE_NAMES


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(backbone: type[Backbone]) -> Backbone:
    with torch.device("meta"):
        return backbone()


def with_random_statistics(backbone: Backbone, *, seed: int) -> Backbone:
    """Batch normalisation that does something: a fresh one has mean 0, variance 1, scale 1, shift 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.5, 0.5, generator=generator)
                module.running_mean.uniform_(-0.5, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return backbone


def padded_as_tensorflow_documents(
    image: torch.Tensor, weight: torch.Tensor, stride: int, groups: int
) -> torch.Tensor:
    """The slow reference: every output cell written out as TensorFlow's notes on "SAME" padding define it."""
    kernel = weight.shape[-1]
    padding = []
    for side in image.shape[-2:]:
        rest = side % stride
        total = max(kernel - (stride if rest == 0 else rest), 0)
        padding.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = padding
    image = F.pad(image, (left, right, top, bottom))
    rows = (image.shape[2] - kernel) // stride + 1
    columns = (image.shape[3] - kernel) // stride + 1
    per_group = weight.shape[0] // groups
    out = torch.zeros(image.shape[0], weight.shape[0], rows, columns, dtype=image.dtype)
    for channel in range(weight.shape[0]):
        first = channel // per_group * weight.shape[1]
        for row in range(rows):
            for column in range(columns):
                window = image[
                    :,
                    first : first + weight.shape[1],
                    row * stride : row * stride + kernel,
                    column * stride : column * stride + kernel,
                ]
                out[:, channel, row, column] = (window * weight[channel]).sum(dim=(1, 2, 3))
    return out


def test_vgg19_has_the_parameters_of_its_sixteen_convolutions() -> None:
    assert count_parameters(on_meta(Vgg19)) == 20_024_384


def test_vgg19_bn_adds_a_scale_and_a_shift_per_channel() -> None:
    channels = 2 * 64 + 2 * 128 + 4 * 256 + 8 * 512
    assert count_parameters(on_meta(Vgg19Bn)) == 20_024_384 + 2 * channels


def test_efficientnet_lite0_has_the_published_parameters_without_the_classifier() -> None:
    published = (
        4_652_008  # with 1,000 classes, as built by efficientnet-lite-pytorch 0.1.0; the release says 4.7 million
    )
    assert count_parameters(on_meta(EfficientNetLite0)) == published - (1280 * 1000 + 1000)


def test_vgg19_convolutions_bear_the_names_of_torchvision() -> None:
    indices = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
    expected = {f"features.{index}.{tensor}" for index in indices for tensor in ("weight", "bias")}
    backbone = on_meta(Vgg19)
    assert set(backbone.state_dict()) == expected
    assert isinstance(backbone, Vgg19)
    assert len(backbone.features) == 37
    assert isinstance(backbone.features[36], nn.MaxPool2d)


def test_vgg19_bn_convolutions_bear_the_names_of_torchvision() -> None:
    indices = (0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49)
    backbone = on_meta(Vgg19Bn)
    assert isinstance(backbone, Vgg19Bn)
    assert [index for index, layer in enumerate(backbone.features) if isinstance(layer, nn.Conv2d)] == list(indices)
    assert all(isinstance(backbone.features[index + 1], nn.BatchNorm2d) for index in indices)


def test_efficientnet_lite0_tensors_bear_the_names_of_timm() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in on_meta(EfficientNetLite0).state_dict().items()}
    assert shapes["conv_stem.weight"] == (32, 3, 3, 3)
    assert shapes["blocks.0.0.conv_dw.weight"] == (32, 1, 3, 3)
    assert shapes["blocks.0.0.conv_pw.weight"] == (16, 32, 1, 1)
    assert shapes["blocks.5.3.conv_pw.weight"] == (1152, 192, 1, 1)
    assert shapes["blocks.5.3.conv_dw.weight"] == (1152, 1, 5, 5)
    assert shapes["blocks.6.0.conv_pwl.weight"] == (320, 1152, 1, 1)
    assert shapes["blocks.6.0.bn3.running_var"] == (320,)
    assert shapes["conv_head.weight"] == (1280, 320, 1, 1)
    assert not any("se" in name.split(".") or "classifier" in name for name in shapes)


def test_batch_normalisation_of_lite_has_the_constants_of_the_tensorflow_release() -> None:
    norms = [module for module in on_meta(EfficientNetLite0).modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 49
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


@pytest.mark.parametrize("name", BACKBONES)
def test_grid_is_the_side_of_the_feature_map(name: str) -> None:
    backbone = on_meta(BACKBONES[name])
    for size in (96, 97, 127, 128, 129, 191, 224, 255, 257, 299, 383, 384):
        shape = backbone(torch.empty(1, 3, size, size, device="meta")).shape
        assert shape == (1, backbone.num_features, backbone.grid(size), backbone.grid(size)), size


@pytest.mark.parametrize("name", BACKBONES)
def test_rows_and_columns_of_the_feature_map_follow_those_of_the_image(name: str) -> None:
    backbone = BACKBONES[name]().eval()
    with torch.no_grad():
        features = backbone(torch.rand(2, 3, 97, 64))
    assert features.shape == (2, backbone.num_features, backbone.grid(97), backbone.grid(64))
    assert features.isfinite().all()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_random_backbone_neither_kills_nor_blows_up_the_signal(name: str) -> None:
    torch.manual_seed(0)
    backbone = BACKBONES[name]().train()
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 64, 64))
    assert 1e-2 < features.std().item() < 10


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_receives_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    backbone = BACKBONES[name]().train()
    backbone(torch.randn(2, 3, 64, 64)).square().mean().backward()
    silent = [key for key, tensor in backbone.named_parameters() if tensor.grad is None or not tensor.grad.any()]
    assert silent == []


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_same_padding_equals_the_written_out_definition(kernel_size: int, stride: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width in ((8, 8), (9, 9), (8, 11), (5, 6), (1, 2)):
        conv = SameConv2d(4, 4, kernel_size=kernel_size, stride=stride, groups=groups).double()
        image = torch.randn(2, 4, height, width, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            actual = conv(image)
            expected = padded_as_tensorflow_documents(image, conv.weight, stride, groups)
        assert actual.shape[-2:] == (math.ceil(height / stride), math.ceil(width / stride))
        torch.testing.assert_close(actual, expected)


def test_folding_batch_normalisation_keeps_the_features() -> None:
    torch.manual_seed(1)
    original = Vgg19Bn()
    with_random_statistics(original, seed=2)
    original.double().eval()
    folded = fold_batchnorm(original)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before, after = original(image), folded(image)
    assert type(folded) is Vgg19
    assert before.abs().max() > 0.1
    assert (before - after).abs().max() <= 1e-6 * before.abs().max()


def test_folding_keeps_dtype_and_mode_and_leaves_the_original_alone() -> None:
    original = Vgg19Bn().eval()
    with_random_statistics(original, seed=3)
    before = {key: tensor.clone() for key, tensor in original.state_dict().items()}
    folded = fold_batchnorm(original)
    assert {tensor.dtype for tensor in folded.state_dict().values()} == {torch.float32}
    assert not folded.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in original.state_dict().items())


def test_gradients_under_bfloat16_autocast_agree_with_those_of_plain_bfloat16_convolutions() -> None:
    torch.manual_seed(0)
    conv = SameConv2d(8, 8, kernel_size=5, stride=2, groups=8)
    image = torch.randn(2, 8, 12, 12).bfloat16()
    plain = conv.weight.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = conv(image)
        expected = F.conv2d(F.pad(image, (1, 2, 1, 2)), plain, None, 2, 0, 1, 8)
    assert features.dtype == expected.dtype == torch.bfloat16
    features.float().square().mean().backward()
    expected.float().square().mean().backward()
    assert conv.weight.grad is not None
    assert plain.grad is not None
    assert conv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(features, expected, atol=0.05, rtol=0.02)
    torch.testing.assert_close(conv.weight.grad, plain.grad, atol=0.01, rtol=0.05)


def test_evaluation_of_lite_is_the_same_with_and_without_a_recorded_graph() -> None:
    torch.manual_seed(0)
    backbone = EfficientNetLite0().eval()
    image = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        without = backbone(image)
    torch.testing.assert_close(backbone(image).detach(), without, rtol=0, atol=0)


def test_lite_scales_width_and_depth_but_neither_stem_nor_head() -> None:
    class Lite2(EfficientNetLite):
        width_multiplier = 1.1
        depth_multiplier = 1.2

    backbone = on_meta(Lite2)
    assert isinstance(backbone, Lite2)
    assert [len(stage) for stage in backbone.blocks if isinstance(stage, nn.Sequential)] == [1, 3, 3, 4, 4, 5, 1]
    assert [Lite2.scaled_width(stage.out_channels) for stage in Lite2.stages] == [16, 24, 48, 88, 120, 208, 352]
    assert backbone.conv_stem.weight.shape == (32, 3, 3, 3)
    assert backbone.conv_head.weight.shape == (1280, 352, 1, 1)
    # With 1,000 classes: 6,092,072 in efficientnet-lite-pytorch 0.1.0, 6.1 million in the official release's table.
    assert count_parameters(backbone) == 6_092_072 - (1280 * 1000 + 1000)


def test_the_tiny_backbone_of_tests_stays_tiny() -> None:
    assert count_parameters(on_meta(TinyBackbone)) == 2_648


def test_the_registry_and_the_configuration_name_the_same_backbones() -> None:
    assert sorted([*BACKBONES, "auto"]) == sorted(BACKBONE_NAMES)
    assert (BACKBONES["vgg19"], BACKBONES["vgg19_bn"]) == (Vgg19, Vgg19Bn)
    assert BACKBONES["efficientnet_lite0"] is EfficientNetLite0
