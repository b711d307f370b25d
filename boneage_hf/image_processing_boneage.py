"""From a grey hand radiograph to the tensor the model reads: size, polarity, contrast, standardisation.

`BoneAgeImageProcessor.prepare` does everything that touches pixels and gives 8-bit grey, so that training can store
its result, augment it and hand it to `BoneAgeImageProcessor.to_pixel_values`; `BoneAgeImageProcessor.preprocess` is
those two in a row. Serving and training thus share one path.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .errors import InputError

ResizeMode = Literal["squash", "pad"]

#: Channel means and standard deviations of ImageNet in [0, 1] units, on which the backbones were pretrained
#: (torchvision.models documentation, "mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225]").
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Sides in pixels that `size` and `source_size` may have.
MIN_SIDE, MAX_SIDE = 16, 4096

# What a saved preprocessor_config.json holds beside the settings; transformers writes and passes them on.
_BOOKKEEPING = frozenset({"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"})

_CURE = "read it with boneage_hf.radiograph.read, which windows it to 8-bit grey"

# --- polarity ---------------------------------------------------------------------------------------------------

# The rule looks at a thumbnail of this many pixels a side. All lengths below are in its pixels, in which a finger of
# a hand that fills the picture is about 8 wide and a phalanx about 4.
_POLARITY_SIDE = 100
_POLARITY_SOURCE_SIDE = 299
_POLARITY_MARGIN = 12  # collimation edges and burnt-in text sit here
_RIDGE_WIDTH = 5
_HAND_SIGMAS = (2.0, 4.0)
_CENTRE_SIGMA = 17.5
_HAND_WEIGHT = 2.0  # brings the root mean square of both votes over the RSNA training set to about the same


def _gaussian_matrix(sigma: float) -> np.ndarray:
    """Matrix (side, side) that blurs the columns of a thumbnail; rows sum to one, so borders do not darken."""
    position = np.arange(_POLARITY_SIDE)
    weights = np.exp(-((position[:, None] - position[None, :]) ** 2) / (2 * sigma**2))
    return weights / weights.sum(axis=1, keepdims=True)


_INSIDE = slice(_POLARITY_MARGIN, _POLARITY_SIDE - _POLARITY_MARGIN)
_OFFSET = np.arange(_POLARITY_SIDE)[_INSIDE] - (_POLARITY_SIDE - 1) / 2
_CENTRE = np.exp(-(_OFFSET[:, None] ** 2 + _OFFSET[None, :] ** 2) / (2 * _CENTRE_SIGMA**2))
_CENTRE /= _CENTRE.sum()
_NARROW, _WIDE = (_gaussian_matrix(sigma)[_INSIDE] for sigma in _HAND_SIGMAS)


def _blurred(values: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """``matrix @ values @ matrix.T`` without BLAS, whose threads cost tens of ms waiting where cores are busy."""
    rows = np.einsum("ij,kj->ik", values, matrix)  # (side, inside)
    return np.einsum("ij,jk->ik", matrix, rows)  # (inside, inside)


def _slide(values: np.ndarray, extreme: np.ufunc) -> np.ndarray:
    """`extreme` (np.minimum or np.maximum) over squares of `_RIDGE_WIDTH` px; same shape (H, W)."""
    padded = np.pad(values, _RIDGE_WIDTH // 2, mode="edge")
    height, width = values.shape
    rows = extreme.reduce([padded[step : step + height] for step in range(_RIDGE_WIDTH)])
    return extreme.reduce([rows[:, step : step + width] for step in range(_RIDGE_WIDTH)])


def polarity_score(grey: np.ndarray) -> float:
    """How strongly a picture shows bright bones on a darker ground; negative if bones are dark on a lighter ground.

    Mean of two votes, both taken on a 100 x 100 px thumbnail and weighted towards its centre:

    * ridges: bright structures narrower than 5 px (white top-hat) against dark ones (black top-hat), as a fraction of
      both. Bone shafts and their cortex are thin and denser than soft tissue.
    * hand: band-pass (difference of Gaussians, sigma 2 and 4 px) of the rank-equalised thumbnail, clipped at its mean
      magnitude. Fingers and hand are denser than the air around them; ranks keep a collimation frame or a lead marker
      from outweighing a hand of few grey levels.

    Both are odd: ``polarity_score(255 - grey) == -polarity_score(grey)`` for pictures of at most 299 x 299 px. Larger
    ones are first reduced to 299 px, where rounding to whole grey levels leaves that true to about 0.0002.

    Args:
        grey: uint8, shape (H, W), any aspect ratio.

    Raises:
        InputError: if ``grey`` is not a non-empty uint8 array of two dimensions.
    """
    return _polarity_score(_to_grey_image(_checked_plane(grey)))


def _polarity_score(image: Image.Image) -> float:
    """`polarity_score` of an image of mode "L"."""
    scale = _POLARITY_SOURCE_SIDE / max(image.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    # Centred on zero and in floating point, inversion is a change of sign, and every step below keeps it exactly.
    centred = Image.fromarray(2.0 * np.asarray(image, dtype=np.float32) - 255.0)
    side = _POLARITY_SIDE
    thumbnail = np.asarray(centred.resize((side, side), Image.Resampling.BILINEAR), dtype=np.float64)

    bright = (thumbnail - _slide(_slide(thumbnail, np.minimum), np.maximum))[_INSIDE, _INSIDE]
    dark = (_slide(_slide(thumbnail, np.maximum), np.minimum) - thumbnail)[_INSIDE, _INSIDE]
    both = float(((bright + dark) * _CENTRE).sum())
    ridges = float(((bright - dark) * _CENTRE).sum()) / both if both > 0 else 0.0

    level = np.rint(thumbnail).astype(np.int64) + 255
    counts = np.bincount(level.ravel(), minlength=511)
    ranks = (np.cumsum(counts) - counts / 2 - level.size / 2)[level] / level.size
    band = _blurred(ranks, _NARROW) - _blurred(ranks, _WIDE)
    magnitude = float(np.abs(band).mean())
    hand = float((np.clip(band / magnitude, -1, 1) * _CENTRE).sum()) if magnitude > 1e-9 else 0.0

    return (ridges + _HAND_WEIGHT * hand) / 2


def has_light_background(grey: np.ndarray) -> bool:
    """Whether bones are dark on a lighter ground, so that the picture must be inverted: `polarity_score` below zero.

    A grey or even light ground with still brighter bones is not meant, nor a white collimation frame. Of the 12,611
    training images of the RSNA challenge, none of which was seen to have dark bones, 3 are called light: two hands in
    a small dark window of a broad white field, and a fist that hardly differs from the air around it.

    Args:
        grey: uint8, shape (H, W).

    Raises:
        InputError: if ``grey`` is not a non-empty uint8 array of two dimensions.
    """
    return polarity_score(grey) < 0


# --- contrast ---------------------------------------------------------------------------------------------------


def stretch_contrast(grey: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map the ``low``-th percentile of the grey levels to 0 and the ``high``-th to 255, clipping beyond them.

    Percentiles are those of ``np.percentile`` (linear interpolation). Where both are equal (a constant picture) the
    picture is returned as it is.

    Args:
        grey: uint8, shape (H, W).
        low: percentile in [0, 100).
        high: percentile in (low, 100].

    Returns:
        uint8, shape (H, W).

    Raises:
        InputError: if ``grey`` is not a non-empty uint8 array of two dimensions or the percentiles are out of order.
    """
    low, high = _checked_percentiles((low, high))
    return np.asarray(_stretched(_to_grey_image(_checked_plane(grey)), low, high))


