"""Is this one hand radiograph that we may read? Checks before the answer: refuse, warn or pass, each with a sentence.

Two kinds of checks. Those of `inspect` look at the picture itself and need no network. Those of a `HandGate` look at
the feature maps that the network computes for its answer anyway: whether they are like those of hand radiographs, how
the hand lies, and whether it is cut off. A gate is fitted to a trained backbone by `boneage fit-gate` and is kept in
the checkpoint; without one these checks are named as not made. What can be put right (polarity, quarter turns, mirror)
is put right, and said.

What is not found: a foot that is as much like hands as hands are, a hand with jewellery or a cast, the wrong child.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

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
        image_size: side in pixels of what the network reads.
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
        return Check("size", "warn", f"{size} and was enlarged to {image_size}: details are missing.")
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


def judge(quality: Quality) -> Quality:
    """Add the checks of the network's features, or that they were not made."""
    missing = Check(
        "hand",
        "warn",
        "Whether this is one upright hand was not checked: the checkpoint has no gate (boneage fit-gate makes one).",
    )
    return replace(quality, checks=(*quality.checks, missing))


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
