"""The layer table against the reference's Keras summary, row by row."""

from pathlib import Path

import pytest
import torch

from boneage_hf.cli import main
from boneage_hf.configuration_boneage import BoneAgeConfig
from boneage_hf.errors import InputError
from boneage_hf.hub import save_checkpoint
from boneage_hf.image_processing_boneage import BoneAgeImageProcessor
from boneage_hf.modeling_boneage import BoneAgeModel
from boneage_hf.summary import LayerRow, layer_table, print_summary, reference_model

#: Keras summary of "Bone Age Prediction" (Nguyen D. B. M. et al.): layer, output, parameters, trainable ones, from.
REFERENCE = [
    LayerRow("input_2", "384, 384, 3", 0, 0),
    LayerRow("vgg19", "12, 12, 512", 20_024_384, 0, ("input_2",)),
    LayerRow("batch_normalization", "12, 12, 512", 2_048, 1_024, ("vgg19",)),
    LayerRow("conv2d", "12, 12, 64", 32_832, 32_832, ("batch_normalization",)),
    LayerRow("conv2d_1", "12, 12, 16", 1_040, 1_040, ("conv2d",)),
    LayerRow("locally_connected2d", "12, 12, 1", 2_448, 2_448, ("conv2d_1",)),
    LayerRow("conv2d_2", "12, 12, 512", 512, 0, ("locally_connected2d",)),
    LayerRow("multiply", "12, 12, 512", 0, 0, ("conv2d_2", "batch_normalization")),
    LayerRow("global_average_pooling2d", "512", 0, 0, ("multiply",)),
    LayerRow("global_average_pooling2d_1", "512", 0, 0, ("conv2d_2",)),
    LayerRow("RescaleGAP", "512", 0, 0, ("global_average_pooling2d", "global_average_pooling2d_1")),
    LayerRow("dropout", "512", 0, 0, ("RescaleGAP",)),
    LayerRow("dense", "1024", 525_312, 525_312, ("dropout",)),
    LayerRow("dropout_1", "1024", 0, 0, ("dense",)),
    LayerRow("dense_1", "1", 1_025, 1_025, ("dropout_1",)),
]

CONFIGS = [
    BoneAgeConfig(backbone="tiny", image_size=64),
    BoneAgeConfig(backbone="tiny", image_size=64, sex_input="embedding", sex_embedding_size=5, freeze_backbone=False),
    BoneAgeConfig(backbone="tiny", image_size=96, attention_channels=[8]),
    BoneAgeConfig(backbone="efficientnet_lite0", image_size=300, sex_input="embedding", freeze_backbone=False),
]


def on_meta(config: BoneAgeConfig) -> BoneAgeModel:
    with torch.device("meta"):
        return BoneAgeModel(config)


@pytest.fixture(scope="module")
def reference_rows() -> list[LayerRow]:
    return layer_table(reference_model())


@pytest.mark.parametrize("position", range(len(REFERENCE)), ids=[row.name for row in REFERENCE])
def test_a_row_is_that_of_the_reference(position: int, reference_rows: list[LayerRow]) -> None:
    assert reference_rows[position] == REFERENCE[position]


def test_totals_are_those_of_the_reference(reference_rows: list[LayerRow]) -> None:
    assert len(reference_rows) == len(REFERENCE)
    assert sum(row.values for row in reference_rows) == 20_589_601
    assert sum(row.trainable for row in reference_rows) == 563_681


def test_the_printed_table_of_the_reference_ends_with_its_totals() -> None:
    lines = print_summary(None).splitlines()
    assert [line.split() for line in lines[-3:]] == [
        ["total", "20,589,601"],
        ["trainable", "563,681"],
        ["not", "trainable", "20,025,920"],
    ]
    assert lines[3].split() == ["vgg19", "12,", "12,", "512", "20,024,384", "0", "input_2"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.backbone} {config.sex_input}")