def _stretched(image: Image.Image, low: float, high: float) -> Image.Image:
    """`stretch_contrast` on an image of mode "L"."""
    cumulative = np.cumsum(image.histogram())
    bottom, top = (_percentile(cumulative, percent) for percent in (low, high))
    if top <= bottom:
        return image
    table = np.floor((np.arange(256) - bottom) * (255 / (top - bottom)) + 0.5)
    return image.point(np.clip(table, 0, 255).astype(int).tolist())


def _percentile(cumulative: np.ndarray, percent: float) -> float:
    """The percentile of the grey levels whose cumulative histogram (256,) is given, as ``np.percentile`` has it."""
    position = percent / 100 * (int(cumulative[-1]) - 1)
    below = math.floor(position)
    first, second = np.searchsorted(cumulative, [below, min(below + 1, int(cumulative[-1]) - 1)], side="right")
    return float(first + (second - first) * (position - below))


# --- input checks -----------------------------------------------------------------------------------------------


def _checked_plane(grey: object) -> np.ndarray:
    if not (isinstance(grey, np.ndarray) and grey.dtype == np.uint8 and grey.ndim == 2 and grey.size > 0):
        raise InputError(f"The grey picture must be a uint8 array of shape (H, W), not {_describe(grey)}; {_CURE}.")
    return grey


