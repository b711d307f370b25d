"""The network: its counts, its parts against plain loops, what it refuses, what it keeps when it is saved."""

import builtins
import io
import json
import math
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from make_tiny_checkpoint import CHECKPOINT, GOLDEN, processors, sha256, tiny_config, tiny_model, tiny_processor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from boneage_hf import BoneAgeConfig, BoneAgeImageProcessor, BoneAgeModel, BoneAgeOutput, InputError, radiograph
from boneage_hf.backbones_boneage import BACKBONES
from boneage_hf.hub import save_checkpoint
from boneage_hf.modeling_boneage import AttentionPooling, LocallyConnected2d, RegressionHead

WEIGHTS = "model.safetensors"


def small_config(**changes: Any) -> BoneAgeConfig:
    """A network of a few thousand values; without sex input unless asked for."""
    fields: dict[str, Any] = {
        "backbone": "tiny",
        "freeze_backbone": False,
        "image_size": 64,
        "attention_channels": [8, 4],
        "head_size": 16,
        "sex_embedding_size": 4,
        "age_mean_months": 127.3,
        "age_sd_months": 41.2,
    }
    return BoneAgeConfig(**(fields | changes))


def small_model(**changes: Any) -> BoneAgeModel:
    torch.manual_seed(0)
    return BoneAgeModel(small_config(**changes)).eval()


def images(batch_size: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(1))


def copied_checkpoint(folder: Path) -> Path:
    shutil.copytree(CHECKPOINT, folder / "checkpoint")
    return folder / "checkpoint"


def change_weights(folder: Path, *, without: str = "", added: dict[str, torch.Tensor] | None = None) -> None:
    tensors = load_file(folder / WEIGHTS)
    if without:
        tensors = {name: value for name, value in tensors.items() if not name.endswith(without)}
    save_file(tensors | (added or {}), folder / WEIGHTS, metadata={"format": "pt"})


# --- counts ---------------------------------------------------------------------------------------------------------


def count_as_keras(module: nn.Module) -> tuple[int, int]:
    """(trainable, not trainable) values; Keras counts BatchNorm statistics as weights and has no counter of steps."""
    trains = sum(value.numel() for value in module.parameters() if value.requires_grad)
    frozen = sum(value.numel() for value in module.parameters() if not value.requires_grad)
    statistics = sum(value.numel() for value in module.buffers() if value.is_floating_point())
    return trains, frozen + statistics


@pytest.fixture(scope="module")
def reference_network() -> BoneAgeModel:
    with torch.device("meta"):  # shapes only
        return BoneAgeModel(BoneAgeConfig())


def test_the_reference_network_has_exactly_the_reference_counts(reference_network: BoneAgeModel) -> None:
    trains, frozen = count_as_keras(reference_network)
    assert (trains + frozen, trains, frozen) == (20_589_601, 563_681, 20_025_920)


@pytest.mark.parametrize(
    ("name", "trains", "frozen"),
    [
        ("backbone", 0, 20_024_384),
        ("feature_norm", 1_024, 1_024),
        ("attention.reduce.0", 32_832, 0),
        ("attention.reduce.1", 1_040, 0),
        ("attention.local", 2_448, 0),
        ("attention.expand", 0, 512),
        ("head.dense", 525_312, 0),
        ("head.output", 1_025, 0),
    ],
)
def test_each_layer_has_the_values_of_its_row_in_the_reference(
    reference_network: BoneAgeModel, name: str, trains: int, frozen: int
) -> None:
    assert count_as_keras(reference_network.get_submodule(name)) == (trains, frozen)


def test_the_reference_network_has_no_value_beside_its_rows(reference_network: BoneAgeModel) -> None:
    assert {name for name, _ in reference_network.named_children()} == {
        "backbone",
        "feature_norm",
        "attention",
        "head",
    }
    assert reference_network.head.sex_embedding is None


# --- parts against plain loops --------------------------------------------------------------------------------------


def test_the_locally_connected_layer_equals_a_plain_double_loop() -> None:
    torch.manual_seed(2)
    layer = LocallyConnected2d(5, 4)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    hidden = torch.randn(2, 5, 4, 4)
    expected = torch.zeros(2, 4, 4)
    for row in range(4):
        for column in range(4):
            for image in range(2):
                products = hidden[image, :, row, column] * layer.weight[row, column]
                expected[image, row, column] = products.sum() + layer.bias[row, column]
    torch.testing.assert_close(layer(hidden), expected)


