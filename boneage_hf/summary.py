"""The layer table of a model as Keras prints it, so that a port can be checked against the reference line by line."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .configuration_boneage import BoneAgeConfig
from .modeling_boneage import BoneAgeModel


@dataclass(frozen=True)
class LayerRow:
    """One line of the table.

    Args:
        name: Keras' name of the layer in the reference's summary, where it has the layer.
        output: shape of the output without the batch, channels last as in Keras: `"12, 12, 512"`.
        values: numbers the layer stores, counted as Keras counts: BatchNorm's running mean and variance are among
            them, PyTorch's batch counter is not.
        trainable: how many of them an optimiser changes.
        source: names of the layers whose outputs it reads.
    """

    name: str
    output: str
    values: int
    trainable: int
    source: tuple[str, ...] = ()


def layer_table(model: BoneAgeModel) -> list[LayerRow]:
    """The layers of a model in the order of the data, counted from its weights.

    For `BoneAgeModel(BoneAgeConfig())` these are the reference's rows. A sex input adds `input_sex`, `embedding` and
    `concatenate`.
    """
    config = model.config
    size, grid, channels = config.image_size, model.grid, model.backbone.num_features
    backbone = config.backbone

    rows = [
        LayerRow("input_2", _shape(size, size, 3), 0, 0),
        _row(backbone, _shape(grid, grid, channels), model.backbone, "input_2"),
        _row("batch_normalization", _shape(grid, grid, channels), model.feature_norm, backbone),
    ]
    rows += _attention_rows(model) if config.pooling == "attention" else _average_rows(channels)
    rows.append(LayerRow("dropout", _shape(channels), 0, 0, (rows[-1].name,)))
    before = "dropout"
    embedding = model.head.sex_embedding
    if embedding is not None:
        rows += [
            LayerRow("input_sex", _shape(1), 0, 0),
            _row("embedding", _shape(embedding.embedding_dim), embedding, "input_sex"),
            LayerRow("concatenate", _shape(channels + embedding.embedding_dim), 0, 0, ("dropout", "embedding")),
        ]
        before = "concatenate"
    dense = model.head.dense.out_features
    return [
        *rows,
        _row("dense", _shape(dense), model.head.dense, before),
        LayerRow("dropout_1", _shape(dense), 0, 0, ("dense",)),
        _row("dense_1", _shape(model.head.output.out_features), model.head.output, "dropout_1"),
    ]


def format_table(rows: list[LayerRow]) -> str:
    """The rows as aligned text, with totals below them."""
    cells = [("layer", "output", "values", "trainable", "from")]
    cells += [(row.name, row.output, f"{row.values:,}", f"{row.trainable:,}", ", ".join(row.source)) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    name, output, values, trains = widths
    lines = [
        f"{line[0]:<{name}}  {line[1]:<{output}}  {line[2]:>{values}}  {line[3]:>{trains}}  {line[4]}".rstrip()
        for line in cells
    ]
    rule = "-" * max(len(line) for line in lines)
    total, trainable = sum(row.values for row in rows), sum(row.trainable for row in rows)
    totals = [
        f"total          {total:>12,}",
        f"trainable      {trainable:>12,}",
        f"not trainable  {total - trainable:>12,}",
    ]
    return "\n".join([lines[0], rule, *lines[1:], rule, *totals])


def print_summary(checkpoint: str | None) -> str:
    """The table of a checkpoint as text; of the reference network if `checkpoint` is None.

    Args:
        checkpoint: `"default"`, a checkpoint folder or a Hub id.

    Raises:
        InputError: there is no such checkpoint, or it is not one of this package's models.
    """
    if checkpoint is None:
        return format_table(layer_table(reference_model()))
    from .hub import load_pipeline

    model = load_pipeline(checkpoint).model
    assert isinstance(model, BoneAgeModel)
    return format_table(layer_table(model))


def reference_model() -> BoneAgeModel:
    """The reference network without memory for its weights, which counting does not need."""
    with torch.device("meta"):
        return BoneAgeModel(BoneAgeConfig())


def _stored(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    # BatchNorm's counter of batches is an integer, and Keras has none.
    yield from (buffer for buffer in module.buffers() if buffer.is_floating_point())


def _attention_rows(model: BoneAgeModel) -> list[LayerRow]:
    grid, channels = model.grid, model.backbone.num_features
    convolutions = [_numbered("conv2d", position) for position in range(len(model.attention.reduce))]
    expansion = _numbered("conv2d", len(convolutions))
    rows: list[LayerRow] = []
    before = "batch_normalization"
    for name, module in zip(convolutions, model.attention.reduce, strict=True):
        assert isinstance(module, nn.Conv2d)
        rows.append(_row(name, _shape(grid, grid, module.out_channels), module, before))
        before = name
    return [
        *rows,
        _row("locally_connected2d", _shape(grid, grid, 1), model.attention.local, before),
        _row(expansion, _shape(grid, grid, channels), model.attention.expand, "locally_connected2d"),
        LayerRow("multiply", _shape(grid, grid, channels), 0, 0, (expansion, "batch_normalization")),
        LayerRow("global_average_pooling2d", _shape(channels), 0, 0, ("multiply",)),
        LayerRow("global_average_pooling2d_1", _shape(channels), 0, 0, (expansion,)),
        LayerRow("RescaleGAP", _shape(channels), 0, 0, ("global_average_pooling2d", "global_average_pooling2d_1")),
    ]


def _average_rows(channels: int) -> list[LayerRow]:
    return [LayerRow("global_average_pooling2d", _shape(channels), 0, 0, ("batch_normalization",))]


def _row(name: str, output: str, module: nn.Module, source: str) -> LayerRow:
    values = [(math.prod(tensor.shape), tensor.requires_grad) for tensor in _stored(module)]
    trainable = sum(count for count, trains in values if trains)
    return LayerRow(name, output, sum(count for count, _ in values), trainable, (source,))


def _shape(*sides: int) -> str:
    return ", ".join(str(side) for side in sides)


def _numbered(name: str, position: int) -> str:
    return f"{name}_{position}" if position else name