def _describe(value: object) -> str:
    """What a value is, in words that hold nothing of its content."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} and shape {value.shape}"
    if isinstance(value, Image.Image):
        return f'a PIL image of mode "{value.mode}"'
    return f"a {type(value).__name__}"


def _to_grey_image(image: Image.Image | np.ndarray) -> Image.Image:
    """A PIL image of mode "L" with the same pixels; colour becomes luma (ITU-R 601-2) as PIL computes it."""
    if isinstance(image, np.ndarray):
        planes = image.shape[2] if image.ndim == 3 else 1
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or planes not in (1, 3):
            raise InputError(
                "An image array must be uint8 of shape (H, W), (H, W, 1) or (H, W, 3), "
                f"not {_describe(image)}; {_CURE}."
            )
        if image.size == 0:
            raise InputError(f"The image has no pixels (shape {image.shape}); give one with at least one row.")
        image = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.ndim == 3 and planes == 1 else image))
    if not isinstance(image, Image.Image):
        raise InputError(f"An image must be a PIL image or a uint8 array, not {_describe(image)}; {_CURE}.")
    if 0 in image.size:
        raise InputError("The image has no pixels; give one with at least one row and one column.")
    if image.mode == "P" or (image.mode in ("L", "RGB") and "transparency" in image.info):
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A").getextrema()
        if alpha != (255, 255):
            raise InputError("The image has transparent pixels, whose grey is undefined; flatten it onto black first.")
        image = image.convert("RGB") if image.mode == "RGBA" else image
    if image.mode not in ("1", "L", "LA", "RGB"):
        raise InputError(f"The image must be 8-bit grey or RGB, not {_describe(image)}; {_CURE}.")
    return image if image.mode == "L" else image.convert("L")


def _checked_side(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_SIDE <= value <= MAX_SIDE:
        raise InputError(f"{name} must be a whole number of pixels from {MIN_SIDE} to {MAX_SIDE}, not {value!r}.")
    return value


def _checked_quality(value: object, source_size: int | None) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100:
        raise InputError(f"source_jpeg_quality must be a whole number from 1 to 100, or None, not {value!r}.")
    if source_size is None:
        raise InputError("source_jpeg_quality belongs to the image of source_size; set that too.")
    return value


def _checked_size(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping) or set(value) != {"height", "width"}:
        raise InputError(f'size must be a dict such as {{"height": 384, "width": 384}}, not {value!r}.')
    return {side: _checked_side(value[side], f'size["{side}"]') for side in ("height", "width")}


def _checked_numbers(value: object, count: int, name: str) -> tuple[float, ...]:
    numbers = tuple(value) if isinstance(value, list | tuple | np.ndarray) else ()
    if len(numbers) != count or not all(
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        for number in numbers
    ):
        raise InputError(f"{name} must be a list of {count} finite numbers, not {value!r}.")
    return tuple(float(number) for number in numbers)


def _checked_percentiles(value: object) -> tuple[float, float]:
    low, high = _checked_numbers(value, 2, "stretch_percentiles")
    if not 0 <= low < high <= 100:
        raise InputError(f"stretch_percentiles must be [low, high] with 0 <= low < high <= 100, not {value!r}.")
    return low, high


def _checked_mean(value: object) -> list[float]:
    mean = _checked_numbers(value, 3, "image_mean")
    if not all(0 <= number <= 1 for number in mean):
        raise InputError(f"image_mean must lie within [0, 1] (grey level / 255), not {value!r}.")
    return list(mean)


def _checked_std(value: object) -> list[float]:
    std = _checked_numbers(value, 3, "image_std")
    if not all(0 < number <= 1 for number in std):
        raise InputError(f"image_std must lie above 0 and at most at 1 (grey levels / 255), not {value!r}.")
    return list(std)


# --- the processor ----------------------------------------------------------------------------------------------


class BoneAgeImageProcessorKwargs(TypedDict, total=False):
    """Settings that ``from_pretrained`` may override; each is checked like an argument of the constructor."""

    size: dict[str, int]
    source_size: int | None
    source_jpeg_quality: int | None
    resize_mode: ResizeMode
    correct_polarity: bool
    stretch_percentiles: Sequence[float] | None
    image_mean: Sequence[float]
    image_std: Sequence[float]


class BoneAgeImageProcessor(BaseImageProcessor):
    """Turns hand radiographs into ``pixel_values``.

    Needs neither torchvision nor a backend of transformers: radiographs stay one grey plane until the last step, and
    everything before it is integer arithmetic on 8 bits, the same on every machine.

    Args:
        size: height and width in pixels of what the model reads, 16 to 4096 each.
        source_size: if given, every image is first resized to ``source_size`` x ``source_size`` whatever its aspect
            ratio. A checkpoint trained on the 299 px copies of the RSNA images needs 299 to see originals as it saw
            its training data: PIL bilinear (antialiased) at JPEG quality 92 gives those copies bit by bit, measured
            on 19 pairs.
        source_jpeg_quality: 1 to 100, only with ``source_size``: an image that had to be resized to it is also stored
            as JPEG of that quality and read again, as the 299 px copies were (92). Networks read the traces of JPEG:
            without this step a checkpoint trained on the copies answered up to 6 months apart for an original and
            its copy (median of 19 pairs 1.6), with it not at all. Images that have the size already are left alone.
        resize_mode: "squash" ignores the aspect ratio; "pad" keeps it and centres the image on black. "pad" needs
            ``source_size=None``, which would have squashed already.
        correct_polarity: invert images for which `has_light_background` holds.
        stretch_percentiles: ``[low, high]`` of `stretch_contrast`, or None to leave contrast alone.
        image_mean: mean of the three channels in [0, 1] units.
        image_std: standard deviation of the three channels in [0, 1] units.

    Raises:
        InputError: for an unknown argument or a value out of range.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - annotated by the base class as an instance attribute
    # Not a subtype of transformers' ImagesKwargs: `do_resize`, `crop_size` and the like mean nothing here.
    valid_kwargs = BoneAgeImageProcessorKwargs  # type: ignore[assignment]

    def __init__(
        self,
        *,
        size: Mapping[str, int] | None = None,
        source_size: int | None = None,
        source_jpeg_quality: int | None = None,
        resize_mode: ResizeMode = "squash",
        correct_polarity: bool = True,
        stretch_percentiles: Sequence[float] | None = (1.0, 99.0),
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        **bookkeeping: Any,
    ) -> None:
        unknown = sorted(set(bookkeeping) - _BOOKKEEPING)
        if unknown:
            known = ", ".join(BoneAgeImageProcessorKwargs.__annotations__)
            raise InputError(f"Unknown argument of BoneAgeImageProcessor: {', '.join(unknown)}; it takes {known}.")
        super().__init__()
        self.size = _checked_size({"height": 384, "width": 384} if size is None else size)
        self.source_size = None if source_size is None else _checked_side(source_size, "source_size")
        self.source_jpeg_quality = _checked_quality(source_jpeg_quality, self.source_size)
        if resize_mode not in get_args(ResizeMode):
            raise InputError(f'resize_mode must be "squash" or "pad", not {resize_mode!r}.')
        if resize_mode == "pad" and source_size is not None:
            raise InputError(
                'resize_mode "pad" keeps the aspect ratio, which source_size squashes; set source_size to None.'
            )
        self.resize_mode = resize_mode
        if not isinstance(correct_polarity, bool):
            raise InputError(f"correct_polarity must be True or False, not {correct_polarity!r}.")
        self.correct_polarity = correct_polarity
        self.stretch_percentiles = (
            None if stretch_percentiles is None else list(_checked_percentiles(stretch_percentiles))
        )
        self.image_mean = _checked_mean(image_mean)
        self.image_std = _checked_std(image_std)

    def to_dict(self) -> dict[str, Any]:
        """The settings as preprocessor_config.json holds them; settings that are None are written out."""
        settings = super().to_dict()
        return settings | {name: getattr(self, name) for name in BoneAgeImageProcessorKwargs.__annotations__}

    def prepare(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Everything that touches pixels, before standardisation: grey, source size, polarity, contrast, size.

        Args:
            image: PIL image (8-bit grey or RGB, opaque) or uint8 array of shape (H, W), (H, W, 1) or (H, W, 3). It is
                taken as it lies: ``boneage_hf.radiograph.read`` applies the EXIF orientation, this does not.

        Returns:
            uint8, shape (size["height"], size["width"]), bones bright.

        Raises:
            InputError: for anything else, such as 16-bit or floating point pixels.
        """
        return self.prepare_and_tell(image)[0]

    def prepare_and_tell(self, image: Image.Image | np.ndarray) -> tuple[np.ndarray, bool]:
        """What `prepare` gives, and whether the grey levels were inverted for it."""
        grey = _to_grey_image(image)  # (h, w)
        if self.source_size is not None:
            reduced = _resized(grey, self.source_size, self.source_size)
            if self.source_jpeg_quality is not None and reduced is not grey:
                reduced = _stored_as_jpeg(reduced, self.source_jpeg_quality)
            grey = reduced
        inverted = self.correct_polarity and _polarity_score(grey) < 0  # has_light_background
        if inverted:
            grey = grey.point(range(255, -1, -1))
        if self.stretch_percentiles is not None:
            grey = _stretched(grey, *self.stretch_percentiles)
        height, width = self.size["height"], self.size["width"]
        if self.resize_mode == "squash":
            return np.array(_resized(grey, height, width)), inverted  # (height, width)
        scale = min(height / grey.height, width / grey.width)
        inner = _resized(grey, max(1, round(grey.height * scale)), max(1, round(grey.width * scale)))
        padded = np.zeros((height, width), dtype=np.uint8)
        top, left = (height - inner.height) // 2, (width - inner.width) // 2
        padded[top : top + inner.height, left : left + inner.width] = np.asarray(inner)
        return padded, inverted  # (height, width)

    def to_pixel_values(self, prepared: torch.Tensor) -> torch.Tensor:
        """Standardise prepared images and repeat them on three channels.

        Args:
            prepared: uint8 or floating point, shape (B, H, W), grey levels 0..255 as `prepare` gives them (augmented
                ones may lie between whole numbers), on any device.

        Returns:
            float32, shape (B, 3, H, W), on the same device: ``(prepared / 255 - image_mean) / image_std``.

        Raises:
            InputError: if ``prepared`` has another type or number of dimensions.
        """
        if not isinstance(prepared, torch.Tensor) or prepared.ndim != 3:
            shape = tuple(prepared.shape) if isinstance(prepared, torch.Tensor) else type(prepared).__name__
            raise InputError(
                f"Prepared images must be a tensor of shape (B, H, W), not {shape}; stack what prepare gives."
            )
        if prepared.dtype != torch.uint8 and not prepared.is_floating_point():
            raise InputError(f"Prepared images must be uint8 or floating point, not {prepared.dtype}.")
        mean = torch.tensor(self.image_mean, device=prepared.device).view(1, 3, 1, 1)
        std = torch.tensor(self.image_std, device=prepared.device).view(1, 3, 1, 1)
        grey = prepared.to(torch.float32).unsqueeze(1)  # (B, 1, H, W)
        return grey * (1 / (255 * std)) - mean / std  # (B, 3, H, W)

    def __call__(self, images: Any, *, return_tensors: str | None = None) -> BatchFeature:  # type: ignore[override]
        """`preprocess` under the name that transformers' pipelines call."""
        return self.preprocess(images, return_tensors=return_tensors)

    def preprocess(self, images: Any, *, return_tensors: str | None = None) -> BatchFeature:
        """Prepare one image or a list of images of any sizes for the model.

        Args:
            images: one image as `prepare` takes it, or a non-empty list or tuple of them.
            return_tensors: "pt" for a tensor, "np" for an array, None for a list of arrays.

        Returns:
            ``{"pixel_values": float32 (B, 3, H, W)}``; B is 1 for a single image.

        Raises:
            InputError: for images that `prepare` refuses, an empty list or another kind of tensor.
        """
        if return_tensors not in (None, "pt", "np"):
            raise InputError(f'return_tensors must be "pt", "np" or None, not {return_tensors!r}.')
        batch = list(images) if isinstance(images, list | tuple) else [images]
        if not batch:
            raise InputError("There is no image in the list; give at least one.")
        prepared = torch.from_numpy(np.stack([self.prepare(image) for image in batch]))  # (B, H, W)
        pixel_values = self.to_pixel_values(prepared)  # (B, 3, H, W)
        if return_tensors == "pt":
            return BatchFeature({"pixel_values": pixel_values})
        array = pixel_values.numpy()
        return BatchFeature({"pixel_values": array if return_tensors == "np" else list(array)})


def _stored_as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The image of mode "L" as it comes back from a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as stored:
        return stored.copy()


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image at another size by PIL's bilinear filter, which is antialiased when it reduces."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)