def test_each_position_of_the_locally_connected_layer_has_weights_of_its_own() -> None:
    layer = LocallyConnected2d(3, 2)
    hidden = torch.randn(1, 3, 2, 2)
    layer(hidden)[0, 0, 1].backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad[0, 1], hidden[0, :, 0, 1])
    assert int(layer.weight.grad.count_nonzero()) == 3


def pooling(channels: int = 6, grid: int = 3) -> AttentionPooling:
    torch.manual_seed(3)
    module = AttentionPooling(small_config(), channels, grid)
    nn.init.normal_(module.local.weight)
    nn.init.normal_(module.local.bias)
    return module


def test_attention_pooling_equals_loops_in_float64() -> None:
    module, features = pooling(), torch.randn(2, 6, 3, 3)
    with torch.no_grad():
        pooled, attention = module(features)
    values = {name: value.detach().double().numpy() for name, value in module.state_dict().items()}
    for image in range(2):
        weighted, total = np.zeros(6), 0.0
        for row in range(3):
            for column in range(3):
                here = features[image, :, row, column].double().numpy()
                hidden = here
                for conv in ("reduce.0", "reduce.1"):
                    hidden = np.maximum(values[f"{conv}.weight"][:, :, 0, 0] @ hidden + values[f"{conv}.bias"], 0)
                answer = values["local.weight"][row, column] @ hidden + values["local.bias"][row, column]
                share = 1 / (1 + math.exp(-answer))
                assert float(attention[image, row, column]) == pytest.approx(share, abs=1e-5)
                weighted, total = weighted + share * here, total + share
        np.testing.assert_allclose(pooled[image].numpy(), weighted / total, atol=1e-5)


def constant_attention(logit: float) -> AttentionPooling:
    module = pooling()
    nn.init.zeros_(module.local.weight)
    nn.init.constant_(module.local.bias, logit)
    return module


def test_equal_attention_everywhere_gives_the_plain_mean_of_the_features() -> None:
    features = torch.randn(2, 6, 3, 3)
    for logit in (3.0, 0.0, -4.0):
        pooled, _ = constant_attention(logit)(features)
        torch.testing.assert_close(pooled, features.mean(dim=(2, 3)), rtol=1e-5, atol=1e-5)


