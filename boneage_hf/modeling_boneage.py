"""Bone age from a radiograph: backbone, locally connected attention, regression head.

```
pixel_values (B, 3, S, S) -> backbone -> (B, C, h, w) -> BatchNorm -> features
features -> 1x1 conv -> 1x1 conv -> locally connected -> sigmoid -> attention (B, h, w)
mean(attention * features) / mean(attention) -> (B, C) [+ sex vector] -> dense -> bone age in months (B,)
```
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .backbones_boneage import make_backbone
from .configuration_boneage import BoneAgeConfig
from .correction_boneage import correct_months
from .errors import InputError
from .quality import HandGate


@dataclass
class BoneAgeOutput(ModelOutput):
    """What [`BoneAgeModel`] answers.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): training loss on scaled targets, if `labels` were given.
        bone_age_months (`torch.FloatTensor` of shape `(batch_size,)`): predicted bone age in months, float32.
        attention (`torch.FloatTensor` of shape `(batch_size, h, w)`): raw sigmoid values in (0, 1), float32; row and
            column follow the picture.
        features (`torch.FloatTensor` of shape `(batch_size, channels, h, w)`, *optional*): normalised feature maps, if
            `output_features=True`.
    """

    loss: torch.Tensor | None = None
    bone_age_months: torch.Tensor = None  # type: ignore[assignment]  # every ModelOutput field has a default
    attention: torch.Tensor = None  # type: ignore[assignment]
    features: torch.Tensor | None = None


class LocallyConnected2d(nn.Module):
    """A 1x1 convolution to one channel whose weights and bias are not shared between positions.

    Keras' `LocallyConnected2D(1, 1)`: output (b, i, j) = sum over c of input (b, c, i, j) * weight (i, j, c) + bias
    (i, j).

    Args:
        in_channels: channels of the input.
        grid: side of the square feature map that the weights belong to.
    """

    def __init__(self, in_channels: int, grid: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(grid, grid, in_channels))
        self.bias = nn.Parameter(torch.zeros(grid, grid))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, grid, grid) -> (B, grid, grid)"""
        return torch.einsum("bcij,ijc->bij", hidden_states, self.weight) + self.bias


class ChannelExpansion(nn.Module):
    """The reference's frozen 1x1 convolution from 1 to C channels with all weights one: it repeats the attention.

    Kept as weights so that the network has exactly the reference's values; computed as the broadcast that it is.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=False)

    def forward(self, attention: torch.Tensor) -> torch.Tensor:
        """(B, h, w) -> (B, C, h, w)"""
        return attention.unsqueeze(1) * self.weight.view(1, -1, 1, 1)


def attention_mean(features: torch.Tensor, weights: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    """Weighted mean over positions: (B, C, h, w) and (B, C or 1, h, w) -> (B, C) float32"""
    # A division by the mean attention, which may be as small as 1e-5: fp32 whatever the weights' type.
    weighted = (features.float() * weights.float()).mean(dim=(2, 3))
    return weighted / (weights.float().mean(dim=(2, 3)) + epsilon)


class AttentionPooling(nn.Module):
    """Features -> attention map and the attention-weighted mean of the features (RescaleGAP)."""

    def __init__(self, config: BoneAgeConfig, channels: int, grid: int) -> None:
        super().__init__()
        widths = [channels, *config.attention_channels]
        self.reduce = nn.ModuleList(nn.Conv2d(before, after, kernel_size=1) for before, after in pairwise(widths))
        self.local = LocallyConnected2d(widths[-1], grid)
        self.expand = ChannelExpansion(channels)
        self.epsilon = config.rescale_epsilon

    def freeze(self) -> None:
        """The expansion's ones do not train."""
        self.expand.requires_grad_(False)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, h, w) -> pooled features (B, C) and attention (B, h, w)"""
        hidden_states = features
        for conv in self.reduce:
            hidden_states = conv(hidden_states).relu()  # (B, 64, h, w), then (B, 16, h, w)
        attention = self.local(hidden_states).float().sigmoid()  # (B, h, w)
        weights = self.expand(attention)  # (B, C, h, w)
        pooled = attention_mean(features, weights, epsilon=self.epsilon)  # (B, C)
        return pooled.to(features.dtype), attention


class AveragePooling(nn.Module):
    """The plain mean of the features, in place of [`AttentionPooling`]: what the attention is compared with."""

    def freeze(self) -> None:
        """There is nothing to freeze."""

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, h, w) -> their mean (B, C) and an attention of ones (B, h, w)"""
        return features.mean(dim=(2, 3)), torch.ones_like(features[:, 0], dtype=torch.float32)


