"""Is this one hand radiograph that we may read? Checks before the answer: refuse, warn or pass, each with a sentence.

Two kinds of checks. Those of `inspect` look at the picture itself and need no network. Those of a `HandGate` look at
the feature maps that the network computes for its answer anyway: whether they are like those of hand radiographs, how
the hand lies, and whether it is cut off. A gate is fitted to a trained backbone by `boneage fit-gate` and is kept in
the checkpoint; without one these checks are named as not made. What can be put right (polarity, quarter turns, mirror)
is put right, and said.

What is not found: a foot that is as much like hands as hands are, a hand with jewellery or a cast, the wrong child.
What is found at times only, counted with the packaged checkpoint (benchmarks/results/default-gate/gate.csv): two hands
side by side (79 of 128 refused, the others warned of) and a mirrored or right hand (59 of 256 put right; the network
was trained on mirrored hands too).
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import nn

from .errors import InputError

Verdict = Literal["pass", "warn", "refuse"]

#: Shortest side in pixels below which an image is refused. A phalanx is then about 2 pixels wide.
MIN_SIDE = 64

#: A grey level counts as used if more than one pixel in this many has it: specks and JPEG ringing do not.
LEVEL_ONE_IN = 1000

#: Fewest used grey levels. The 9,458 training radiographs of the reference split (299 px) use 21 to 248; text, plots
#: and drawings a handful. Below the first number (3 bits) refused, below the second warned of.
MIN_LEVELS, FEW_LEVELS = 8, 21

#: Share of pixels with a colour of their own (see `radiograph.colour_share`) from which on it is a colour picture; a
#: tint of the whole film has none, and a burnt-in coloured note stays below.
MAX_COLOUR_SHARE = 0.05


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: ``"pixels"``, ``"size"``, ``"grey_levels"``, ``"colour"``, ``"polarity"``, ``"rotation"``, ``"mirror"``,
            ``"cut_off"``, ``"hand"`` or ``"drawn_phantom"``.
        verdict: ``"pass"``, ``"warn"`` or ``"refuse"``.
        sentence: what was found, for a reader; of a refusal also the cure.
    """

    name: str
    verdict: Verdict
    sentence: str


@dataclass(frozen=True)
class Quality:
    """What was found about one image.

    Attributes:
        checks: those that were made, in order.
        rotation_degrees: 0, 90, 180 or 270: by how much the picture was turned clockwise to put it right.
        mirrored: it was mirrored (left to right, after the turn) to put it right.
        inverted: its grey levels were inverted to put it right.
        drawn_phantom: it carries the mark of a drawn phantom.
    """

    checks: tuple[Check, ...]
    rotation_degrees: int = 0
    mirrored: bool = False
    inverted: bool = False
    drawn_phantom: bool = False

    @property
    def verdict(self) -> Verdict:
        """The gravest of the checks' verdicts."""
        found = {check.verdict for check in self.checks}
        return next((verdict for verdict in reversed(get_args(Verdict)) if verdict in found), "pass")

    @property
    def reasons(self) -> tuple[str, ...]:
        """Sentences of the checks that refuse, then of those that warn."""
        return tuple(c.sentence for verdict in ("refuse", "warn") for c in self.checks if c.verdict == verdict)

    @property
    def corrections(self) -> tuple[str, ...]:
        """What was put right, in words."""
        words = []
        if self.inverted:
            words.append("Bones were dark on a light ground: the grey levels were inverted.")
        if self.rotation_degrees:
            words.append(f"The picture was turned by {self.rotation_degrees} degrees clockwise.")
        if self.mirrored:
            words.append("The picture was mirrored left to right.")
        return tuple(words)

    def as_dict(self) -> dict[str, Any]:
        """What `json.dumps` can write: verdict, checks, reasons, corrections and the four facts."""
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "corrections": list(self.corrections),
            "rotation_degrees": self.rotation_degrees,
            "mirrored": self.mirrored,
            "inverted": self.inverted,
            "drawn_phantom": self.drawn_phantom,
            "checks": [asdict(check) for check in self.checks],
        }


class RefusedError(InputError):
    """The quality gate refuses the image; the message says why, and `quality` holds all checks."""

    def __init__(self, message: str, quality: Quality) -> None:
        super().__init__(message)
        self.quality = quality

    def __reduce__(self) -> tuple[type["RefusedError"], tuple[str, Quality]]:
        return RefusedError, (str(self), self.quality)