def test_no_attention_anywhere_gives_zero_and_not_nan() -> None:
    pooled, attention = constant_attention(-200.0)(torch.randn(2, 6, 3, 3))
    assert attention.max().item() == 0.0
    assert torch.equal(pooled, torch.zeros(2, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_division_by_tiny_attention_is_done_in_float32(dtype: torch.dtype) -> None:
    # The reference's attention goes down to 2.2e-5; 1 / 2.2e-5 times a feature of 100 is beyond float16.
    module = constant_attention(math.log(2.2e-5)).to(dtype)
    features = (100 * torch.rand(2, 6, 3, 3) + 50).to(dtype)
    pooled, attention = module(features)
    assert (pooled.dtype, attention.dtype) == (dtype, torch.float32)
    share = attention.double().mean()
    expected = features.double().mean(dim=(2, 3)) * (share / (share + 1e-7))
    torch.testing.assert_close(pooled.double(), expected, rtol=6e-4 if dtype == torch.float16 else 2.5e-3, atol=0)


def test_the_head_appends_the_vector_of_the_childs_sex() -> None:
    torch.manual_seed(4)
    head = RegressionHead(small_config(sex_input="embedding"), 6).eval()
    pooled, sex = torch.randn(2, 6), torch.tensor([1, 0])
    assert head.sex_embedding is not None
    for image in range(2):
        joined = torch.cat([pooled[image], head.sex_embedding.weight[sex[image]]])
        hidden = head.dense.weight @ joined + head.dense.bias
        hidden = torch.where(hidden > 0, hidden, hidden.exp() - 1)  # ELU
        expected = head.output.weight[0] @ hidden + head.output.bias[0]
        torch.testing.assert_close(head(pooled, sex)[image], expected)


# --- what goes in and comes out -------------------------------------------------------------------------------------


def test_the_output_has_the_documented_shapes_and_types() -> None:
    with torch.no_grad():
        output = small_model()(images(), output_features=True)
    assert isinstance(output, BoneAgeOutput)
    assert output.loss is None
    assert (output.bone_age_months.shape, output.bone_age_months.dtype) == ((3,), torch.float32)
    assert (output.attention.shape, output.attention.dtype) == ((3, 2, 2), torch.float32)
    assert output.features is not None
    assert output.features.shape == (3, 32, 2, 2)
    assert bool(((output.attention > 0) & (output.attention < 1)).all())


def test_features_are_returned_only_if_asked_for() -> None:
    assert "features" not in small_model()(images())


def test_a_plain_tuple_is_returned_on_request() -> None:
    model = small_model()
    output, answer = model(images()), model(images(), return_dict=False)
    assert isinstance(answer, tuple)
    assert torch.equal(answer[0], output.bone_age_months)
    assert torch.equal(answer[1], output.attention)


def test_with_labels_the_tuple_begins_with_the_loss() -> None:
    model, labels = small_model(), torch.tensor([60.0, 120.0, 180.0])
    assert torch.equal(model(images(), labels=labels, return_dict=False)[0], model(images(), labels=labels).loss)


def test_each_image_of_a_batch_is_judged_alone() -> None:
    model = small_model()
    with torch.no_grad():
        together = model(images(4))
        for index, image in enumerate(images(4)):
            alone = model(image[None])
            torch.testing.assert_close(alone.bone_age_months[0], together.bone_age_months[index], rtol=0, atol=1e-4)
            torch.testing.assert_close(alone.attention[0], together.attention[index], rtol=0, atol=1e-5)


def test_the_answer_is_scaled_by_the_configs_mean_and_sd() -> None:
    model = small_model(age_mean_months=0.0, age_sd_months=1.0)
    with torch.no_grad():
        scaled = model(images()).bone_age_months
        model.config.age_mean_months, model.config.age_sd_months = 127.3, 41.2
        torch.testing.assert_close(model(images()).bone_age_months, 127.3 + 41.2 * scaled)


def test_another_image_size_is_refused_with_the_cure() -> None:
    with pytest.raises(InputError, match=r"64 x 64 px, not 96 x 64.*BoneAgeImageProcessor.*resize_attention"):
        small_model()(torch.zeros(1, 3, 96, 64))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 64, 64, 3), (64, 64)])
def test_another_shape_is_refused_with_the_cure(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"\(B, 3, 64, 64\).*BoneAgeImageProcessor"):
        small_model()(torch.zeros(shape))


def test_a_model_that_uses_sex_refuses_a_call_without_it() -> None:
    with pytest.raises(InputError, match="needs each child's sex"):
        small_model(sex_input="embedding")(images())


@pytest.mark.parametrize(
    "sex",
    [
        torch.tensor([0, 1]),
        torch.tensor([[0, 1, 0]]),
        torch.tensor([0.0, 1.0, 0.0]),
        torch.tensor([True, False, True]),
    ],
    ids=["too few", "two dimensions", "float", "bool"],
)
def test_sex_must_be_one_integer_per_image(sex: torch.Tensor) -> None:
    with pytest.raises(InputError, match="one integer per image"):
        small_model(sex_input="embedding")(images(), sex=sex)


@pytest.mark.parametrize("code", [-1, 2])
def test_sex_must_be_zero_or_one(code: int) -> None:
    with pytest.raises(InputError, match=r"0 \(female\) or 1 \(male\)"):
        small_model(sex_input="embedding")(images(), sex=torch.tensor([0, 1, code]))


def test_a_model_without_sex_input_answers_the_same_with_and_without_sex() -> None:
    model = small_model()
    with torch.no_grad():
        first, second = model(images()), model(images(), sex=torch.tensor([0, 1, 1]))
    assert torch.equal(first.bone_age_months, second.bone_age_months)


def test_sex_changes_the_bone_age_and_not_the_attention() -> None:
    model = small_model(sex_input="embedding")
    with torch.no_grad():
        female, male = (model(images(), sex=torch.full((3,), code)) for code in (0, 1))
    assert bool((female.bone_age_months != male.bone_age_months).all())
    assert torch.equal(female.attention, male.attention)


