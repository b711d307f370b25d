"""Seeded training augmentation of batches of grey images, on any device.

Two steps on purpose: `sample` draws the parameters of a whole global batch from one generator, `apply` is a pure
function of images and parameters. So a batch that processes share out is augmented exactly as in one process,
and a resumed run repeats what an uninterrupted one would have seen.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch.nn import functional

#: Smallest share of the side to which an image is reduced. Ours: a hand of 299 px has then phalanges of 2 to 3 px.
COARSEST = 0.25


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes; every value 0 is "off", and all are symmetric about "unchanged".

    Args:
        flip: probability of a mirror image, 0 to 1. Hands are read from either side.
        shift: largest shift along each axis, as a share of the side.
        rotation_degrees: largest rotation.
        shear: largest shear, as the tangent of the angle.
        zoom: largest relative change of scale; 0.25 is 0.75 to 1.25.
        gamma: largest |log gamma|; 0.3 is an exponent of 0.74 to 1.35.
        contrast: largest relative change of contrast about mid-grey.
        brightness: largest change of brightness, as a share of the full grey scale.
        erase: probability of one erased rectangle of 2 to 10 % of the area, filled with the image's mean.
        coarsen: probability that the image is reduced to a share of COARSEST to 1 of its side and enlarged again.
    """

    flip: float = 0.0
    shift: float = 0.0
    rotation_degrees: float = 0.0
    shear: float = 0.0
    zoom: float = 0.0
    gamma: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    erase: float = 0.0
    coarsen: float = 0.0


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(),
    # The augmentation table of the reference project: flip, shifts of 15 %, rotation of 5 degrees, shear of 1 %, zoom
    # of 25 %, fill mode "nearest" (the border is replicated, see `apply`).
    "reference": Augmentation(flip=0.5, shift=0.15, rotation_degrees=5.0, shear=0.01, zoom=0.25),
    # Radiographs of hands come rotated and in every exposure. Our own choice, not tuned and not from a paper.
    "strong": Augmentation(
        flip=0.5,
        shift=0.1,
        rotation_degrees=20.0,
        shear=0.05,
        zoom=0.15,
        gamma=0.3,
        contrast=0.15,
        brightness=0.08,
        erase=0.2,
    ),
    # As "strong", with the exposures and the coarse pictures on which a network trained with "strong" errs most in the
    # stress test (`boneage-benchmark stress`). The ranges are ours.
    "wide": Augmentation(
        flip=0.5,
        shift=0.1,
        rotation_degrees=25.0,
        shear=0.05,
        zoom=0.2,
        gamma=0.5,
        contrast=0.35,
        brightness=0.2,
        erase=0.2,
        coarsen=0.25,
    ),
}


@dataclass(frozen=True)
class Parameters:
    """What happens to each image of a batch: float32 tensors of shape (B,), `box` of shape (B, 4); `coarseness` is the
    share of the side to which it is reduced."""

    mirrored: torch.Tensor
    shift_x: torch.Tensor
    shift_y: torch.Tensor
    angle: torch.Tensor
    shear: torch.Tensor
    zoom: torch.Tensor
    gamma: torch.Tensor
    contrast: torch.Tensor
    brightness: torch.Tensor
    erased: torch.Tensor
    box: torch.Tensor
    coarseness: torch.Tensor

    def __getitem__(self, part: slice) -> "Parameters":
        """The parameters of some images of the batch."""
        return Parameters(**{field.name: getattr(self, field.name)[part] for field in fields(self)})


