"""Convolutional backbones: radiograph tensor in, feature map out. No classifier, no pooling, no weights.

Every backbone takes `pixel_values` (B, 3, H, W), standardised, and returns a feature map (B, `num_features`, h, w);
`grid(H)` gives h. Constructors take no arguments, initialise randomly and touch neither disk nor network.

Parameter names are those of timm (and, for VGG, torchvision), so published ImageNet files fit without renaming.

`TransformersBackbone` wraps any backbone of transformers in the same way.

* VGG19: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015,
  arXiv:1409.1556, table 1, column E; `vgg19_bn` adds batch normalisation after every convolution as torchvision does.
* EfficientNet-Lite: the official TensorFlow release (tensorflow/tpu, `models/official/efficientnet/lite`), that is
  EfficientNet-B0 (Tan & Le, ICML 2019, arXiv:1905.11946, table 1) without squeeze-and-excitation, with ReLU6 for
  swish, and with stem and head kept at their B0 width.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoBackbone, AutoConfig

from .configuration_boneage import BoneAgeConfig
from .errors import InputError


class Backbone(nn.Module):
    """What a backbone offers: `forward`, `num_features` and `grid`."""

    num_features: ClassVar[int]
    """Channels of the feature map."""

    @staticmethod
    def grid(image_size: int) -> int:
        """Side of the feature map, in cells, for an image of `image_size` pixels a side."""
        raise NotImplementedError

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Standardised images (B, 3, H, W) -> feature map (B, num_features, grid(H), grid(W))."""
        raise NotImplementedError


@torch.no_grad()
def init_module(module: nn.Module) -> None:
    """Initialise one convolution or batch normalisation in place; any other module is left alone.

    Convolutions: normal with variance 2 / fan_out (He et al. 2015, arXiv:1502.01852), the fan counted per group as
    in the official EfficientNet, bias 0. Batch normalisation: scale 1, shift 0.
    """
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, mean=0.0, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


# --- VGG ------------------------------------------------------------------------------------------------------------


class Vgg(Backbone):
    """VGG without its classifier; a subclass names the configuration."""

    widths: ClassVar[tuple[tuple[int, ...], ...]]
    """Output channels of the convolutions, one tuple per stage; each stage ends with a 2 x 2 max pooling."""
    batch_norm: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in self.widths:
            for width in stage:
                layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                if self.batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        self.features = nn.Sequential(*layers)
        self.apply(init_module)

    @staticmethod
    def grid(image_size: int) -> int:
        """floor(image_size / 32): each of the five poolings drops an odd last row and column."""
        return image_size // 32

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Standardised images (B, 3, H, W), H and W at least 32 -> (B, 512, floor(H / 32), floor(W / 32))."""
        return self.features(pixel_values)


class Vgg19(Vgg):
    """VGG19: 16 convolutions, 20,024,384 parameters; indices in `features` as in torchvision and timm (0 ... 36)."""

    num_features: ClassVar[int] = 512
    widths: ClassVar[tuple[tuple[int, ...], ...]] = ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4)


class Vgg19Bn(Vgg19):
    """VGG19 with batch normalisation after every convolution; indices in `features` as in torchvision (0 ... 52)."""

    batch_norm: ClassVar[bool] = True


@torch.no_grad()
def fold_batchnorm(backbone: Vgg19Bn) -> Vgg19:
    """Put the running statistics of a trained `vgg19_bn` into the convolutions of a new, faster `vgg19`.

    The result computes what `backbone` computes in evaluation mode; it has the dtype, device and mode of `backbone`.
    """
    reference = next(backbone.parameters())
    folded = Vgg19().to(device=reference.device, dtype=reference.dtype)
    convs = [layer for layer in backbone.features if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in backbone.features if isinstance(layer, nn.BatchNorm2d)]
    targets = [layer for layer in folded.features if isinstance(layer, nn.Conv2d)]
    for conv, norm, target in zip(convs, norms, targets, strict=True):
        assert conv.bias is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert target.bias is not None
        # In float64, so that folding itself costs no precision whatever the dtype of the weights.
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        target.weight.copy_(conv.weight.double() * scale[:, None, None, None])
        target.bias.copy_((conv.bias.double() - norm.running_mean.double()) * scale + norm.bias.double())
    return folded.train(backbone.training)


# --- EfficientNet-Lite ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One row of table 1 of arXiv:1905.11946; the stride is that of the first block of the stage."""

    expand_ratio: int
    kernel_size: int
    stride: int
    out_channels: int
    repeats: int