# --- loss -----------------------------------------------------------------------------------------------------------


def test_the_squared_error_equals_a_hand_computation_on_scaled_targets() -> None:
    model, labels = small_model(loss="mse"), torch.tensor([60.0, 130.0, 210.0])
    output = model(images(), labels=labels)
    errors = [(month - label) / 41.2 for month, label in zip(output.bone_age_months.tolist(), labels, strict=True)]
    assert output.loss.item() == pytest.approx(sum(float(error) ** 2 for error in errors) / 3, rel=1e-5)


def test_the_smooth_absolute_error_equals_a_hand_computation_on_both_sides_of_beta() -> None:
    model = small_model(loss="smooth_l1", smooth_l1_beta=0.1)
    with torch.no_grad():
        months = model(images()).bone_age_months
    labels = months + torch.tensor([2.0, -3.0, 80.0])  # 0.05, 0.07 and 1.9 standard deviations
    expected = []
    for month, label in zip(months.tolist(), labels.tolist(), strict=True):
        error = abs(month - label) / 41.2
        expected.append(0.5 * error**2 / 0.1 if error < 0.1 else error - 0.05)
    assert model(images(), labels=labels).loss.item() == pytest.approx(sum(expected) / 3, rel=1e-4)


def test_labels_in_whole_months_are_as_good_as_floats() -> None:
    model, labels = small_model(), torch.tensor([60, 130, 210])
    assert torch.equal(model(images(), labels=labels).loss, model(images(), labels=labels.float()).loss)


def test_a_few_steps_of_training_reduce_the_loss() -> None:
    model = small_model(feature_dropout=0.0, head_dropout=0.0).train()
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=0.01)
    labels, losses = torch.tensor([40.0, 120.0, 200.0, 160.0]), []
    for _ in range(25):
        loss = model(images(4), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# --- frozen or training ---------------------------------------------------------------------------------------------


def test_a_frozen_backbone_stays_in_evaluation_mode_and_keeps_its_statistics() -> None:
    model = small_model(freeze_backbone=True).train()
    assert not any(module.training for module in model.backbone.modules())
    assert model.feature_norm.training
    assert model.head.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(images())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"feature_norm.running_mean", "feature_norm.running_var", "feature_norm.num_batches_tracked"}


def test_a_backbone_that_trains_goes_into_training_mode() -> None:
    model = small_model(freeze_backbone=False).train()
    assert all(module.training for module in model.modules())


def test_evaluation_mode_reaches_every_part_and_repeats_its_answer() -> None:
    model = small_model().train().eval()
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(images()).bone_age_months, model(images()).bone_age_months)


@pytest.mark.parametrize("freeze", [True, False])
def test_gradients_reach_all_that_trains_and_nothing_else(freeze: bool) -> None:
    model = small_model(freeze_backbone=freeze, sex_input="embedding")
    model(images(), sex=torch.tensor([0, 1, 0]), labels=torch.tensor([60.0, 120.0, 180.0])).loss.backward()
    without = {name for name, value in model.named_parameters() if value.grad is None}
    frozen = {name for name, _ in model.named_parameters() if name.startswith("backbone.")} if freeze else set()
    assert without == frozen | {"attention.expand.weight"}


@pytest.mark.parametrize("freeze", [True, False])
def test_loaded_parameters_train_as_the_config_says(freeze: bool) -> None:
    model = BoneAgeModel.from_pretrained(CHECKPOINT, freeze_backbone=freeze)
    trains = {name for name, value in model.named_parameters() if value.requires_grad}
    expected = {name for name, _ in model.named_parameters()} - {"attention.expand.weight"}
    assert trains == {name for name in expected if not (freeze and name.startswith("backbone."))}


def test_a_loaded_model_is_in_evaluation_mode() -> None:
    assert not any(module.training for module in BoneAgeModel.from_pretrained(CHECKPOINT).modules())


# --- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_the_constructor_touches_neither_disk_nor_network(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_model()  # what Python and transformers import or look up once

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the constructor reached for the disk or the network")

    for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "stat"), (socket, "socket")):
        monkeypatch.setattr(module, name, refuse)
    with torch.device("cpu" if backbone == "tiny" else "meta"):
        BoneAgeModel(small_config(backbone=backbone))