def sample(augmentation: Augmentation, batch_size: int, generator: torch.Generator) -> Parameters:
    """Draw the parameters of a batch; the same number of draws whatever the ranges are."""

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(batch_size, generator=generator) * 2 - 1) * limit

    def chance(probability: float) -> torch.Tensor:
        return (torch.rand(batch_size, generator=generator) < probability).float()

    return Parameters(
        mirrored=chance(augmentation.flip),
        shift_x=uniform(augmentation.shift),
        shift_y=uniform(augmentation.shift),
        angle=uniform(math.radians(augmentation.rotation_degrees)),
        shear=uniform(augmentation.shear),
        zoom=1 + uniform(augmentation.zoom),
        gamma=uniform(augmentation.gamma).exp(),
        contrast=1 + uniform(augmentation.contrast),
        brightness=uniform(augmentation.brightness),
        erased=chance(augmentation.erase),
        box=torch.rand(batch_size, 4, generator=generator),
        # Last, so that what came before it is drawn as it was before there was a coarseness.
        coarseness=torch.where(
            torch.rand(batch_size, generator=generator) < augmentation.coarsen,
            COARSEST + (1 - COARSEST) * torch.rand(batch_size, generator=generator),
            1.0,
        ),
    )


def affine_matrices(parameters: Parameters) -> torch.Tensor:
    """(B, 2, 3) maps from output to input coordinates, each axis from -1 to 1 (as `affine_grid` wants them)."""
    cos, sin = parameters.angle.cos(), parameters.angle.sin()
    # A larger picture samples a smaller part of the input, hence the division.
    sign = 1 - 2 * parameters.mirrored
    rows = [
        torch.stack([sign * cos / parameters.zoom, sign * (parameters.shear * cos - sin) / parameters.zoom], dim=1),
        torch.stack([sin / parameters.zoom, (parameters.shear * sin + cos) / parameters.zoom], dim=1),
    ]
    shift = torch.stack([2 * parameters.shift_x, 2 * parameters.shift_y], dim=1)  # a share of the side is twice that
    return torch.cat([torch.stack(rows, dim=1), shift.unsqueeze(2)], dim=2)


def apply(images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    """Augment a batch.

    Args:
        images: (B, H, W), uint8 or float, values 0 to 255.
        parameters: of the same batch.

    Returns:
        (B, H, W) float32, values 0 to 255, on the device of `images`. What lies outside repeats the border.
    """
    matrices = affine_matrices(parameters).to(images.device)
    grid = functional.affine_grid(matrices, [len(images), 1, *images.shape[1:]], align_corners=False)
    moved = functional.grid_sample(
        images.unsqueeze(1).float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    ).squeeze(1)
    return _change_intensities(_erase(_coarsen(moved, parameters), parameters), parameters)


def _change_intensities(images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    def per_image(values: torch.Tensor) -> torch.Tensor:
        return values.to(images.device).view(-1, 1, 1)

    if bool((parameters.gamma != 1).any()):
        images = (images / 255).clamp(0, 1) ** per_image(parameters.gamma) * 255
    changed = (images - 127.5) * per_image(parameters.contrast) + 127.5 + 255 * per_image(parameters.brightness)
    return changed.clamp(0, 255)


def _erase(images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    height, width = images.shape[1:]
    for index in torch.nonzero(parameters.erased).flatten().tolist():
        area, aspect, top, left = parameters.box[index].tolist()
        share = math.sqrt(0.02 + 0.08 * area)
        ratio = math.exp((2 * aspect - 1) * math.log(2))
        box_height, box_width = max(1, int(height * share * ratio)), max(1, int(width * share / ratio))
        y, x = int(top * (height - box_height)), int(left * (width - box_width))
        images[index, y : y + box_height, x : x + box_width] = images[index].mean()
    return images


def _coarsen(images: torch.Tensor, parameters: Parameters) -> torch.Tensor:
    height, width = images.shape[1:]
    for index in torch.nonzero(parameters.coarseness < 1).flatten().tolist():
        share = float(parameters.coarseness[index])
        small = (max(1, round(height * share)), max(1, round(width * share)))
        reduced = functional.interpolate(images[index][None, None], small, mode="bilinear", antialias=True)
        images[index] = functional.interpolate(reduced, (height, width), mode="bilinear")[0, 0]
    return images