class SameConv2d(nn.Conv2d):
    """Convolution without bias whose padding is TensorFlow's "SAME": the output side is ceil(side / stride).

    At stride 2 the padding depends on the size of the input and may be one larger at the bottom and right than at the
    top and left; only then is the input padded by an operation of its own.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )

    def _total_padding(self, side: int) -> int:
        kernel_size, stride = self.kernel_size[0], self.stride[0]
        return max((math.ceil(side / stride) - 1) * stride + kernel_size - side, 0)

    def _wants_float32(self, input: torch.Tensor) -> bool:
        # oneDNN's gradients of bfloat16 depthwise convolutions on CPU are 4 to 20 times slower than those in float32,
        # unless the kernel is 3 x 3 at stride 1; avoiding them makes a training step 1.8 times as fast.
        return (
            self.groups > 1
            and (self.kernel_size[0] > 3 or self.stride[0] > 1)
            and input.device.type == "cpu"
            and input.dtype == torch.bfloat16
            and self.weight.dtype == torch.float32
            and torch.is_grad_enabled()
            and (self.weight.requires_grad or input.requires_grad)
        )

    def _convolve(self, input: torch.Tensor) -> torch.Tensor:
        if self.stride[0] == 1:
            return super().forward(input)
        rows, columns = (self._total_padding(side) for side in input.shape[-2:])
        if rows % 2 or columns % 2:
            input = F.pad(input, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
            rows = columns = 0
        return F.conv2d(input, self.weight, None, self.stride, (rows // 2, columns // 2), self.dilation, self.groups)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self._wants_float32(input):
            with torch.autocast("cpu", enabled=False):
                return self._convolve(input.float()).to(input.dtype)
        return self._convolve(input)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    # The official release has epsilon 1e-3 and momentum 0.99, which PyTorch counts as 1 - 0.99.
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class DepthwiseSeparable(nn.Module):
    """First stage: depthwise convolution, then a linear pointwise one. (B, C_in, H, W) -> (B, C_out, H/s, W/s)."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.has_skip = stride == 1 and in_channels == out_channels
        self.conv_dw = SameConv2d(in_channels, in_channels, kernel_size=kernel_size, stride=stride, groups=in_channels)
        self.bn1 = _batch_norm(in_channels)
        self.conv_pw = SameConv2d(in_channels, out_channels, kernel_size=1)
        self.bn2 = _batch_norm(out_channels)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.act(self.bn1(self.conv_dw(hidden)))
        out = self.bn2(self.conv_pw(out))
        return out + hidden if self.has_skip else out


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project; skip connection where the shape allows it.

    (B, C_in, H, W) -> (B, C_out, ceil(H/s), ceil(W/s)).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel_size: int, stride: int, expand_ratio: int
    ) -> None:
        super().__init__()
        self.has_skip = stride == 1 and in_channels == out_channels
        expanded = in_channels * expand_ratio
        self.conv_pw = SameConv2d(in_channels, expanded, kernel_size=1)
        self.bn1 = _batch_norm(expanded)
        self.conv_dw = SameConv2d(expanded, expanded, kernel_size=kernel_size, stride=stride, groups=expanded)
        self.bn2 = _batch_norm(expanded)
        self.conv_pwl = SameConv2d(expanded, out_channels, kernel_size=1)
        self.bn3 = _batch_norm(out_channels)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.act(self.bn1(self.conv_pw(hidden)))
        out = self.act(self.bn2(self.conv_dw(out)))
        out = self.bn3(self.conv_pwl(out))
        return out + hidden if self.has_skip else out