def test_the_same_seed_draws_the_same_weights() -> None:
    first, second = small_model().state_dict(), small_model().state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_depthwise_weights_are_drawn_for_the_inputs_they_really_have() -> None:
    # He: variance 2 / (9 inputs). Counted over all groups, an untrained network would answer the same for every image.
    weights = small_model().state_dict()
    depthwise = torch.cat([value.flatten() for name, value in weights.items() if name.endswith("conv_dw.weight")])
    assert depthwise.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.1)


def test_a_field_that_became_invalid_is_noticed_by_the_constructor() -> None:
    config = small_config()
    config.loss = "mae"
    with pytest.raises(StrictDataclassError, match="loss must be one of"):
        BoneAgeModel(config)


@pytest.mark.parametrize(
    ("backbone", "channels"), [("vgg19", 512), ("vgg19_bn", 512), ("efficientnet_lite0", 1280), ("tiny", 32)]
)
def test_all_backbones_share_the_code_of_attention_and_head(backbone: str, channels: int) -> None:
    model = small_model(backbone=backbone, sex_input="embedding")
    assert (type(model.attention), type(model.head)) == (AttentionPooling, RegressionHead)
    assert model.attention.reduce[0].weight.shape == (8, channels, 1, 1)
    with torch.no_grad():
        output = model(images(2), sex=torch.tensor([0, 1]), output_features=True)
    assert output.features.shape == (2, channels, 2, 2)
    assert output.attention.shape == (2, 2, 2)
    assert bool(output.bone_age_months.isfinite().all())


@pytest.mark.parametrize(("backbone", "grid"), [("vgg19", 9), ("efficientnet_lite0", 10), ("tiny", 10)])
def test_the_attention_grid_follows_the_rounding_of_the_backbone(backbone: str, grid: int) -> None:
    with torch.device("meta"):
        model = BoneAgeModel(small_config(backbone=backbone, image_size=299))
        attention = model(torch.zeros(1, 3, 299, 299)).attention
    assert attention.shape == (1, grid, grid)
    assert model.attention.local.weight.shape == (grid, grid, 4)


# --- another image size on purpose ----------------------------------------------------------------------------------


def test_resized_attention_makes_the_model_one_for_the_new_size() -> None:
    model = small_model()
    model.resize_attention(128)
    assert model.config.image_size == 128
    assert model(images(2, 128)).attention.shape == (2, 4, 4)
    with pytest.raises(InputError, match="128 x 128"):
        model(images(2, 64))


def test_resizing_to_the_size_it_has_changes_nothing() -> None:
    model = small_model()
    with torch.no_grad():
        before = model(images())
        model.resize_attention(64)
        assert torch.equal(model(images()).bone_age_months, before.bone_age_months)


def test_resized_attention_is_interpolated_bilinearly_between_the_middles_of_cells() -> None:
    model = small_model()
    with torch.no_grad():
        old = torch.randn_like(model.attention.local.weight)
        model.attention.local.weight.copy_(old)
        model.attention.local.bias.copy_(torch.tensor([[0.0, 4.0], [8.0, 12.0]]))
    model.resize_attention(128)
    new = model.attention.local.weight
    for row in range(4):
        for column in range(4):
            # 4 cells over 2: middles of the new ones at -0.25, 0.25, 0.75, 1.25 of the old, held at the border
            y, x = (min(max(0.5 * place - 0.25, 0.0), 1.0) for place in (row, column))
            upper = (1 - x) * old[0, 0] + x * old[0, 1]
            lower = (1 - x) * old[1, 0] + x * old[1, 1]
            torch.testing.assert_close(new[row, column], (1 - y) * upper + y * lower)
            assert model.attention.local.bias[row, column].item() == pytest.approx(8 * y + 4 * x, abs=1e-5)


def test_a_resized_model_is_saved_and_loaded_like_any_other(tmp_path: Path) -> None:
    model = small_model()
    model.resize_attention(96)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(
            BoneAgeModel.from_pretrained(tmp_path)(images(2, 96)).bone_age_months,
            model(images(2, 96)).bone_age_months,
        )


