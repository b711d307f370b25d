"""What a bone-age model is, as numbers and names: everything but its weights."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .correction_boneage import check_age_correction, check_local_calibration
from .errors import InputError
from .interval_boneage import check_interval
from .quality import check_gate

BACKBONE_NAMES = ("vgg19", "vgg19_bn", "efficientnet_lite0", "tiny", "auto")
SEX_INPUTS = ("none", "embedding")
POOLINGS = ("attention", "average")
LOSSES = ("mse", "smooth_l1")

#: Keys that transformers itself writes into a config.json or passes to a config's constructor. Everything else that is
#: not a field is a typing error of the user, which ``PreTrainedConfig`` would silently keep as an attribute.
_KEYS_OF_TRANSFORMERS = frozenset(
    {
        "model_type",
        "auto_map",
        "custom_pipelines",
        "name_or_path",
        "torch_dtype",
        "num_labels",
        "attn_implementation",
        "experts_implementation",
        "output_attentions",
        "per_layer_config",
        "_commit_hash",
        "_name_or_path",
        "_attn_implementation_autoset",
    }
)


@strict
class BoneAgeConfig(PreTrainedConfig):
    r"""Configuration of [`BoneAgeModel`].

    The defaults are the reference network: a frozen VGG19, attention from one locally connected layer, no sex input,
    384 px (Keras summary of "Bone Age Prediction", Nguyen D. B. M. et al.; its activations, dropout and BatchNorm
    settings from the parent Kaggle kernel "Attention on Pretrained-VGG16 for Bone Age").

    Args:
        backbone (`str`, defaults to `"vgg19"`): `"vgg19"`, `"vgg19_bn"`, `"efficientnet_lite0"`, `"tiny"` (tests) or
            `"auto"`: the `AutoBackbone` of transformers that `backbone_config` describes.
        backbone_config (`dict`, *optional*): for `"auto"` only: the config of a transformers backbone as its
            `to_dict()` gives it, with `model_type` (`"resnet"`, `"convnextv2"`, `"dinov2"`, ...).
        freeze_backbone (`bool`, defaults to `True`): the backbone neither trains nor updates its BatchNorm statistics.
        image_size (`int`, defaults to 384): side of the square input in pixels, 32 to 2048. The locally connected
            attention belongs to the grid of this size.
        sex_input (`str`, defaults to `"none"`): `"none"` (reference) or `"embedding"`: a learned vector per sex is
            appended to the pooled features.
        sex_embedding_size (`int`, defaults to 32): length of that vector.
        pooling (`str`, defaults to `"attention"`): `"attention"` (reference: attention-weighted mean of the feature
            maps) or `"average"` (their plain mean; the attention map of the answer is one everywhere).
        attention_channels (`list[int]`, defaults to `[64, 16]`): widths of the 1x1 convolutions before the locally
            connected layer.
        head_size (`int`, defaults to 1024): width of the dense layer.
        feature_dropout (`float`, defaults to 0.5): dropout on the pooled features, in [0, 1).
        head_dropout (`float`, defaults to 0.25): dropout after the dense layer, in [0, 1).
        batch_norm_eps (`float`, defaults to 1e-3): Keras' epsilon of the BatchNorm after the backbone.
        batch_norm_momentum (`float`, defaults to 0.01): in PyTorch's sense, Keras' 0.99.
        rescale_epsilon (`float`, defaults to 1e-7): added to the mean attention before the division of RescaleGAP;
            Keras' backend epsilon, small against the reference's smallest attention value of 2.2e-5.
        age_mean_months (`float`, defaults to 0.0), age_sd_months (`float`, defaults to 1.0): the network's last layer
            answers `(bone age - mean) / SD`; fitted on the training split. 0 and 1: raw months, as in the reference.
        loss (`str`, defaults to `"mse"`): `"mse"` or `"smooth_l1"`, on scaled targets.
        smooth_l1_beta (`float`, defaults to 0.1): where smooth L1 turns linear, in SDs of age.
        age_correction (`dict`, *optional*): monotone correction of the answer over predicted age, `knots_months` and
            `offsets_months`; applied in the model's forward pass. From `boneage fit-interval --correct-age`.
        local_calibration (`dict`, *optional*): a hospital's own `offsets_months`, `slope` and `centre_months`; applied
            in the model's forward pass, after the correction. From `boneage calibrate`.
        flip_average (`bool`, defaults to `False`): whether an answer is the average over the image and its mirror
            image unless a call says otherwise, for twice the network time; interval and correction are fitted to
            answers of this kind. From `boneage fit-interval --flip-average`.
        interval (`dict`, *optional*): the 90 % interval around the answer, see `interval_boneage.py`. From
            `boneage fit-interval` or `boneage calibrate`.
        gate (`dict`, *optional*): sizes and limits of the quality gate whose tensors the checkpoint holds, see
            `quality.py`. From `boneage fit-gate`.
        provenance (`dict`, *optional*): where the weights come from: data and split fingerprints, recipe, commit,
            initial weights, licences, date. Written by the training, never read by the model.

    Raises:
        InputError: for an unknown key or a value out of range.
        huggingface_hub.errors.StrictDataclassFieldValidationError: for a value of a wrong type (by its `@strict`).
    """

    model_type = "boneage"

    backbone: str = "vgg19"
    backbone_config: dict | None = None
    freeze_backbone: bool = True
    image_size: int = 384
    sex_input: str = "none"
    sex_embedding_size: int = 32
    pooling: str = "attention"
    attention_channels: list[int] | tuple[int, ...] = (64, 16)
    head_size: int = 1024
    feature_dropout: float | int = 0.5
    head_dropout: float | int = 0.25
    batch_norm_eps: float | int = 1e-3
    batch_norm_momentum: float | int = 0.01
    rescale_epsilon: float | int = 1e-7
    age_mean_months: float | int = 0.0
    age_sd_months: float | int = 1.0
    loss: str = "mse"
    smooth_l1_beta: float | int = 0.1
    age_correction: dict | None = None
    local_calibration: dict | None = None
    flip_average: bool = False
    interval: dict | None = None
    gate: dict | None = None
    provenance: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - _KEYS_OF_TRANSFORMERS)
        if unknown:
            raise InputError(
                f"BoneAgeConfig has no field {', '.join(map(repr, unknown))}; compare its spelling with the docstring."
            )
        self.attention_channels = list(self.attention_channels)
        super().__post_init__(**kwargs)
        # `@strict` runs these again, but wraps what they raise into several lines of an exception of its own.
        self.validate_names()
        self.validate_sizes()
        self.validate_numbers()
        self.validate_adjustments()

    def validate_names(self) -> None:
        names = {"backbone": BACKBONE_NAMES, "sex_input": SEX_INPUTS, "pooling": POOLINGS, "loss": LOSSES}
        for field, known in names.items():
            if getattr(self, field) not in known:
                raise InputError(f"{field} must be one of {', '.join(known)}, not {getattr(self, field)!r}.")
        if (self.backbone == "auto") != (self.backbone_config is not None):
            raise InputError(
                'backbone "auto" and backbone_config belong together: give the config of a transformers backbone with '
                '"auto", and none with any other backbone.'
            )
        if self.backbone_config is not None and not isinstance(self.backbone_config.get("model_type"), str):
            raise InputError('backbone_config needs a "model_type", such as "convnextv2": take a config\'s to_dict().')

    def validate_sizes(self) -> None:
        if not 32 <= self.image_size <= 2048:
            raise InputError(f"image_size must lie between 32 and 2048 pixels, not {self.image_size}.")
        sizes = [self.sex_embedding_size, self.head_size, *self.attention_channels]
        if min(sizes) < 1 or not self.attention_channels:
            raise InputError("sex_embedding_size, head_size and every entry of attention_channels must be at least 1.")

    def validate_numbers(self) -> None:
        for field in ("feature_dropout", "head_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise InputError(f"{field} must lie in [0, 1), not {getattr(self, field)}.")
        for field in ("age_sd_months", "batch_norm_eps", "rescale_epsilon", "smooth_l1_beta"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) > 0):
                raise InputError(f"{field} must be a finite number above 0, not {getattr(self, field)}.")
        if not math.isfinite(self.age_mean_months):
            raise InputError(f"age_mean_months must be a finite number, not {self.age_mean_months}.")
        if not 0 <= self.batch_norm_momentum <= 1:
            raise InputError(f"batch_norm_momentum must lie in [0, 1], not {self.batch_norm_momentum}.")

    def validate_adjustments(self) -> None:
        if self.age_correction is not None:
            check_age_correction(self.age_correction)
        if self.local_calibration is not None:
            check_local_calibration(self.local_calibration, uses_sex=self.uses_sex)
        if self.interval is not None:
            check_interval(self.interval)
        if self.gate is not None:
            check_gate(self.gate)

    @property
    def uses_sex(self) -> bool:
        """Whether the model needs each child's sex."""
        return self.sex_input != "none"