class EfficientNetLite(Backbone):
    """EfficientNet-Lite without pooling and classifier; a subclass sets the two multipliers of its size."""

    num_features: ClassVar[int] = 1280
    stem_channels: ClassVar[int] = 32
    stages: ClassVar[tuple[Stage, ...]] = (
        Stage(expand_ratio=1, kernel_size=3, stride=1, out_channels=16, repeats=1),
        Stage(expand_ratio=6, kernel_size=3, stride=2, out_channels=24, repeats=2),
        Stage(expand_ratio=6, kernel_size=5, stride=2, out_channels=40, repeats=2),
        Stage(expand_ratio=6, kernel_size=3, stride=2, out_channels=80, repeats=3),
        Stage(expand_ratio=6, kernel_size=5, stride=1, out_channels=112, repeats=3),
        Stage(expand_ratio=6, kernel_size=5, stride=2, out_channels=192, repeats=4),
        Stage(expand_ratio=6, kernel_size=3, stride=1, out_channels=320, repeats=1),
    )
    width_multiplier: ClassVar[float]
    depth_multiplier: ClassVar[float]

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, self.stem_channels, kernel_size=3, stride=2)
        self.bn1 = _batch_norm(self.stem_channels)
        self.act = nn.ReLU6(inplace=True)
        channels = self.stem_channels
        stages = []
        for index, stage in enumerate(self.stages):
            out_channels = self.scaled_width(stage.out_channels)
            blocks: list[nn.Module] = []
            for block in range(self.scaled_repeats(index)):
                stride = stage.stride if block == 0 else 1
                if stage.expand_ratio == 1:
                    blocks.append(
                        DepthwiseSeparable(channels, out_channels, kernel_size=stage.kernel_size, stride=stride)
                    )
                else:
                    blocks.append(
                        InvertedResidual(
                            channels,
                            out_channels,
                            kernel_size=stage.kernel_size,
                            stride=stride,
                            expand_ratio=stage.expand_ratio,
                        )
                    )
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = SameConv2d(channels, self.num_features, kernel_size=1)
        self.bn2 = _batch_norm(self.num_features)
        self.apply(init_module)

    @classmethod
    def scaled_width(cls, channels: int) -> int:
        """`channels` times the width multiplier, to the nearest multiple of 8 that is at least 90 % of it."""
        scaled = channels * cls.width_multiplier
        rounded = max(8, int(scaled + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * scaled else rounded

    @classmethod
    def scaled_repeats(cls, stage: int) -> int:
        """Blocks in stage number `stage` (from 0); Lite leaves the first and the last stage as they are."""
        repeats = cls.stages[stage].repeats
        if stage in (0, len(cls.stages) - 1):
            return repeats
        return math.ceil(repeats * cls.depth_multiplier)

    @staticmethod
    def grid(image_size: int) -> int:
        """ceil(image_size / 32): five strides of 2 with "SAME" padding."""
        return math.ceil(image_size / 32)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Standardised images (B, 3, H, W) -> (B, 1280, ceil(H / 32), ceil(W / 32))."""
        hidden = self.act(self.bn1(self.conv_stem(pixel_values)))  # (B, 32, H/2, W/2)
        hidden = self.blocks(hidden)  # (B, 320, H/32, W/32)
        return self.act(self.bn2(self.conv_head(hidden)))  # (B, 1280, H/32, W/32)


class EfficientNetLite0(EfficientNetLite):
    """EfficientNet-Lite0: 3,371,008 parameters without the classifier."""

    width_multiplier: ClassVar[float] = 1.0
    depth_multiplier: ClassVar[float] = 1.0


# --- for tests ------------------------------------------------------------------------------------------------------


class TinyBackbone(Backbone):
    """2,648 parameters out of EfficientNet-Lite's parts: for tests and first runs that take seconds.

    No published network: there are no weights for it, and what it predicts is of no use.
    """

    num_features: ClassVar[int] = 32
    widths: ClassVar[tuple[int, ...]] = (8, 16, 16, 24, 32)
    """Output channels of the stem and of the four blocks, each of which halves the side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, self.widths[0], kernel_size=3, stride=2)
        self.bn1 = _batch_norm(self.widths[0])
        self.act = nn.ReLU6(inplace=True)
        self.blocks = nn.Sequential(
            *(
                DepthwiseSeparable(before, after, kernel_size=3, stride=2)
                for before, after in zip(self.widths[:-1], self.widths[1:], strict=True)
            )
        )
        self.apply(init_module)

    @staticmethod
    def grid(image_size: int) -> int:
        """ceil(image_size / 32): five strides of 2 with "SAME" padding."""
        return math.ceil(image_size / 32)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Standardised images (B, 3, H, W) -> (B, 32, ceil(H / 32), ceil(W / 32))."""
        hidden = self.act(self.bn1(self.conv_stem(pixel_values)))  # (B, 8, H/2, W/2)
        return self.act(self.blocks(hidden))  # (B, 32, H/32, W/32)


# --- of transformers ------------------------------------------------------------------------------------------------


class TransformersBackbone(nn.Module):
    """The last feature map of any `AutoBackbone` of transformers (ResNet, ConvNeXtV2, DINOv2, Swin, ...).

    Args:
        backbone_config: a backbone's config as its `to_dict()` gives it, with `model_type`.

    Raises:
        InputError: transformers knows no such backbone, or not with these settings.
    """

    def __init__(self, backbone_config: dict[str, Any]) -> None:
        super().__init__()
        self.backbone_config = dict(backbone_config)
        self.model = self._make()
        self.num_features: int = self.model.channels[-1]

    def _make(self) -> Any:
        settings = {name: value for name, value in self.backbone_config.items() if name != "model_type"}
        try:
            return AutoBackbone.from_config(AutoConfig.for_model(self.backbone_config["model_type"], **settings))
        except (ValueError, TypeError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"transformers makes no backbone of this backbone_config ({reason}): take the config of a model that "
                "AutoBackbone can load."
            ) from None

    def grid(self, image_size: int) -> int:
        """Side of the feature map, in cells, found by a forward pass without values (on the meta device).

        Raises:
            InputError: the backbone takes no image of this size, or its map is not square.
        """
        with torch.device("meta"), torch.no_grad():
            try:
                shape = self._make().eval()(torch.zeros(1, 3, image_size, image_size)).feature_maps[-1].shape
            except (RuntimeError, ValueError) as error:
                raise InputError(
                    f"This backbone takes no images of {image_size} x {image_size} px "
                    f"({' '.join(str(error).split())[:120]}): choose another image_size."
                ) from None
        if len(shape) != 4 or shape[2] != shape[3]:
            raise InputError("This backbone gives no square feature map of a square image: choose another one.")
        return int(shape[3])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Standardised images (B, 3, H, W) -> (B, num_features, h, w)."""
        return self.model(pixel_values).feature_maps[-1]


BACKBONES: dict[str, type[Backbone]] = {
    "vgg19": Vgg19,
    "vgg19_bn": Vgg19Bn,
    "efficientnet_lite0": EfficientNetLite0,
    "tiny": TinyBackbone,
}


def make_backbone(config: BoneAgeConfig) -> "Backbone | TransformersBackbone":
    """The backbone that a config names, with random weights.

    Raises:
        InputError: see [`TransformersBackbone`].
    """
    if config.backbone_config is not None:
        return TransformersBackbone(config.backbone_config)
    return BACKBONES[config.backbone]()