@pytest.mark.parametrize("size", [0, 31, 4000])
def test_resizing_to_a_size_that_no_config_allows_leaves_the_model_as_it_was(size: int) -> None:
    model = small_model()
    with pytest.raises(InputError, match="image_size"):
        model.resize_attention(size)
    assert model.config.image_size == 64
    assert model.attention.local.weight.shape == (2, 2, 4)


# --- saved and loaded -----------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_float16_but_for_batchnorm_statistics_and_counters() -> None:
    with safe_open(CHECKPOINT / WEIGHTS, framework="pt") as stored:
        types = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118 - not a dict
    for name, dtype in types.items():
        if name.endswith(("running_mean", "running_var")):
            assert dtype == "F32", name
        elif name.endswith("num_batches_tracked"):
            assert dtype == "I64", name
        else:
            assert dtype == "F16", name


def test_a_checkpoint_says_float32_and_loads_as_float32_without_being_told() -> None:
    assert json.loads((CHECKPOINT / "config.json").read_text())["dtype"] == "float32"
    for load in (BoneAgeModel.from_pretrained, AutoModel.from_pretrained):
        model = load(CHECKPOINT)
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}


def test_every_value_of_a_loaded_model_is_the_stored_one() -> None:
    # Models are built on the meta device: what is neither stored nor initialised again would be garbage.
    model, stored = BoneAgeModel.from_pretrained(CHECKPOINT), load_file(CHECKPOINT / WEIGHTS)
    loaded = model.state_dict()
    assert set(loaded) == set(stored)
    for name, value in loaded.items():
        assert torch.equal(value, stored[name].to(value.dtype)), name
    assert {name for name, _ in model.named_buffers()} <= set(stored)  # no buffer that is not stored
    for module in model.modules():
        attributes = {**vars(module), **module._parameters, **module._buffers}
        assert not any(isinstance(value, torch.Tensor) and value.is_meta for value in attributes.values())


def test_the_committed_checkpoint_is_what_its_script_makes() -> None:
    made = tiny_model().state_dict()
    for name, value in load_file(CHECKPOINT / WEIGHTS).items():
        torch.testing.assert_close(value.float(), made[name].float(), rtol=1e-3, atol=1e-6)


def test_the_committed_checkpoint_takes_tens_of_kilobytes() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 40_000


def test_storing_float16_moves_predictions_by_little(tmp_path: Path) -> None:
    model = tiny_model()
    save_checkpoint(model, tiny_processor(), tmp_path / "half")
    sex = torch.tensor([0, 1, 0, 1, 0, 1])
    with torch.no_grad():
        exact = model(images(6), sex=sex)
        stored = BoneAgeModel.from_pretrained(tmp_path / "half")(images(6), sex=sex)
    difference = (exact.bone_age_months - stored.bone_age_months).abs()
    assert 0 < float(difference.max()) < 0.25