def test_the_rows_hold_every_value_of_the_model_once(config: BoneAgeConfig) -> None:
    model = on_meta(config)
    counters = sum(value.numel() for name, value in model.state_dict().items() if name.endswith("num_batches_tracked"))
    stored = sum(value.numel() for value in model.state_dict().values())
    rows = layer_table(model)
    assert sum(row.values for row in rows) == stored - counters
    assert sum(row.trainable for row in rows) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.backbone} {config.sex_input}")
def test_every_layer_has_a_name_of_its_own_and_reads_layers_above_it(config: BoneAgeConfig) -> None:
    known: set[str] = set()
    for row in layer_table(on_meta(config)):
        assert row.name not in known
        assert set(row.source) <= known
        known.add(row.name)


@pytest.mark.parametrize("config", CONFIGS[:3], ids=lambda config: f"{config.backbone} {config.sex_input}")
def test_shapes_are_those_of_a_forward_pass(config: BoneAgeConfig) -> None:
    model = BoneAgeModel(config).eval()
    shapes: dict[str, str] = {}

    def note(name: str) -> None:
        def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
            sides = output.shape[1:]
            channels_last = (*sides[1:], sides[0]) if len(sides) == 3 else (*sides, 1) if len(sides) == 2 else sides
            shapes[name] = ", ".join(map(str, channels_last))

        model.get_submodule(MODULES[name]).register_forward_hook(hook)

    last = len(config.attention_channels)
    MODULES = {
        config.backbone: "backbone",
        "batch_normalization": "feature_norm",
        "conv2d": "attention.reduce.0",
        "locally_connected2d": "attention.local",
        f"conv2d_{last}": "attention.expand",
        "dropout": "head.feature_dropout",
        "dense": "head.dense",
        "dense_1": "head.output",
    } | ({"embedding": "head.sex_embedding"} if config.uses_sex else {})
    for name in MODULES:
        note(name)
    model(pixel_values=torch.zeros(1, 3, config.image_size, config.image_size), sex=torch.tensor([0]))
    table = {row.name: row.output for row in layer_table(model)}
    assert {name: table[name] for name in shapes} == shapes
    assert len(shapes) == len(MODULES)


def test_a_sex_input_adds_its_rows_and_widens_the_dense_layer() -> None:
    config = BoneAgeConfig(backbone="tiny", image_size=64, sex_input="embedding", sex_embedding_size=5, head_size=7)
    rows = {row.name: row for row in layer_table(on_meta(config))}
    assert rows["embedding"] == LayerRow("embedding", "5", 10, 10, ("input_sex",))
    assert rows["concatenate"] == LayerRow("concatenate", "37", 0, 0, ("dropout", "embedding"))
    assert rows["dense"] == LayerRow("dense", "7", (32 + 5 + 1) * 7, (32 + 5 + 1) * 7, ("concatenate",))


def test_a_backbone_that_trains_keeps_its_statistics_out_of_the_trainable_values() -> None:
    (row,) = [r for r in layer_table(on_meta(CONFIGS[1])) if r.name == "tiny"]
    assert row.trainable == 2_648
    assert row.values > row.trainable


def test_the_command_prints_the_table_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = BoneAgeConfig(backbone="tiny", image_size=64)
    processor = BoneAgeImageProcessor(size={"height": 64, "width": 64})
    save_checkpoint(BoneAgeModel(config), processor, tmp_path / "model")
    assert main(["summary", str(tmp_path / "model")]) == 0
    printed = capsys.readouterr().out
    rows = layer_table(on_meta(config))
    assert [line.split()[0] for line in printed.splitlines()[2:-4]] == [row.name for row in rows]
    assert f"{sum(row.trainable for row in rows):,}" in printed


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        print_summary(str(tmp_path))


def test_average_pooling_has_one_row_in_place_of_the_attention() -> None:
    rows = layer_table(BoneAgeModel(BoneAgeConfig(backbone="tiny", image_size=64, pooling="average")))
    assert [row.name for row in rows][2:5] == ["batch_normalization", "global_average_pooling2d", "dropout"]
    assert rows[4].source == ("global_average_pooling2d",)