class RegressionHead(nn.Module):
    """Pooled features, and the child's sex where the model uses it -> scaled bone age."""

    def __init__(self, config: BoneAgeConfig, channels: int) -> None:
        super().__init__()
        self.sex_embedding = nn.Embedding(2, config.sex_embedding_size) if config.uses_sex else None
        self.feature_dropout = nn.Dropout(config.feature_dropout)
        self.dense = nn.Linear(channels + (config.sex_embedding_size if config.uses_sex else 0), config.head_size)
        self.activation = nn.ELU()
        self.dropout = nn.Dropout(config.head_dropout)
        self.output = nn.Linear(config.head_size, 1)

    def forward(self, pooled: torch.Tensor, sex: torch.Tensor | None) -> torch.Tensor:
        """(B, C) and (B,) -> (B,)"""
        hidden_states = self.feature_dropout(pooled)
        if self.sex_embedding is not None:
            hidden_states = torch.cat([hidden_states, self.sex_embedding(sex)], dim=1)
        hidden_states = self.dropout(self.activation(self.dense(hidden_states)))
        return self.output(hidden_states).squeeze(1)


class BoneAgePreTrainedModel(PreTrainedModel):
    config: BoneAgeConfig
    config_class = BoneAgeConfig
    base_model_prefix = "boneage"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012 - transformers reads a plain class attribute
    supports_gradient_checkpointing = False
    _no_split_modules: set[str] | list[str] | None = []  # noqa: RUF012 - transformers reads a plain class attribute

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random weights: He for the backbone's convolutions, Glorot and zeros (Keras' defaults) for the rest."""
        if isinstance(module, nn.Conv2d):
            if module.kernel_size == (1, 1) and module.groups == 1 and module.bias is not None:
                init.xavier_uniform_(module.weight)
            else:
                # As `backbones_boneage.init_module`, fan per group: PyTorch's kaiming_normal_ counts all groups
                # and makes depthwise weights smaller by the root of their number.
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -0.05, 0.05)  # Keras' default for embeddings
        elif isinstance(module, LocallyConnected2d):
            # Keras takes the kernel (positions, 16, 1) for a convolution's: fan_in and fan_out carry the positions.
            positions = module.weight.shape[0] * module.weight.shape[1]
            limit = (6.0 / (positions * (module.weight.shape[2] + 1))) ** 0.5
            init.uniform_(module.weight, -limit, limit)
            init.zeros_(module.bias)
        elif isinstance(module, ChannelExpansion):
            init.ones_(module.weight)
        elif isinstance(module, HandGate):
            for buffer in module.buffers():
                init.zeros_(buffer)
        elif isinstance(module, nn.BatchNorm2d):
            super()._init_weights(module)


class BoneAgeModel(BoneAgePreTrainedModel):
    """A hand radiograph, and the child's sex where the model uses it -> bone age in months.

    The constructor draws random weights and touches neither disk nor network; trained weights come from
    `BoneAgeModel.from_pretrained`, initial ones from the training recipe.
    """

    def __init__(self, config: BoneAgeConfig) -> None:
        super().__init__(config)
        config.validate()  # a field may have been set since the config was made
        self.backbone = make_backbone(config)
        channels, self.grid = self.backbone.num_features, self.backbone.grid(config.image_size)
        self.feature_norm = nn.BatchNorm2d(channels, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)
        self.attention: Any = (
            AttentionPooling(config, channels, self.grid) if config.pooling == "attention" else AveragePooling()
        )
        self.head = RegressionHead(config, channels)
        # No part of the forward pass: the pipeline asks it about the features of an answer.
        self.gate = None if config.gate is None else HandGate(config.gate, channels)
        self.freeze()
        self.post_init()

    def freeze(self) -> None:
        """Let train what the config lets train: all but the expansion's ones and a frozen backbone."""
        self.backbone.requires_grad_(not self.config.freeze_backbone)
        self.attention.freeze()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, with three differences.

        Only safetensors are read (`use_safetensors=True` is the default). The loaded parameters train or not as the
        config says (the loader makes all of them train). Weights that do not fit are refused: transformers would warn
        and leave what is missing random.

        Args:
            output_loading_info: return `(model, info)` with missing and unexpected keys, and refuse nothing.

        Raises:
            InputError: a weight is missing or left over.
        """
        kwargs.setdefault("use_safetensors", True)
        other_shapes_are_meant = kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(
            *args,
            output_loading_info=True,
            ignore_mismatched_sizes=other_shapes_are_meant or not output_loading_info,
            **kwargs,
        )
        model, info = loaded
        model.freeze()
        if output_loading_info:
            return model, info
        # Counters of steps play no part at a fixed momentum, and weights from elsewhere often lack them.
        missing = [key for key in info["missing_keys"] if not key.endswith(".num_batches_tracked")]
        reshaped = [] if other_shapes_are_meant else [key for key, *_ in info["mismatched_keys"]]
        faults = {"missing": missing, "unexpected": info["unexpected_keys"], "of another shape": reshaped}
        if any(faults.values()):
            named = "; ".join(f"{len(keys)} {fault}, such as {min(keys)}" for fault, keys in faults.items() if keys)
            raise InputError(
                f"The weights do not fit this model ({named}), so that its predictions would be random: take the "
                "config.json and the model.safetensors of one checkpoint, or download them again."
            )
        return model

    def train(self, mode: bool = True) -> "BoneAgeModel":
        """Training mode for everything that trains: a frozen backbone keeps its BatchNorm statistics."""
        super().train(mode)
        if self.config.freeze_backbone:
            self.backbone.eval()
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        sex: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_features: bool = False,
        return_dict: bool | None = None,
        backbone_features: torch.Tensor | None = None,
    ) -> BoneAgeOutput:
        """
        Args:
            pixel_values: (B, 3, S, S) with S = `config.image_size`, from [`BoneAgeImageProcessor`].
            sex: (B,) integers, 0 female and 1 male; required if the model uses sex, ignored if it does not.
            labels: (B,) bone age in months.
            output_features: also return the normalised feature maps.
            return_dict: `False` gives a plain tuple.
            backbone_features: (B, C, h, w), what `model.backbone` answered to the images, instead of `pixel_values`:
                for training on features that were computed before.

        Raises:
            InputError: wrong shape, wrong size, both or none of images and features, or sex missing or out of range.
        """
        if (pixel_values is None) == (backbone_features is None):
            raise InputError("Give the model either pixel_values or backbone_features.")
        if pixel_values is not None:
            self._check_images(pixel_values)
            self._check_sex(len(pixel_values), sex)
            features = self.backbone(pixel_values)  # (B, C, h, w)
        else:
            features = self._checked_features(backbone_features)  # (B, C, h, w)
            self._check_sex(len(features), sex)
        with maybe_autocast(features.device.type, enabled=False):
            features = self.feature_norm(features.to(self.feature_norm.weight.dtype))  # (B, C, h, w)
            pooled, attention = self.attention(features)  # (B, C), (B, h, w)
            scaled = self.head(pooled, sex).float()  # (B,)
            bone_age_months = correct_months(
                scaled * self.config.age_sd_months + self.config.age_mean_months,
                sex,
                age_correction=self.config.age_correction,
                local_calibration=self.config.local_calibration,
            )
            loss = None if labels is None else self._loss(scaled, labels)
        return BoneAgeOutput(
            loss=loss,
            bone_age_months=bone_age_months,
            attention=attention,
            features=features if output_features else None,
        )

    def _loss(self, scaled: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B,) scaled answers and (B,) months -> scalar"""
        target = (labels.float() - self.config.age_mean_months) / self.config.age_sd_months
        if self.config.loss == "mse":
            return nn.functional.mse_loss(scaled, target)
        return nn.functional.smooth_l1_loss(scaled, target, beta=self.config.smooth_l1_beta)

    def _checked_features(self, backbone_features: Any) -> torch.Tensor:
        expected = (self.backbone.num_features, self.grid, self.grid)
        if tuple(backbone_features.shape[1:]) != expected:
            raise InputError(
                f"backbone_features must have the shape (B, {', '.join(map(str, expected))}), not "
                f"{tuple(backbone_features.shape)}; make them with this model's backbone."
            )
        return backbone_features

    def _check_images(self, pixel_values: torch.Tensor) -> None:
        size = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise InputError(
                f"pixel_values must have the shape (B, 3, {size}, {size}), not {tuple(pixel_values.shape)}; "
                "make them with BoneAgeImageProcessor."
            )
        if tuple(pixel_values.shape[2:]) != (size, size):
            raise InputError(
                f"This model's attention belongs to images of {size} x {size} px, not "
                f"{pixel_values.shape[2]} x {pixel_values.shape[3]}: resize them with its BoneAgeImageProcessor, or "
                "interpolate the attention on purpose with model.resize_attention(image_size)."
            )

    def _check_sex(self, images: int, sex: torch.Tensor | None) -> None:
        if not self.config.uses_sex:
            return
        if sex is None:
            raise InputError('This model needs each child\'s sex: pass sex (B,) with 0 for "female" and 1 for "male".')
        if tuple(sex.shape) != (images,) or sex.is_floating_point() or sex.dtype == torch.bool:
            raise InputError(f"sex must be one integer per image, shape ({images},), 0 female or 1 male.")
        if not bool(((sex == 0) | (sex == 1)).all()):
            raise InputError("sex must be 0 (female) or 1 (male) for every image.")

    def drop_gate(self) -> None:
        """Forget the quality gate, which belongs to one backbone at one image size."""
        self.gate = self.config.gate = None

    @torch.no_grad()
    def resize_attention(self, image_size: int) -> None:
        """Make the model one for `image_size` px: the position-wise weights are interpolated bilinearly to its grid.

        An approximation to start a further training from, not an equal model; so what was fitted to the answers of
        the old one (correction, calibration, interval, gate) is dropped.

        Raises:
            InputError: a size that no config allows.
        """
        BoneAgeConfig(image_size=image_size)  # checks the size
        self.grid = grid = self.backbone.grid(image_size)
        self.config.image_size = image_size
        self.config.age_correction = self.config.local_calibration = self.config.interval = None
        self.drop_gate()
        if isinstance(self.attention, AveragePooling):
            return
        old = self.attention.local
        new = LocallyConnected2d(old.weight.shape[2], grid).to(old.weight.device, old.weight.dtype)

        def interpolate(maps: torch.Tensor) -> torch.Tensor:  # (C, h, w) -> (C, grid, grid)
            return nn.functional.interpolate(maps[None].float(), size=(grid, grid), mode="bilinear")[0]

        new.weight.copy_(interpolate(old.weight.permute(2, 0, 1)).permute(1, 2, 0))
        new.bias.copy_(interpolate(old.bias[None])[0])
        self.attention.local = new