def test_a_model_saved_in_float32_loads_bit_by_bit_and_answers_the_same(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = BoneAgeModel.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    # To rounding: weights that the loader maps lie at other addresses, and kernels may add in another order.
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(images()).bone_age_months, model(images()).bone_age_months, rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_loaded_in_sixteen_bits_answers_in_float32(dtype: torch.dtype) -> None:
    model = BoneAgeModel.from_pretrained(CHECKPOINT, dtype=dtype)
    assert model.dtype == dtype
    sex = torch.tensor([0, 1, 0])
    with torch.no_grad():
        output = model(images().to(dtype), sex=sex)
        exact = BoneAgeModel.from_pretrained(CHECKPOINT)(images(), sex=sex)
    assert (output.bone_age_months.dtype, output.attention.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(output.bone_age_months, exact.bone_age_months, rtol=0, atol=3.0)
    torch.testing.assert_close(output.attention, exact.attention, rtol=0, atol=0.05)


def test_the_mean_age_is_not_rounded_with_the_weights() -> None:
    model = BoneAgeModel.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    sex = torch.tensor([0, 1, 0])
    with torch.no_grad():
        before = model(images().to(torch.bfloat16), sex=sex).bone_age_months
        model.config.age_mean_months += 7.3  # 127.3 would be 127.5 in bfloat16
        after = model(images().to(torch.bfloat16), sex=sex).bone_age_months
    torch.testing.assert_close(after - before, torch.full((3,), 7.3), rtol=0, atol=1e-4)


def test_under_autocast_months_and_attention_are_float32() -> None:
    model = small_model()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images(), labels=torch.tensor([60.0, 120.0, 180.0]), output_features=True)
    for value in (output.bone_age_months, output.attention, output.features, output.loss):
        assert value.dtype == torch.float32
    with torch.no_grad():
        exact = model(images())
    torch.testing.assert_close(output.bone_age_months, exact.bone_age_months, rtol=0, atol=3.0)


def test_a_missing_weight_is_refused_instead_of_drawn_at_random(tmp_path: Path) -> None:
    folder = copied_checkpoint(tmp_path)
    change_weights(folder, without="head.dense.weight")
    with pytest.raises(InputError, match=r"1 missing, such as head\.dense\.weight"):
        BoneAgeModel.from_pretrained(folder)


def test_a_left_over_weight_is_refused(tmp_path: Path) -> None:
    folder = copied_checkpoint(tmp_path)
    change_weights(folder, added={"head.extra.weight": torch.ones(2)})
    with pytest.raises(InputError, match=r"1 unexpected, such as head\.extra\.weight"):
        BoneAgeModel.from_pretrained(folder)


def test_weights_of_another_image_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 of another shape, such as attention\.local\.bias"):
        BoneAgeModel.from_pretrained(CHECKPOINT, image_size=128)


def test_the_auto_class_refuses_them_too(tmp_path: Path) -> None:
    folder = copied_checkpoint(tmp_path)
    change_weights(folder, without="head.dense.weight")
    with pytest.raises(InputError, match=r"head\.dense\.weight"):
        AutoModel.from_pretrained(folder)


def test_who_asks_for_the_difference_gets_it_and_the_model(tmp_path: Path) -> None:
    folder = copied_checkpoint(tmp_path)
    change_weights(folder, without="head.dense.weight", added={"head.extra.weight": torch.ones(2)})
    model, info = BoneAgeModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, BoneAgeModel)
    assert set(info["missing_keys"]) == {"head.dense.weight"}
    assert set(info["unexpected_keys"]) == {"head.extra.weight"}


def test_other_shapes_may_be_loaded_on_purpose() -> None:
    model = BoneAgeModel.from_pretrained(CHECKPOINT, image_size=128, ignore_mismatched_sizes=True)
    assert model.attention.local.weight.shape == (4, 4, 8)
    assert bool(model.attention.local.weight.isfinite().all())


def test_counters_of_steps_may_be_missing(tmp_path: Path) -> None:
    folder = copied_checkpoint(tmp_path)
    change_weights(folder, without="num_batches_tracked")
    model = BoneAgeModel.from_pretrained(folder)
    assert int(model.feature_norm.num_batches_tracked) == 0


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = copied_checkpoint(tmp_path)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        BoneAgeModel.from_pretrained(folder)


def test_all_values_are_drawn_as_by_the_constructor_where_none_are_stored() -> None:
    torch.manual_seed(0)
    config = small_config(sex_input="embedding")
    model, info = BoneAgeModel.from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    assert set(info["missing_keys"]) == set(model.state_dict())
    built = small_model(sex_input="embedding").state_dict()
    for name, value in model.state_dict().items():
        assert bool(value.isfinite().all()), name
        if value.numel() >= 16 and value.is_floating_point():
            assert value.std().item() == pytest.approx(built[name].std().item(), rel=0.5, abs=1e-6), name
        if value.numel() and name.endswith(("bias", "running_mean", "running_var", "tracked", "expand.weight")):
            assert torch.equal(value, built[name]), name


# --- golden numbers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "hand.safetensors")


@pytest.fixture(scope="module")
def hand_output(golden: dict[str, torch.Tensor]) -> BoneAgeOutput:
    pixel_values = tiny_processor().to_pixel_values(golden["prepared"].expand(2, -1, -1))
    with torch.no_grad():
        return BoneAgeModel.from_pretrained(CHECKPOINT)(pixel_values, sex=torch.tensor([0, 1]), output_features=True)


def test_the_features_of_the_drawn_hand_are_the_golden_ones(
    golden: dict[str, torch.Tensor], hand_output: BoneAgeOutput
) -> None:
    assert hand_output.features is not None
    torch.testing.assert_close(hand_output.features[:1], golden["features"], rtol=0, atol=1e-4)