def inspect(
    image: Image.Image,
    *,
    image_size: int,
    colour_share: float = 0.0,
    inverted: bool = False,
    drawn_phantom: bool = False,
) -> Quality:
    """The checks that need no network.

    Args:
        image: mode ``"L"``, as it was read.
        image_size: side in pixels of what the network reads, or of the copies that it was trained on if that is less.
        colour_share: of the source, see `radiograph.colour_share`.
        inverted: the image processor inverts it, because its bones are dark on a light ground.
        drawn_phantom: the source carries the mark of a drawn phantom.
    """
    histogram = np.array(image.histogram())
    checks = [
        _check_pixels(histogram),
        _check_size(image, image_size),
        _check_levels(histogram),
        _check_colour(colour_share),
        Check("polarity", "pass", "Bones were dark on a light ground." if inverted else "Bones are bright on dark."),
    ]
    if drawn_phantom:
        checks.append(Check("drawn_phantom", "warn", "This is a drawn phantom, not a radiograph."))
    return Quality(tuple(checks), inverted=inverted, drawn_phantom=drawn_phantom)


def _check_pixels(histogram: np.ndarray) -> Check:
    if np.count_nonzero(histogram) == 1:
        return Check("pixels", "refuse", "All pixels have the same grey: export the radiograph again.")
    return Check("pixels", "pass", "The pixels differ from each other.")


def _check_size(image: Image.Image, image_size: int) -> Check:
    size = f"The picture has {image.width} x {image.height} pixels"
    if min(image.size) < MIN_SIDE:
        return Check("size", "refuse", f"{size}, too few to see a bone: give the original, not a thumbnail.")
    if min(image.size) < image_size:
        return Check(
            "size",
            "warn",
            f"{size}, fewer than the {image_size} that the network was trained on: details are missing.",
        )
    return Check("size", "pass", f"{size}.")


def _check_levels(histogram: np.ndarray) -> Check:
    levels = int(np.count_nonzero(histogram * LEVEL_ONE_IN > histogram.sum()))
    if levels < MIN_LEVELS:
        return Check(
            "grey_levels",
            "refuse",
            f"The picture uses only {levels} grey levels, as text and drawings do: give the radiograph itself.",
        )
    if levels < FEW_LEVELS:
        return Check("grey_levels", "warn", f"The picture is flat: it uses only {levels} grey levels.")
    return Check("grey_levels", "pass", f"The picture uses {levels} grey levels.")


def _check_colour(share: float) -> Check:
    if share > MAX_COLOUR_SHARE:
        return Check("colour", "refuse", "This is a colour picture, not a radiograph: give the radiograph itself.")
    if share > 0:
        return Check("colour", "warn", "Parts of the picture are coloured, such as notes on the radiograph.")
    return Check("colour", "pass", "The picture is grey.")


# --- what the network's features say -------------------------------------------------------------------------------

#: How a hand may lie: pose p needs `p % 4` quarter turns clockwise, then for p of 4 or more a mirroring, to be as
#: the radiographs of the RSNA challenge are: fingers up, thumb to the right.
POSES = 8

#: Fields of a gate in a config.
GATE_FIELDS = (
    *("components", "cells", "residual_variance", "refuse_above", "warn_above"),
    *("turn_above", "mirror_above", "cut_off_above"),
)


