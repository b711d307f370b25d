"""The attention map over the radiograph, as arrays, pictures and files: weights of the pooling, not reasons.

The raw values are tiny (2.2e-5 to 0.04 over the six sample images of the reference project), so every map is drawn by
its own minimum and maximum. Colours of two maps cannot be compared; their raw ranges can, and are given beside them.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from .errors import InputError
from .quality import put_right
from .radiograph import read
from .sex import Sex

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Left, top, right, bottom as shares of the map's width and height.
Part = tuple[float, float, float, float]

WHOLE: Part = (0.0, 0.0, 1.0, 1.0)

#: Perceptually uniform and readable with red-green blindness (van der Walt and Smith, matplotlib 1.5).
COLOURS = "inferno"

#: Radiographs of a grid's row, each with its map beside it; the reference project shows six.
_PAIRS_PER_ROW = 3

_PANEL_INCHES = 2.2

#: Largest side in px of a picture in the grid, where an original would only make the drawing slow.
_GRID_SIDE = 640


@dataclass(frozen=True)
class ExplainedRadiograph:
    """One radiograph of `attention_grid`.

    Args:
        image: mode "L".
        attention: (h, w), raw values.
        predicted_months: predicted bone age.
        reference_months: bone age by readers, if it is known.
        part: of the map that shows the radiograph, from `part_of_map`.
    """

    image: Image.Image
    attention: np.ndarray
    predicted_months: float
    reference_months: float | None = None
    part: Part = WHOLE


def normalise_attention(attention: np.ndarray) -> np.ndarray:
    """Scale a map by its own minimum and maximum.

    Args:
        attention: (h, w), finite numbers of any range.

    Returns:
        (h, w) float32 in [0, 1], 0 at the minimum and 1 at the maximum; all zeros if the map is constant.

    Raises:
        InputError: the map is empty, has another number of dimensions, or holds NaN or infinity.
    """
    values = np.asarray(attention, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise InputError(f"An attention map must have the shape (h, w), not {values.shape}; pass that of one image.")
    if not np.isfinite(values).all():
        raise InputError("The attention map holds NaN or infinity: the checkpoint is damaged; load another.")
    low, high = values.min(), values.max()
    if low == high:
        return np.zeros(values.shape, dtype=np.float32)
    return ((values - low) / (high - low)).astype(np.float32)


def upsample_attention(attention: np.ndarray, height: int, width: int, *, part: Part = WHOLE) -> np.ndarray:
    """A map at the size of a picture, bilinear between the centres of its cells (`align_corners=False`).

    Args:
        attention: (h, w).
        height, width: of the picture in px.
        part: of the map that the picture shows, from `part_of_map`.

    Returns:
        (height, width) float32, in the range of the map.
    """
    rows, columns = attention.shape
    left, top, right, bottom = part
    resized = Image.fromarray(np.asarray(attention, dtype=np.float32)).resize(
        (width, height),
        Image.Resampling.BILINEAR,
        box=(left * columns, top * rows, right * columns, bottom * rows),
    )
    return np.array(resized)


def part_of_map(image_size: tuple[int, int], *, size: dict[str, int], resize_mode: str) -> Part:
    """The part of the model's input, and so of its attention map, that the radiograph fills.

    Args:
        image_size: width and height of the radiograph in px, as `PIL.Image.Image.size`.
        size: `BoneAgeImageProcessor.size`.
        resize_mode: `BoneAgeImageProcessor.resize_mode`: "squash" fills all of it, "pad" leaves bars at two sides.

    Returns:
        Left, top, right, bottom as shares of the map. Inverted polarity changes nothing here.
    """
    if resize_mode == "squash":
        return WHOLE
    width, height = image_size
    scale = min(size["height"] / height, size["width"] / width)
    inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (size["width"] - inner_width) // 2, (size["height"] - inner_height) // 2
    return (
        left / size["width"],
        top / size["height"],
        (left + inner_width) / size["width"],
        (top + inner_height) / size["height"],
    )


def colour_attention(attention: np.ndarray, height: int, width: int, *, part: Part = WHOLE) -> Image.Image:
    """A map by itself, normalised, upsampled and coloured: mode "RGB", `height` x `width` px; arguments as above."""
    from matplotlib import colormaps

    drawn = upsample_attention(normalise_attention(attention), height, width, part=part)  # (height, width)
    return Image.fromarray(colormaps[COLOURS](drawn, bytes=True)[..., :3].copy())


def overlay(image: Image.Image, attention: np.ndarray, *, opacity: float = 0.45, part: Part = WHOLE) -> Image.Image:
    """The attention map over the radiograph: dark where a position has little weight, yellow where most.

    Args:
        image: the radiograph, mode "L", any size.
        attention: (h, w), raw or normalised; drawn by its own minimum and maximum.
        opacity: of the map, 0 (radiograph only) to 1 (map only).
        part: of the map that shows the radiograph, from `part_of_map`.

    Returns:
        Mode "RGB", the size of `image`.

    Raises:
        InputError: a map that `normalise_attention` refuses, an image of another mode, or an opacity out of range.
    """
    if image.mode != "L":
        raise InputError(f'The radiograph must be 8-bit grey (mode "L"), not "{image.mode}"; read it with read().')
    if not 0 <= opacity <= 1:
        raise InputError(f"opacity must lie in [0, 1], not {opacity!r}.")
    colours = colour_attention(attention, image.height, image.width, part=part)
    return Image.blend(image.convert("RGB"), colours, opacity)


def attention_grid(items: Sequence[ExplainedRadiograph]) -> "Figure":
    """The reference project's figure: each radiograph and its attention map side by side, with the ages in months.

    Args:
        items: at least one.

    Raises:
        InputError: there is none, or a map that `normalise_attention` refuses.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    if not items:
        raise InputError("There is no radiograph to draw; give at least one.")
    pairs = min(len(items), _PAIRS_PER_ROW)
    rows = -(-len(items) // pairs)
    tallest = max(item.image.height / item.image.width for item in items)
    figure = Figure(
        figsize=(2 * _PANEL_INCHES * pairs + 0.8, rows * (_PANEL_INCHES * tallest + 0.5)), layout="constrained"
    )
    axes = figure.subplots(rows, 2 * pairs, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
        axis.set_anchor("N")
    for position, item in enumerate(items):
        left = axes[position // pairs, 2 * (position % pairs)]
        right = axes[position // pairs, 2 * (position % pairs) + 1]
        shown = item.image.copy()
        shown.thumbnail((_GRID_SIDE, _GRID_SIDE), Image.Resampling.LANCZOS)
        left.imshow(np.asarray(shown), cmap="gray", vmin=0, vmax=255)
        right.imshow(np.asarray(overlay(shown, item.attention, part=item.part)))
        title = f"{position + 1}: predicted {item.predicted_months:.1f} months"
        if item.reference_months is not None:
            title += f"\nreference {item.reference_months:.1f} months"
        left.set_title(title, fontsize=9)
        right.set_title(f"attention {item.attention.min():.1e} to {item.attention.max():.1e}", fontsize=9)
    bar = figure.colorbar(
        ScalarMappable(cmap=colormaps[COLOURS]), ax=axes, fraction=0.02, pad=0.01, ticks=[0, 1], panchor=False
    )
    bar.ax.set_yticklabels(["own\nminimum", "own\nmaximum"], fontsize=8)
    return figure


def explain_files(
    pipe: Any,
    files: Sequence[str | os.PathLike[str] | bytes | BinaryIO],
    *,
    sex: Sex | None,
    out: Path,
    grid: int | None = None,
) -> Iterator[tuple[Path, float, float]]:
    """Write attention maps over radiographs, one PNG per file or one figure of several.

    The pictures are the radiographs as read, at their own size and aspect ratio; their names hold positions, never
    file names, which may name a patient.

    Args:
        pipe: a [`BoneAgePipeline`].
        files: radiographs, as `radiograph.read` takes them.
        sex: of all the children; None only for a model that does not use sex.
        out: folder, made if it is not there. `attention-1.png`, `attention-2.png`, ... are replaced if they are.
        grid: write one `attention-grid.png` of the first `grid` files instead.

    Yields:
        For each radiograph the picture that shows it and the lowest and highest raw value of its map, as soon as the
        picture is written (with `grid` after the last).

    Raises:
        InputError: a file cannot be used (it is named by its position; pictures of earlier files stay), `grid` is not
            between 1 and the number of files, or `out` cannot be a folder.
    """
    if grid is not None and not 1 <= grid <= len(files):
        raise InputError(f"--grid takes a number from 1 to that of the files ({len(files)}), not {grid}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError("The folder for the pictures cannot be made: a file of that name is in the way.") from None
    if grid is not None:
        items = [_explained(pipe, file, position, sex) for position, file in enumerate(files[:grid], start=1)]
        path = out / "attention-grid.png"
        temporary = _temporary(path)
        try:
            attention_grid(items).savefig(temporary, format="png", dpi=150)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        for item in items:
            yield path, float(item.attention.min()), float(item.attention.max())
        return
    for position, file in enumerate(files, start=1):
        item = _explained(pipe, file, position, sex)
        path = out / f"attention-{position}.png"
        temporary = _temporary(path)
        try:
            overlay(item.image, item.attention, part=item.part).save(temporary, format="png")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        yield path, float(item.attention.min()), float(item.attention.max())


def _explained(pipe: Any, file: Any, position: int, sex: Sex | None) -> ExplainedRadiograph:
    try:
        radiograph = read(file)
        answer = pipe(radiograph, sex=sex)
    except InputError as error:
        raise InputError(f"file {position}: {error}") from None
    processor = pipe.image_processor
    # Turned as the attention is, in its own grey levels.
    picture = put_right(radiograph.image, replace(answer["quality"], inverted=False))
    return ExplainedRadiograph(
        image=picture,
        attention=answer["attention"],
        predicted_months=answer["bone_age_months"],
        part=part_of_map(picture.size, size=processor.size, resize_mode=processor.resize_mode),
    )


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