def test_the_attention_to_the_drawn_hand_is_the_golden_one(
    golden: dict[str, torch.Tensor], hand_output: BoneAgeOutput
) -> None:
    torch.testing.assert_close(hand_output.attention[:1], golden["attention"], rtol=0, atol=1e-4)


def test_the_months_of_the_drawn_hand_are_the_golden_ones(
    golden: dict[str, torch.Tensor], hand_output: BoneAgeOutput
) -> None:
    torch.testing.assert_close(hand_output.bone_age_months, golden["months"], rtol=0, atol=1e-4)


def test_the_golden_numbers_tell_images_and_sexes_apart(golden: dict[str, torch.Tensor]) -> None:
    assert abs(float(golden["months"][0] - golden["months"][1])) > 1
    assert float(golden["attention"].std()) > 0.01
    assert float(golden["features"].std()) > 0.1


def test_the_prepared_drawn_hand_is_the_golden_one(golden: dict[str, torch.Tensor]) -> None:
    processor = BoneAgeImageProcessor.from_pretrained(CHECKPOINT)
    prepared = processor.prepare(radiograph.read(GOLDEN / "hand.png").image)
    assert np.array_equal(prepared, golden["prepared"][0].numpy())


@pytest.mark.parametrize("name", sorted(processors()))
def test_the_preparation_of_the_drawn_hand_has_the_golden_fingerprint(name: str) -> None:
    fingerprints = json.loads((GOLDEN / "prepared.json").read_text())
    assert sha256(processors()[name].prepare(radiograph.read(GOLDEN / "hand.png").image)) == fingerprints[name]


def test_the_tiny_config_is_what_the_other_tests_rely_on() -> None:
    config = tiny_config()
    assert (config.image_size, config.uses_sex, config.backbone) == (64, True, "tiny")


def test_the_backbones_features_in_place_of_images_give_the_same_answer() -> None:
    torch.manual_seed(0)
    model = BoneAgeModel(BoneAgeConfig(backbone="tiny", image_size=64, sex_input="embedding")).eval()
    images, sex = torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 0])
    with torch.no_grad():
        whole = model(images, sex=sex)
        parts = model(backbone_features=model.backbone(images), sex=sex)
    assert torch.equal(whole.bone_age_months, parts.bone_age_months)
    assert torch.equal(whole.attention, parts.attention)


@pytest.mark.parametrize("both", [True, False])
def test_a_model_takes_either_images_or_features(both: bool) -> None:
    model = BoneAgeModel(BoneAgeConfig(backbone="tiny", image_size=64))
    given = {"pixel_values": torch.zeros(1, 3, 64, 64), "backbone_features": torch.zeros(1, 32, 2, 2)} if both else {}
    with pytest.raises(InputError, match="either pixel_values or backbone_features"):
        model(**given)


def test_features_of_another_grid_are_refused() -> None:
    model = BoneAgeModel(BoneAgeConfig(backbone="tiny", image_size=64))
    with pytest.raises(InputError, match=r"must have the shape \(B, 32, 2, 2\)"):
        model(backbone_features=torch.zeros(1, 32, 3, 3))


def test_average_pooling_is_the_mean_of_the_normalised_features_and_attends_to_all_alike() -> None:
    torch.manual_seed(0)
    model = BoneAgeModel(BoneAgeConfig(backbone="tiny", image_size=64, pooling="average")).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = model(images, output_features=True)
        features = output.features.double()
        slow = torch.stack([features[:, :, row, column] for row in range(2) for column in range(2)]).sum(0) / 4
        months = model.head(slow.float(), None)
    torch.testing.assert_close(output.bone_age_months, months)
    assert torch.equal(output.attention, torch.ones(2, 2, 2))


def test_average_pooling_has_no_attention_weights_and_takes_other_image_sizes() -> None:
    model = BoneAgeModel(BoneAgeConfig(backbone="tiny", image_size=64, pooling="average")).eval()
    assert not [name for name, _ in model.named_parameters() if name.startswith("attention")]
    model.resize_attention(96)
    assert model(torch.zeros(1, 3, 96, 96)).attention.shape == (1, 3, 3)