def check_gate(gate: dict[str, Any]) -> None:
    """Refuse what is no gate: `components` and `cells` (whole, 1 or more), and finite numbers, of which
    `residual_variance` and `refuse_above` lie above 0 and `warn_above` is at most `refuse_above`.

    Raises:
        InputError: naming the field.
    """
    if not isinstance(gate, dict) or set(gate) != set(GATE_FIELDS):
        raise InputError(f"gate needs exactly the fields {', '.join(GATE_FIELDS)}; make it with boneage fit-gate.")
    for name in ("components", "cells"):
        if isinstance(gate[name], bool) or not isinstance(gate[name], int) or gate[name] < 1:
            raise InputError(f"{name} of the gate must be a whole number of 1 or more, not {gate[name]!r}.")
    for name in GATE_FIELDS[2:]:
        value = gate[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{name} of the gate must be a finite number, not {value!r}.")
    if not (gate["residual_variance"] > 0 and 0 < gate["warn_above"] <= gate["refuse_above"]):
        raise InputError("A gate needs a residual_variance above 0 and 0 < warn_above <= refuse_above.")


@dataclass(frozen=True)
class GateReading:
    """What a gate reads from the features of one image.

    Attributes:
        distance: from the hands that the gate was fitted to, see `HandGate.distance`.
        pose: of the image as it was given, 0 to 7 (see POSES): what was put right before `distance` was taken.
        cut_off: score of `HandGate.cut_off`.
    """

    distance: float
    pose: int
    cut_off: float


class HandGate(nn.Module):
    """Hands as the backbone sees them: a Gaussian over pooled features, and linear classifiers of pose and cut.

    The distance is that of probabilistic principal component analysis (Tipping ME, Bishop CM, J R Stat Soc B
    1999;61(3):611-622): Mahalanobis in the leading components, and what they leave over divided by its variance. As
    Mahalanobis distance in feature space for what lies outside of the training data: Lee K et al., NeurIPS 2018.
    All numbers are fitted by `boneage fit-gate` and are buffers, so that they are saved with the weights.

    Args:
        gate: `gate` of a [`BoneAgeConfig`].
        channels: of the feature maps.
    """

    center: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor
    pose_weight: torch.Tensor
    pose_bias: torch.Tensor
    cut_off_weight: torch.Tensor
    cut_off_bias: torch.Tensor

    def __init__(self, gate: dict[str, Any], channels: int) -> None:
        super().__init__()
        self.settings = gate
        components, cells = gate["components"], gate["cells"]
        length = components * cells**2
        for name, shape in (
            ("center", (channels,)),
            ("basis", (components, channels)),
            ("scale", (components,)),
            ("pose_weight", (POSES, length)),
            ("pose_bias", (POSES,)),
            ("cut_off_weight", (1, length)),
            ("cut_off_bias", (1,)),
        ):
            self.register_buffer(name, torch.zeros(shape))

    def distance(self, features: torch.Tensor) -> torch.Tensor:
        """Feature maps (B, C, h, w) -> (B,): root mean square over the C directions, about 1 for a hand."""
        offset = features.float().mean(dim=(2, 3)) - self.center.float()  # (B, C)
        along = offset @ self.basis.float().T  # (B, components)
        rest = (offset.square().sum(1) - along.square().sum(1)).clamp_min(0) / self.settings["residual_variance"]
        return (((along / self.scale.float()).square().sum(1) + rest) / offset.shape[1]).sqrt()

    def cells(self, features: torch.Tensor) -> torch.Tensor:
        """Feature maps (B, C, h, w) -> (B, components * cells^2): scaled components of coarse cells of the picture."""
        pooled = nn.functional.adaptive_avg_pool2d(features.float(), self.settings["cells"])  # (B, C, cells, cells)
        offset = pooled.flatten(2) - self.center.float()[None, :, None]  # (B, C, cells^2)
        scaled = torch.einsum("kc,bcj->bkj", self.basis.float() / self.scale.float()[:, None], offset)
        return scaled.flatten(1)

    def pose_scores(self, cells: torch.Tensor) -> torch.Tensor:
        """(B, components * cells^2) -> log probabilities of the poses (B, 8)"""
        scores = nn.functional.linear(cells, self.pose_weight.float(), self.pose_bias.float())
        return scores.log_softmax(1)

    def cut_off_score(self, cells: torch.Tensor) -> torch.Tensor:
        """(B, components * cells^2) -> (B,), log odds that fingers, thumb or a side of the hand are outside."""
        return nn.functional.linear(cells, self.cut_off_weight.float(), self.cut_off_bias.float())[:, 0]

    def turn_odds(self, scores: torch.Tensor) -> torch.Tensor:
        """Log probabilities (B, 8) -> log odds (B, 4) of 0 to 3 quarter turns to none, mirrored or not."""
        quarters = scores.unflatten(1, (2, 4)).logsumexp(1)  # (B, 4)
        return quarters - quarters[:, :1]

    def poses_of(self, scores: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Log probabilities (B, 8) and distances (B,) -> pose (B,) to try.

        A turn only where its log odds are above the limit, or, where the distance is already one to warn of, the
        likeliest; a mirroring only where its log odds are above the limit.
        """
        odds, quarters = self.turn_odds(scores).max(1)
        tried = (odds > self.settings["turn_above"]) | (distance > self.settings["warn_above"])
        quarters = torch.where(tried, quarters, 0)
        mirror_odds = (scores[:, 4:] - scores[:, :4]).gather(1, quarters[:, None])[:, 0]
        return quarters + 4 * (mirror_odds > self.settings["mirror_above"])


def to_standard_pose(pixels: torch.Tensor, pose: int) -> torch.Tensor:
    """Turn (..., S, S) by `pose % 4` quarters clockwise, then mirror it for a pose of 4 or more."""
    pixels = torch.rot90(pixels, -(pose % 4), dims=(-2, -1))
    return pixels.flip(-1) if pose >= 4 else pixels


def judge(quality: Quality, gate: dict[str, Any] | None, reading: GateReading | None) -> Quality:
    """Add the checks of the network's features, or that they were not made.

    Args:
        gate: of the config, and what it read; None where the checkpoint has none.
    """
    if gate is None or reading is None:
        missing = Check(
            "hand",
            "warn",
            "Whether this is one upright hand was not checked: the checkpoint has no gate; boneage fit-gate adds one.",
        )
        return replace(quality, checks=(*quality.checks, missing))
    quarters, mirrored = reading.pose % 4, reading.pose >= 4
    checks = (
        _check_rotation(quarters),
        _check_mirror(mirrored),
        _check_cut_off(reading.cut_off > gate["cut_off_above"]),
        _check_hand(reading.distance, gate, drawn_phantom=quality.drawn_phantom),
    )
    return replace(quality, checks=(*quality.checks, *checks), rotation_degrees=90 * quarters, mirrored=mirrored)


def _check_rotation(quarters: int) -> Check:
    if quarters:
        degrees = 90 * quarters
        return Check(
            "rotation", "warn", f"The hand lay on its side or head: it was turned {degrees} degrees clockwise."
        )
    return Check("rotation", "pass", "The fingers point up, or no quarter turn was sure enough to be put right.")


def _check_mirror(mirrored: bool) -> Check:
    if mirrored:
        return Check(
            "mirror",
            "warn",
            "The thumb was on the left, as of a right hand or a mirrored picture: mirrored; check which hand it is.",
        )
    return Check("mirror", "pass", "The thumb is on the right, as of a left hand, or its side was not sure.")


def _check_cut_off(cut_off: bool) -> Check:
    if cut_off:
        return Check(
            "cut_off", "warn", "Part of the hand seems to lie outside of the picture: check that it is whole."
        )
    return Check("cut_off", "pass", "No part of the hand seems to be cut off.")


def _check_hand(distance: float, gate: dict[str, Any], *, drawn_phantom: bool) -> Check:
    if drawn_phantom:
        return Check("hand", "pass", "Not asked of a drawn phantom: whether it is like hand radiographs.")
    if distance > gate["refuse_above"]:
        return Check(
            "hand",
            "refuse",
            "This does not look like a radiograph of one hand: give such a radiograph, or, if it is one, turn the "
            "quality check off.",
        )
    if distance > gate["warn_above"]:
        return Check("hand", "warn", "This is unlike most hand radiographs that the model knows: be careful.")
    return Check("hand", "pass", "This looks like a radiograph of one hand.")


def refuse(quality: Quality) -> None:
    """Raise RefusedError if a check refuses the image."""
    if quality.verdict == "refuse":
        raise RefusedError(quality.reasons[0], quality)


def put_right(image: Image.Image, quality: Quality) -> Image.Image:
    """The image as the network saw it: inverted, turned and mirrored as `quality` says; same mode, own size.

    Args:
        image: mode ``"L"`` or ``"RGB"``, as it was given.
    """
    if quality.inverted:
        image = image.point([255 - level for level in range(256)] * len(image.getbands()))
    if quality.rotation_degrees:
        image = image.transpose(_CLOCKWISE[quality.rotation_degrees])
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if quality.mirrored else image


# PIL turns counter-clockwise.
_CLOCKWISE = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}
