"""What a config takes, refuses and keeps."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from make_tiny_checkpoint import CHECKPOINT, tiny_config
from transformers import AutoConfig

from boneage_hf import BoneAgeConfig, InputError
from boneage_hf.backbones_boneage import BACKBONES
from boneage_hf.configuration_boneage import BACKBONE_NAMES

CORRECTION: dict[str, Any] = {"knots_months": [20.0, 120.0, 210.0], "offsets_months": [-2.5, 0.0, 3.0]}
LOCAL: dict[str, Any] = {"offsets_months": [1.5, -0.5], "slope": 1.05, "centre_months": 120.0}
INTERVAL: dict[str, Any] = {
    "alpha": 0.1,
    "edges_months": [100.0, 150.0],
    "quantiles": [2.1, 2.0, 2.2],
    "knots_months": [40.0, 120.0],
    "spread_months": [6.0, 7.5],
}


def test_the_defaults_are_the_reference_network() -> None:
    config = BoneAgeConfig()
    assert (config.backbone, config.freeze_backbone, config.image_size) == ("vgg19", True, 384)
    assert (config.sex_input, config.uses_sex) == ("none", False)
    assert (config.attention_channels, config.head_size) == ([64, 16], 1024)
    assert (config.feature_dropout, config.head_dropout) == (0.5, 0.25)
    assert (config.batch_norm_eps, config.batch_norm_momentum) == (1e-3, 0.01)
    assert (config.loss, config.age_mean_months, config.age_sd_months) == ("mse", 0.0, 1.0)
    assert (config.age_correction, config.local_calibration, config.interval) == (None, None, None)


def test_every_backbone_has_a_name_in_the_config() -> None:
    assert set(BACKBONE_NAMES) == {*BACKBONES, "auto"}


def test_an_unknown_field_is_refused_by_its_name() -> None:
    with pytest.raises(InputError, match="'imagesize'"):
        BoneAgeConfig(**{"imagesize": 224})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backbone", "resnet50"),
        ("sex_input", "onehot"),
        ("loss", "mae"),
        ("image_size", 31),
        ("image_size", 2049),
        ("sex_embedding_size", 0),
        ("head_size", 0),
        ("attention_channels", []),
        ("attention_channels", [64, 0]),
        ("feature_dropout", 1.0),
        ("head_dropout", -0.1),
        ("batch_norm_eps", 0.0),
        ("batch_norm_momentum", 1.5),
        ("rescale_epsilon", 0.0),
        ("age_mean_months", math.inf),
        ("age_sd_months", 0.0),
        ("age_sd_months", math.nan),
        ("smooth_l1_beta", -1.0),
    ],
)
def test_a_value_out_of_range_is_refused_in_one_sentence_that_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(InputError) as refusal:
        BoneAgeConfig(**{field: value})
    assert field in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", "384"),
        ("image_size", 384.0),
        ("image_size", True),
        ("freeze_backbone", 1),
        ("attention_channels", 64),
        ("attention_channels", [64.5, 16]),
        ("feature_dropout", "0.5"),
        ("age_mean_months", None),
        ("backbone", None),
        ("provenance", "RSNA"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused(field: str, value: Any) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        BoneAgeConfig(**{field: value})


@pytest.mark.parametrize("size", [32, 2048])
def test_the_ends_of_the_range_of_sizes_are_allowed(size: int) -> None:
    assert BoneAgeConfig(image_size=size).image_size == size


def test_a_field_of_a_wrong_type_cannot_be_set_later() -> None:
    config = BoneAgeConfig()
    with pytest.raises(StrictDataclassFieldValidationError):
        config.image_size = "224"  # type: ignore[assignment]


def test_a_config_that_was_made_invalid_later_is_not_saved(tmp_path: Path) -> None:
    config = BoneAgeConfig()
    config.loss = "mae"
    with pytest.raises(StrictDataclassError, match="loss must be one of"):
        config.save_pretrained(tmp_path)


def test_whole_numbers_are_as_good_as_floats() -> None:
    config = BoneAgeConfig(age_mean_months=127, age_sd_months=41, feature_dropout=0)
    assert (config.age_mean_months, config.age_sd_months, config.feature_dropout) == (127, 41, 0)


def test_a_config_comes_back_from_its_file_unchanged(tmp_path: Path) -> None:
    config = BoneAgeConfig(
        backbone="efficientnet_lite0",
        freeze_backbone=False,
        image_size=224,
        sex_input="embedding",
        sex_embedding_size=16,
        attention_channels=(48, 8),
        head_size=256,
        feature_dropout=0.1,
        head_dropout=0.2,
        batch_norm_eps=1e-5,
        batch_norm_momentum=0.1,
        rescale_epsilon=1e-6,
        age_mean_months=127.32,
        age_sd_months=41.18,
        loss="smooth_l1",
        smooth_l1_beta=0.2,
        age_correction=CORRECTION,
        local_calibration=LOCAL,
        flip_average=True,
        interval=INTERVAL,
        provenance={"recipe": {"epochs": 8}, "data": "abc"},
    )
    config.save_pretrained(tmp_path)
    loaded = BoneAgeConfig.from_pretrained(tmp_path)
    fields = set(BoneAgeConfig.__annotations__)
    assert {name: getattr(loaded, name) for name in fields} == {name: getattr(config, name) for name in fields}
    assert len(fields) == 24


BAD_CORRECTIONS: list[dict[str, Any]] = [
    {"knots": [1.0]},
    {"knots_months": [20.0, 120.0]},
    {"knots_months": [20.0, 20.0, 30.0]},
    {"knots_months": [20.0], "offsets_months": [1.0]},
    {"knots_months": "20"},
    {"offsets_months": [0.0, 0.0, math.nan]},
    {"offsets_months": [0.0, -100.0, 0.0]},  # no longer monotone
]
BAD_CALIBRATIONS: list[dict[str, Any]] = [
    {"offsets_months": [1.0]},
    {"offsets_months": [1.0, math.inf]},
    {"slope": 0.4},
    {"slope": True},
    {"centre_months": None},
    {"shift": 1.0},
]
BAD_INTERVALS: list[dict[str, Any]] = [
    {"alpha": 0.2},
    {"alpha": None},
    {"edges_months": [150.0, 100.0]},
    {"edges_months": [100.0]},
    {"edges_months": [1.0, 2.0, 3.0], "quantiles": [1.0, 1.0, 1.0, 1.0]},
    {"quantiles": [2.1, 0.0, 2.2]},
    {"quantiles": [2.1, math.inf, 2.2]},
    {"quantiles": [2.1, "2.0", 2.2]},
    {"knots_months": [], "spread_months": []},
    {"spread_months": [6.0]},
    {"spread_months": [6.0, -1.0]},
    {"width": 3},
]


@pytest.mark.parametrize(
    ("field", "good", "change"),
    [
        *(("age_correction", CORRECTION, change) for change in BAD_CORRECTIONS),
        *(("local_calibration", LOCAL, change) for change in BAD_CALIBRATIONS),
        *(("interval", INTERVAL, change) for change in BAD_INTERVALS),
    ],
)
def test_what_is_laid_on_the_answer_is_refused_if_it_makes_no_sense(
    field: str, good: dict[str, Any], change: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"sex_input": "embedding", field: good}
    BoneAgeConfig(**settings)
    with pytest.raises(InputError, match=f"^{field}") as refusal:
        BoneAgeConfig(**settings | {field: good | change})
    assert "\n" not in str(refusal.value)


def test_a_model_without_sex_has_one_local_offset() -> None:
    assert BoneAgeConfig(local_calibration=LOCAL | {"offsets_months": [1.5]}).local_calibration is not None
    with pytest.raises(InputError, match="must be one"):
        BoneAgeConfig(local_calibration=LOCAL)


def test_a_tuple_of_widths_becomes_the_list_that_json_knows() -> None:
    assert BoneAgeConfig(attention_channels=(64, 16)).attention_channels == [64, 16]


def test_two_configs_do_not_share_their_widths() -> None:
    first, second = BoneAgeConfig(), BoneAgeConfig()
    assert isinstance(first.attention_channels, list)
    first.attention_channels.append(8)
    assert second.attention_channels == [64, 16]


def test_the_file_holds_no_path_of_the_machine_it_was_made_on(tmp_path: Path) -> None:
    config = BoneAgeConfig.from_pretrained(CHECKPOINT)
    config.save_pretrained(tmp_path)
    assert str(CHECKPOINT.parent) not in (tmp_path / "config.json").read_text()


def test_a_file_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    settings = json.loads((CHECKPOINT / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"sex_imput": "none"}))
    with pytest.raises(InputError, match="'sex_imput'"):
        BoneAgeConfig.from_pretrained(tmp_path)


def test_a_model_that_embeds_sex_uses_it() -> None:
    assert BoneAgeConfig(sex_input="embedding").uses_sex


def test_the_auto_class_finds_the_config_once_the_package_is_in_use() -> None:
    assert isinstance(AutoConfig.from_pretrained(CHECKPOINT), BoneAgeConfig)


def test_the_committed_config_is_what_its_script_makes() -> None:
    loaded, made = BoneAgeConfig.from_pretrained(CHECKPOINT), tiny_config()
    fields = set(BoneAgeConfig.__annotations__)
    assert {name: getattr(loaded, name) for name in fields} == {name: getattr(made, name) for name in fields}
