"""Drawn left hands whose ossification follows age and sex: data for tests and for a first run without radiographs.

``draw`` makes a picture that looks like a posterior-anterior radiograph of a left hand, thumb to the right as in most
radiographs of the RSNA challenge. Nothing in it comes from a patient. Every age in ``TIMETABLE`` is approximate and
was chosen so that the order of events is right; the pictures were drawn for tests and have no clinical meaning.

Sources of the order and of the approximate ages:

* onset: Garn SM, Rohmann CG, Silverman FN. Radiographic standards for postnatal ossification and tooth calcification.
  Med Radiogr Photogr 1967;43:45-66. The months follow its medians roughly; they are not a transcription of its table;
* order of the carpal bones, full width and fusion: the order of events in Gilsanz V, Ratib O. Hand Bone Age. Springer
  2005, and in Greulich WW, Pyle SI. Radiographic Atlas of Skeletal Development of the Hand and Wrist. 2nd ed. Stanford
  University Press 1959. The months were chosen to keep that order; they are not a transcription of either atlas.

The geometry (millimetres of an adult hand) is drawn by eye.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, PngImagePlugin, UnidentifiedImageError

from .errors import InputError
from .radiograph import PHANTOM_MARK as PHANTOM_MARK
from .radiograph import has_phantom_mark
from .sex import SEX_INDEX, Sex, parse_sex

#: Ages ``draw`` accepts, months; the range covers every radiograph of the RSNA challenge.
MIN_AGE_MONTHS, MAX_AGE_MONTHS = 0.0, 240.0

#: Sides ``draw`` accepts, pixels.
MIN_SIZE, MAX_SIZE = 64, 2048

Points = npt.NDArray[np.float64]
# Draws a polygon (n, 2) in millimetres on a layer with a grey level.
_Fill = Callable[[int, Points, float], None]


@dataclass(frozen=True)
class Milestones:
    """When one ossification centre is first seen, reaches its full width and fuses: months of bone age.

    ``full_width_months``: an epiphysis is as wide as its metaphysis, a carpal bone has its adult shape.
    ``fusion_months``: the growth plate is gone; ``None`` for carpal bones and the sesamoid, which fuse with nothing.
    """

    onset_months: float
    full_width_months: float
    fusion_months: float | None = None


@dataclass(frozen=True)
class Ossification:
    """How far one visible centre has come.

    ``growth`` is 0 at onset and 1 from full width on. ``fusion`` is 0 while the growth plate is open and 1 once it is
    gone, and always 0 for a centre that fuses with nothing.
    """

    growth: float
    fusion: float


#: Carpal bones in the order in which they appear.
CARPAL_BONES = ("capitate", "hamate", "triquetrum", "lunate", "trapezium", "trapezoid", "scaphoid", "pisiform")

#: A growth plate closes over this long before ``fusion_months``. Chosen, no source.
_CLOSING_MONTHS = 18.0

# Name: (onset, full width, fusion) of girls, then of boys. Approximate months; sources in the module's docstring.
_AGES: tuple[tuple[str, tuple[float, float, float | None], tuple[float, float, float | None]], ...] = (
    ("capitate", (2, 132, None), (3, 156, None)),
    ("hamate", (3, 134, None), (4, 158, None)),
    ("distal_radius", (10, 120, 204), (13, 144, 222)),
    ("triquetrum", (21, 138, None), (30, 162, None)),
    ("lunate", (31, 138, None), (49, 162, None)),
    ("trapezium", (48, 140, None), (66, 164, None)),
    ("trapezoid", (50, 140, None), (69, 164, None)),
    ("scaphoid", (52, 142, None), (71, 166, None)),
    ("distal_ulna", (65, 132, 194), (85, 156, 213)),
    ("pisiform", (104, 150, None), (126, 174, None)),
    ("adductor_sesamoid", (128, 156, None), (153, 180, None)),
    ("metacarpal_1", (19, 112, 180), (32, 138, 201)),
    ("metacarpal_2", (13, 112, 180), (19, 138, 201)),
    ("metacarpal_3", (13, 112, 180), (21, 138, 201)),
    ("metacarpal_4", (15, 114, 181), (24, 140, 202)),
    ("metacarpal_5", (16, 114, 181), (26, 140, 202)),
    ("proximal_phalanx_1", (21, 108, 170), (36, 134, 192)),
    ("proximal_phalanx_2", (11, 106, 170), (17, 132, 192)),
    ("proximal_phalanx_3", (10, 106, 170), (16, 132, 192)),
    ("proximal_phalanx_4", (11, 106, 170), (17, 132, 192)),
    ("proximal_phalanx_5", (14, 108, 170), (22, 134, 192)),
    ("middle_phalanx_2", (16, 108, 174), (26, 134, 196)),
    ("middle_phalanx_3", (15, 108, 174), (24, 134, 196)),
    ("middle_phalanx_4", (15, 108, 174), (25, 134, 196)),
    ("middle_phalanx_5", (23, 112, 174), (41, 138, 196)),
    ("distal_phalanx_1", (12, 106, 162), (19, 132, 186)),
    ("distal_phalanx_2", (23, 108, 162), (39, 134, 186)),
    ("distal_phalanx_3", (18, 108, 162), (29, 134, 186)),
    ("distal_phalanx_4", (18, 108, 162), (29, 134, 186)),
    ("distal_phalanx_5", (24, 110, 162), (40, 136, 186)),
)

#: Every centre by name and sex. Approximate (see the module's docstring); drawn for tests, no clinical meaning.
TIMETABLE: Mapping[str, Mapping[Sex, Milestones]] = MappingProxyType(
    {name: MappingProxyType({"female": Milestones(*girls), "male": Milestones(*boys)}) for name, girls, boys in _AGES}
)


def ossified_centres(bone_age_months: float, sex: Sex) -> dict[str, Ossification]:
    """Return the centres that can be seen at this bone age, in the order of ``TIMETABLE``; ``draw`` draws these.

    Args:
        bone_age_months: 0 to 240.
        sex: ``"female"`` or ``"male"``.

    Raises:
        InputError: the age is no number from 0 to 240, or the sex is anything else.
    """
    age, sex = _parse_age(bone_age_months), parse_sex(sex)
    seen: dict[str, Ossification] = {}
    for name, by_sex in TIMETABLE.items():
        when = by_sex[sex]
        if age < when.onset_months:
            continue
        growth = min(1.0, (age - when.onset_months) / (when.full_width_months - when.onset_months))
        fusion = 0.0
        if when.fusion_months is not None:
            fusion = min(1.0, max(0.0, 1.0 - (when.fusion_months - age) / _CLOSING_MONTHS))
        seen[name] = Ossification(growth=growth, fusion=fusion)
    return seen


def draw(bone_age_months: float, sex: Sex, *, seed: int, size: int = 512) -> Image.Image:
    """Draw one left hand; the same four arguments give the same pixels.

    Ossification depends on age and sex alone. ``seed`` chooses pose (rotation, shift, spread of the fingers),
    proportions, exposure, collimation, marker and noise, so two ages drawn with one seed differ by the hand only.

    Args:
        bone_age_months: 0 to 240.
        sex: ``"female"`` or ``"male"``.
        seed: 0 or more.
        size: side of the square picture, 64 to 2048 pixels.

    Returns:
        Mode ``"L"`` image (size, size), dark background, thumb to the right; ``info["Description"]`` is
        ``PHANTOM_MARK``.

    Raises:
        InputError: an argument is outside these ranges.
    """
    age, sex = _parse_age(bone_age_months), parse_sex(sex)
    seed = _parse_whole(seed, name="seed", low=0, high=2**63 - 1)
    size = _parse_whole(size, name="size", low=MIN_SIZE, high=MAX_SIZE)
    rng = np.random.default_rng(seed)
    pose = _draw_pose(rng)
    exposure = _draw_exposure(rng)
    hand = _lay_out(age, sex, pose)
    frame = _frame(age, sex, pose, size=size)
    soft = _soft_tissue(hand, frame, age=age, size=size)
    bone = _bone(hand, frame, age=age, sex=sex, size=size)
    pixels = _expose(soft, bone, exposure, rng, size=size)
    image = Image.fromarray(pixels)
    image.info["Description"] = PHANTOM_MARK
    return image


def png_bytes(image: Image.Image) -> bytes:
    """Return the PNG file of a drawn image, with ``PHANTOM_MARK`` in its text chunks.

    Raises:
        InputError: ``image`` does not carry ``PHANTOM_MARK`` in its ``info``, so it may be a radiograph.
    """
    # Only what was drawn may be called drawn: the mark on a patient's radiograph would be a false statement.
    if image.info.get("Description") != PHANTOM_MARK:
        raise InputError("the image does not carry the phantom mark: give one that phantom.draw returned.")
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", PHANTOM_MARK)
    text.add_text("Software", PHANTOM_MARK)
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=text, compress_level=4)
    return buffer.getvalue()


def save_png(image: Image.Image, target: str | os.PathLike[str] | BinaryIO) -> None:
    """Write ``png_bytes(image)`` to a path (complete or not at all) or to an open binary file.

    Raises:
        InputError: ``image`` was not drawn by ``draw``, or the folder of ``target`` does not exist.
    """
    content = png_bytes(image)
    if not isinstance(target, str | os.PathLike):
        target.write(content)
        return
    path = Path(target)
    if not path.parent.is_dir():
        raise InputError("the folder to write the drawing to does not exist: create it first.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_phantom(source: str | os.PathLike[str] | bytes) -> bool:
    """Tell whether an image file (path or content) says that it was drawn here.

    Raises:
        InputError: ``source`` cannot be opened as an image.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            return has_phantom_mark(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError):
        # PIL's own message holds the file name, which may name a patient.
        raise InputError("the file cannot be opened as an image: give a PNG, JPEG or TIFF file.") from None


def _parse_age(value: float) -> float:
    if isinstance(value, Real) and not isinstance(value, bool) and MIN_AGE_MONTHS <= float(value) <= MAX_AGE_MONTHS:
        return float(value)
    raise InputError(f"bone_age_months must be a number from 0 to 240 months, not {value!r}.")


def _parse_whole(value: int, *, name: str, low: int, high: int) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high:
        return int(value)
    raise InputError(f"{name} must be a whole number from {low} to {high}, not {value!r}.")


# Geometry. Millimetres of an adult hand, origin in the middle of the wrist, x to the thumb, y to the finger tips.
# Digits 1 to 5: where the metacarpal starts, its direction (degrees from the forearm's axis, positive to the thumb),
# direction of the finger, lengths from metacarpal to distal phalanx.
_DIGITS: tuple[tuple[tuple[float, float], float, float, tuple[float, ...]], ...] = (
    ((24.5, 28.0), 43.0, 36.0, (44.0, 31.0, 22.0)),
    ((12.0, 35.5), 13.0, 13.0, (65.0, 39.0, 23.5, 17.0)),
    ((1.0, 36.0), 2.0, 2.0, (62.0, 43.0, 27.5, 17.5)),
    ((-9.0, 33.0), -9.0, -9.5, (55.0, 40.0, 26.0, 17.5)),
    ((-17.5, 29.5), -20.0, -22.0, (50.0, 31.5, 18.5, 15.5)),
)
_SEGMENTS = ("metacarpal", "proximal_phalanx", "middle_phalanx", "distal_phalanx")
# Half widths at base, waist and head, height of the epiphysis: by segment.
_SEGMENT_SHAPE = {
    "metacarpal": (6.6, 3.8, 7.0, 8.5),
    "proximal_phalanx": (7.2, 3.9, 5.2, 4.2),
    "middle_phalanx": (6.3, 3.2, 4.6, 3.4),
    "distal_phalanx": (5.4, 2.0, 3.3, 3.0),
}
_DIGIT_WIDTH = (1.12, 1.02, 1.05, 0.96, 0.86)
_PLATE_MM = 1.2  # height of an open growth plate
_JOINT_MM = 1.3  # cartilage between two bones, once for each of them

_CARPAL_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "capitate": (
        (-3.2, 33),
        (1.5, 34.2),
        (6.2, 33.5),
        (6.8, 27),
        (6.0, 21),
        (6.4, 15.5),
        (3.2, 12),
        (-1.2, 12),
        (-3.6, 16),
        (-2.6, 23),
    ),
    "hamate": (
        (-4.2, 31.5),
        (-3.6, 24),
        (-4.6, 17.5),
        (-6.4, 14.8),
        (-9.5, 17.5),
        (-14.5, 23),
        (-17.5, 27),
        (-11, 30.5),
    ),
    "triquetrum": ((-7, 13.4), (-9.8, 16.4), (-14.8, 20.6), (-17.6, 17), (-15.4, 11), (-10.5, 8), (-7.2, 9.6)),
    "lunate": ((-6, 9.5), (-4.2, 12.6), (0, 10.6), (3.8, 10.8), (6.2, 12.4), (7.2, 7), (5, 3), (0, 1.6), (-5, 3.6)),
    "scaphoid": (
        (8, 12),
        (7.6, 8),
        (9.4, 4.2),
        (14.4, 6.2),
        (18.2, 11),
        (20.4, 16.8),
        (17.6, 20.4),
        (12, 19.6),
        (8.4, 16.2),
    ),
    "trapezoid": ((8.8, 31.6), (8, 26), (9, 21.4), (13.8, 21.8), (16, 25.4), (15.2, 30.6), (12, 33)),
    "trapezium": ((16.6, 30), (16.4, 24.6), (17.8, 21.2), (22, 19.6), (26.6, 21.4), (27, 25.4), (21.6, 28)),
    "pisiform": ((-18.4, 13), (-17.4, 16), (-14.2, 17), (-11.2, 15), (-11.2, 11.2), (-14.4, 9.6), (-17.4, 10.4)),
    "distal_radius": ((-5.6, -8), (-6, -2), (0, -1.2), (8, 0.4), (15, 3), (21, 6), (22.8, 1), (22, -7.4), (8, -8.6)),
    "distal_ulna": ((-22, -9), (-22.6, -4), (-21.6, 1), (-19.4, -1.6), (-14, -3.6), (-9.4, -4), (-9, -9), (-15, -9.6)),
}
# Two layers whose brightness adds up where bones lie over each other.
_FRONT_CARPALS = ("capitate", "triquetrum", "scaphoid", "trapezium")
_CORTEX, _SPONGE, _MARROW = 235, 158, 104


@dataclass(frozen=True)
class _Pose:
    rotation_degrees: float
    shift: tuple[float, float]  # parts of the side
    zoom: float
    spread_degrees: float
    thumb_degrees: float
    bend_degrees: tuple[float, ...]
    lengths: tuple[float, ...]


@dataclass(frozen=True)
class _Exposure:
    background: float  # grey levels
    contrast: float  # grey levels
    hardness: float
    gradient: tuple[float, float]
    noise: float  # grey levels
    blur_pixels: float  # at 512 pixels
    collimation: tuple[tuple[float, float], ...] | None  # corners, parts of the side
    outside: float
    marker: tuple[float, float, float, float] | None  # x, y, height (parts of the side), degrees


@dataclass(frozen=True)
class _Bone:
    name: str
    digit: int
    base: Points  # (2,)
    tip: Points  # (2,)
    epiphysis_at_head: bool
    shape: tuple[float, float, float, float]


@dataclass(frozen=True)
class _Frame:
    """Millimetres to pixels: ``points @ matrix + offset``."""

    matrix: Points
    offset: Points
    millimetre: float  # pixels

    def pixels(self, points: Points, *, scale: int = 1) -> list[tuple[float, float]]:
        xy = (points @ self.matrix + self.offset) * scale
        return list(map(tuple, xy.tolist()))


def _draw_pose(rng: np.random.Generator) -> _Pose:
    return _Pose(
        rotation_degrees=float(np.clip(rng.normal(0.0, 5.0), -12, 12)),
        shift=(float(rng.uniform(-0.035, 0.035)), float(rng.uniform(-0.03, 0.03))),
        zoom=float(rng.uniform(0.95, 1.05)),
        spread_degrees=float(rng.uniform(-3.0, 7.0)),
        thumb_degrees=float(rng.uniform(-8.0, 8.0)),
        bend_degrees=tuple(rng.normal(0.0, 1.6, 5).tolist()),
        lengths=tuple(rng.normal(1.0, 0.015, 5).clip(0.96, 1.04).tolist()),
    )


def _draw_exposure(rng: np.random.Generator) -> _Exposure:
    background = float(rng.uniform(4, 38))
    collimation = None
    if rng.random() < 0.6:
        left, top, right, bottom = rng.uniform([0.0, 0.0, 0.95, 0.95], [0.05, 0.05, 1.0, 1.02])
        tilt = rng.uniform(-0.012, 0.012)
        collimation = (
            (float(left - tilt), float(top + tilt)),
            (float(right - tilt), float(top - tilt)),
            (float(right + tilt), float(bottom - tilt)),
            (float(left + tilt), float(bottom + tilt)),
        )
    marker = None
    if rng.random() < 0.8:
        high = rng.random() < 0.35
        marker = (
            float(rng.uniform(0.09, 0.16)),
            float(rng.uniform(0.1, 0.2) if high else rng.uniform(0.72, 0.86)),
            float(rng.uniform(0.05, 0.08)),
            float(rng.normal(0.0, 12.0)),
        )
    return _Exposure(
        background=background,
        contrast=float(rng.uniform(150, 235)),
        hardness=float(rng.uniform(0.6, 1.2)),
        gradient=(float(rng.uniform(-0.06, 0.06)), float(rng.uniform(-0.06, 0.06))),
        noise=float(rng.uniform(1.5, 4.5)),
        blur_pixels=float(rng.uniform(0.5, 0.9)),
        collimation=collimation,
        outside=float(background * rng.uniform(0.1, 0.8)),
        marker=marker,
    )


def _grown(age: float, sex: Sex) -> float:
    """Part of adult hand length (of a man), drawn by eye: about a third at birth, adult at 15 (girls) and 17 years."""
    months = (0.0, 12.0, 36.0, 72.0, 120.0, 144.0, 168.0, 186.0, 204.0, 240.0)
    girls = (0.34, 0.45, 0.55, 0.66, 0.79, 0.86, 0.91, 0.92, 0.92, 0.92)
    boys = (0.34, 0.46, 0.56, 0.66, 0.78, 0.83, 0.91, 0.97, 1.0, 1.0)
    return float(np.interp(age, months, girls if sex == "female" else boys))


def _young(age: float) -> float:
    """1 at birth, 0 from about 10 years: how far a hand has the short broad bones of an infant."""
    return float(np.interp(age, (0, 24, 60, 120), (1.0, 0.7, 0.35, 0.0)))


def _lay_out(age: float, sex: Sex, pose: _Pose) -> list[_Bone]:
    bones = []
    robust = 1.0 + 0.04 * SEX_INDEX[sex] * float(np.interp(age, (120, 200), (0, 1)))
    for digit, (base, metacarpal_degrees, finger_degrees, lengths) in enumerate(_DIGITS, start=1):
        start = np.array(base)
        fan = (2.5 - digit) / 2.5 * pose.spread_degrees if digit > 1 else pose.thumb_degrees
        names = _SEGMENTS if digit > 1 else (_SEGMENTS[0], _SEGMENTS[1], _SEGMENTS[3])
        for step, (name, length) in enumerate(zip(names, lengths, strict=True)):
            degrees = metacarpal_degrees + fan * (0.25 if digit > 1 else 0.7)
            if step:
                degrees = finger_degrees + fan + pose.bend_degrees[digit - 1] * (step - 1)
            radians = math.radians(degrees)
            end = start + length * pose.lengths[digit - 1] * np.array([math.sin(radians), math.cos(radians)])
            half_base, waist, head, height = _SEGMENT_SHAPE[name]
            width = _DIGIT_WIDTH[digit - 1] * (1.0 + 0.16 * _young(age)) * robust
            at_head = name == "metacarpal" and digit > 1
            bones.append(
                _Bone(
                    name=f"{name}_{digit}",
                    digit=digit,
                    base=start,
                    tip=end,
                    epiphysis_at_head=at_head,
                    shape=(half_base * width, waist * width, head * width, height if at_head else min(height, 4.6)),
                )
            )
            start = end
    return bones


def _frame(age: float, sex: Sex, pose: _Pose, *, size: int) -> _Frame:
    # Radiographers collimate to the hand, so a small hand fills more of the picture than its length alone would.
    grown = (_grown(age, sex) - 0.34) / 0.66
    millimetre = size * (0.56 + 0.17 * grown) / 190.0 * pose.zoom
    angle = math.radians(pose.rotation_degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = millimetre * np.array([[cos, sin], [sin, -cos]])
    # The middle of the hand (not the wrist) goes to the middle of the picture.
    middle = np.array([14.0, 84.0]) @ matrix
    offset = size * (np.array([0.5, 0.48]) + np.array(pose.shift)) - middle
    return _Frame(matrix=matrix, offset=offset, millimetre=millimetre)


def _soft_tissue(hand: list[_Bone], frame: _Frame, *, age: float, size: int) -> npt.NDArray[np.float32]:
    """Thickness of the soft tissue, (size, size), 0 outside the skin, about 1 in the palm."""
    mask = Image.new("L", (size, size))
    pen = ImageDraw.Draw(mask)
    fat = 1.0 + 0.22 * _young(age)

    def limb(start: Points, end: Points, radius_start: float, radius_end: float) -> None:
        along = (end - start) / np.linalg.norm(end - start)
        across = np.array([-along[1], along[0]])
        sides = np.stack(
            [
                start + across * radius_start,
                end + across * radius_end,
                end - across * radius_end,
                start - across * radius_start,
            ]
        )
        pen.polygon(frame.pixels(sides), fill=255)
        for centre, radius in ((start, radius_start), (end, radius_end)):
            (x, y), r = frame.pixels(centre[None])[0], radius * frame.millimetre
            pen.ellipse((x - r, y - r, x + r, y + r), fill=255)

    joints = {bone.name: bone for bone in hand}
    for bone in hand:
        segment = bone.name.rpartition("_")[0]
        thick = fat * _DIGIT_WIDTH[bone.digit - 1]
        start_radius, end_radius = {
            "metacarpal": (11.0, 10.5),
            "proximal_phalanx": (10.2, 9.2),
            "middle_phalanx": (9.2, 8.2),
            "distal_phalanx": (8.4, 6.6),
        }[segment]
        end = bone.tip
        if segment == "distal_phalanx":
            end = bone.tip - (bone.tip - bone.base) * 0.12
        limb(bone.base, end, start_radius * thick, end_radius * thick)
    web = [joints[f"proximal_phalanx_{digit}"] for digit in (2, 3, 4, 5)]
    palm = [bone.base + 0.38 * (bone.tip - bone.base) for bone in web]
    thumb = joints["metacarpal_1"]
    index = joints["metacarpal_2"]
    palm += [
        np.array([-29.0 * fat, 34.0]),
        np.array([-28.0 * fat, 16.0]),
        np.array([-24.0 * fat, -2.0]),
        np.array([26.0 * fat, 2.0]),
    ]
    palm += [np.array([30.0 * fat, 20.0]), thumb.tip + 0.1 * (thumb.base - thumb.tip)]
    palm += [0.45 * thumb.tip + 0.55 * (index.base + 0.8 * (index.tip - index.base)) + np.array([0.0, -4.0])]
    palm += [index.base + 0.85 * (index.tip - index.base) + np.array([6.0, 0.0])]
    pen.polygon(frame.pixels(np.stack(palm)), fill=255)
    forearm = np.array([[-24, 8], [27, 8], [26, -6], [31, -60], [37, -190], [-36, -190], [-29, -60], [-25, -6]], float)
    forearm[:, 0] *= fat
    pen.polygon(frame.pixels(forearm), fill=255)
    # Blurring and cutting at one half rounds the webs and joins without drawing them.
    mask = mask.filter(ImageFilter.GaussianBlur(2.6 * frame.millimetre)).point(_STEEP)
    near = np.asarray(mask.filter(ImageFilter.GaussianBlur(1.6 * frame.millimetre)), np.float32)
    # The slow change from finger to palm needs no more than a quarter of the pixels.
    coarse = mask.reduce(4).filter(ImageFilter.GaussianBlur(11.0 * frame.millimetre / 4))
    wide = np.asarray(coarse.resize((size, size), Image.Resampling.BILINEAR), np.float32)
    skin = np.asarray(mask, np.float32) / 255
    thickness = skin * (0.06 + 0.26 * (near / 255) ** 1.5 + 0.68 * (wide / 255) ** 2)
    return thickness.astype(np.float32)


_STEEP = [min(255, max(0, (level - 128) * 6 + 128)) for level in range(256)]


def _bone(hand: list[_Bone], frame: _Frame, *, age: float, sex: Sex, size: int) -> npt.NDArray[np.float32]:
    """Brightness that bone adds, (size, size), 0 without bone, about 1 in a cortex; overlap adds up."""
    scale = 2
    layers = [Image.new("L", (size * scale, size * scale)) for _ in range(3)]
    pens = [ImageDraw.Draw(layer) for layer in layers]
    seen = ossified_centres(age, sex)

    def fill(layer: int, points: Points, level: float) -> None:
        pens[layer].polygon(frame.pixels(points, scale=scale), fill=round(level))

    compact = 1.0 - 0.35 * _young(age)
    for bone in hand:
        _draw_long_bone(
            bone, seen.get(bone.name), fill, compact=compact, months_fused=_months_fused(bone.name, age, sex)
        )
    young = 1.0 + 0.10 * _young(age)
    for name, base, tip, (half_base, waist, half_head) in (
        ("distal_radius", (10.5, -170.0), (8.2, 0.3), (9.0, 6.8, 13.8)),
        ("distal_ulna", (-15.0, -170.0), (-15.3, -0.3), (9.0, 5.6, 7.0)),
    ):
        shape = (half_base * young, waist * young, half_head * young, 8.0)
        shaft = _Bone(name, 0, np.array(base), np.array(tip), True, shape)
        _draw_long_bone(
            shaft, seen.get(name), fill, compact=compact, months_fused=_months_fused(name, age, sex), flare=11.0
        )
    for name in CARPAL_BONES:
        if name in seen:
            layer = 1 if name in _FRONT_CARPALS else 2
            outer = _centre_outline(name, seen[name].growth)
            middle = outer.mean(0)
            # The pisiform lies in front of the triquetrum; two full bones would look like metal there.
            dense = (0.66 + 0.16 * seen[name].growth) * (0.5 if name == "pisiform" else 1.0)
            fill(layer, outer, _CORTEX * dense)
            fill(layer, middle + (outer - middle) * _inset(outer, 0.75), _SPONGE * dense)
    if "adductor_sesamoid" in seen:
        thumb = hand[0]
        along = (thumb.tip - thumb.base) / np.linalg.norm(thumb.tip - thumb.base)
        centre = thumb.tip - along * 5.0 + np.array([-along[1], along[0]]) * 6.4
        radius = 1.2 + 1.5 * seen["adductor_sesamoid"].growth
        fill(2, centre + radius * _superellipse(2.0, 2.0), 120)
    front, *others = (layer.reduce(scale) for layer in layers)
    total = np.asarray(front, np.float32)
    for other in others:
        total = total + np.asarray(other, np.float32)
    return np.minimum(total / 255, 1.15)


def _months_fused(name: str, age: float, sex: Sex) -> float:
    fusion = TIMETABLE[name][sex].fusion_months
    return 0.0 if fusion is None else max(0.0, age - fusion)


def _draw_long_bone(
    bone: _Bone,
    epiphysis: Ossification | None,
    fill: _Fill,
    *,
    compact: float,
    months_fused: float,
    flare: float = 3.6,
) -> None:
    """Shaft, and at one end an epiphysis that grows, closes its plate and leaves a scar that fades."""
    start, end = (bone.base, bone.tip) if bone.epiphysis_at_head else (bone.tip, bone.base)
    # Local frame: v runs from the plain end to the end with the growth plate, u across.
    length = float(np.linalg.norm(end - start))
    along = (end - start) / length
    across = np.array([along[1], -along[0]])

    def place(uv: Points) -> Points:
        return start + uv[:, :1] * across + uv[:, 1:] * along

    half_base, waist, half_head, height = bone.shape
    plain, grown = (half_base, half_head) if bone.epiphysis_at_head else (half_head, half_base)
    fusion = epiphysis.fusion if epiphysis else 0.0
    growth = epiphysis.growth if epiphysis else 0.0
    top = length - _JOINT_MM  # the joint's end of the epiphysis
    # The plate of a small child is higher: the shaft ends earlier and the centre lies in more cartilage.
    gap = (_PLATE_MM * (1.0 + 0.8 * (1.0 - growth))) * (1.0 - fusion)
    shaft_end = top - height - gap
    tuft = bone.name.startswith("distal_phalanx")
    profile = _shaft(_JOINT_MM if not tuft else 0.0, shaft_end, plain, waist, grown, flare=flare, tuft=tuft)
    fill(0, place(profile), _CORTEX * 0.86)
    # Spongy ends pass into the marrow cavity over several steps.
    for step in range(5):
        inner = _marrow(profile, waist, compact, trim=0.6 + step * min(0.055 * shaft_end, 4.5))
        fill(0, place(inner), _SPONGE * 0.88 + (_MARROW - _SPONGE * 0.88) * step / 4)
    if epiphysis is None:
        return
    edge, inside = _CORTEX * 0.86, _SPONGE * 0.9
    if bone.name in _CARPAL_OUTLINES:
        outer = _centre_outline(bone.name, growth)
        middle = outer.mean(0)
        fill(0, outer, edge)
        fill(0, middle + (outer - middle) * _inset(outer, 0.8), inside)
    else:
        wide = grown * (0.24 + 0.80 * growth**0.85)
        high = height * (0.42 + 0.58 * growth**0.7) / 2
        centre = np.array([0.0, top - height / 2])
        squareness = 2.0 + 1.6 * growth
        shape = _superellipse(squareness, 2.0 + (0.2 if bone.epiphysis_at_head else 1.2) * growth)
        # A small centre is nearly round, never wider than high by much.
        outer = shape * np.array([wide, max(high, min(wide * 0.75, height / 2))])
        fill(0, place(outer + centre), edge)
        fill(0, place(outer * _inset(outer, 0.7) + centre), inside)
    if fusion > 0.4:
        # Fusion begins in the middle of the plate and spreads to its rim.
        reach = grown * 0.94 * min(1.0, (fusion - 0.4) / 0.6)
        scar = math.exp(-months_fused / 14.0) if fusion >= 1.0 else 1.0
        low, high = shaft_end - 1.6, shaft_end + gap + 1.6
        corners = np.array([[-reach, low], [reach, low], [reach, high], [-reach, high]])
        fill(0, place(corners), inside)
        if fusion >= 1.0:
            for side in (-1.0, 1.0):
                rim = np.array([[reach - 0.9, low], [reach + 0.2, low], [reach + 0.2, high], [reach - 0.9, high]])
                fill(0, place(rim * [side, 1.0]), edge)
            low, high = shaft_end - 0.45, shaft_end + 0.45
            line = np.array([[-reach, low], [reach, low], [reach, high], [-reach, high]])
            fill(0, place(line), inside + scar * (edge - inside))


def _shaft(low: float, high: float, plain: float, waist: float, grown: float, *, flare: float, tuft: bool) -> Points:
    """Outline (50, 2) of a shaft: a round end at ``low``, a nearly flat one (the metaphysis) at ``high``."""
    t = (1.0 - np.cos(np.linspace(0.0, np.pi, 25))) / 2
    v = low + (high - low) * t
    # The tuft of a distal phalanx is short and broad, other heads flare gently.
    half = waist + (plain - waist) * (1 - t) ** (6.0 if tuft else flare) + (grown - waist) * t**flare
    for distance, depth, power in ((v - low, 0.6 * plain, 2.3), (high - v, 0.22 * grown, 2.3)):
        half = half * (1.0 - (1.0 - np.clip(distance / depth, 0.0, 1.0)) ** power) ** (1.0 / power)
    right = np.stack([half, v], 1)
    return np.concatenate([right, right[::-1] * [-1.0, 1.0]])


def _marrow(outline: Points, waist: float, compact: float, *, trim: float) -> Points:
    """The part of a shaft inside its cortex, which is thick in the middle and a thin shell at both ends."""
    right = outline[: len(outline) // 2]
    low, high = right[0, 1], right[-1, 1]
    t = (right[:, 1] - low) / (high - low)
    cortex = 0.55 + 0.42 * compact * waist * np.exp(-(((t - 0.5) / 0.22) ** 2))
    v = low + trim + t * (high - low - 2 * trim)
    half = np.interp(v, right[:, 1], np.clip(right[:, 0] - cortex, 0.0, None))
    inner = np.stack([half, v], 1)
    return np.concatenate([inner, inner[::-1] * [-1.0, 1.0]])


@lru_cache(maxsize=512)
def _superellipse_cached(power_u: float, power_v: float) -> Points:
    angle = np.linspace(0.0, 2 * np.pi, 40, endpoint=False)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.sign(cos) * np.abs(cos) ** (2 / power_u), np.sign(sin) * np.abs(sin) ** (2 / power_v)], 1)


def _superellipse(power_u: float, power_v: float) -> Points:
    return _superellipse_cached(round(power_u, 2), round(power_v, 2))


@lru_cache(maxsize=32)
def _adult_outline(name: str) -> tuple[Points, Points]:
    """Middle (2,) and radii by angle (48, 2) of a drawn outline with its corners cut."""
    points = np.array(_CARPAL_OUTLINES[name])
    for _ in range(2):  # Chaikin's corner cutting
        after = np.roll(points, -1, axis=0)
        points = np.stack([0.82 * points + 0.18 * after, 0.18 * points + 0.82 * after], 1).reshape(-1, 2)
    middle = (points.min(0) + points.max(0)) / 2
    around = points - middle
    angle = np.unwrap(np.arctan2(around[:, 1], around[:, 0]))
    order = np.argsort(angle % (2 * np.pi))
    wanted = np.linspace(0.0, 2 * np.pi, 48, endpoint=False)
    radius = np.interp(wanted, (angle % (2 * np.pi))[order], np.hypot(*around.T)[order], period=2 * np.pi)
    return middle, 1.05 * radius[:, None] * np.stack([np.cos(wanted), np.sin(wanted)], 1)


def _centre_outline(name: str, growth: float) -> Points:
    """Outline (48, 2) of a carpal bone or forearm epiphysis: a small ball at onset, the adult shape at 1."""
    middle, adult = _adult_outline(name)
    radius = np.hypot(*adult.T)
    ball = adult / radius[:, None] * (0.5 * radius.min() + 0.5 * radius.mean())
    # Round for the first third of its growth, then more and more the adult bone.
    shape = min(1.0, max(0.0, growth - 0.15) / 0.75)
    return middle + (0.26 + 0.74 * growth**0.55) * ((1.0 - shape) * ball + shape * adult)


def _inset(outline: Points, thickness: float) -> float:
    """Factor that shrinks an outline about its middle by about ``thickness`` millimetres."""
    return max(0.25, 1.0 - thickness / float(np.hypot(*(outline - outline.mean(0)).T).mean()))


def _expose(
    soft: npt.NDArray[np.float32],
    bone: npt.NDArray[np.float32],
    exposure: _Exposure,
    rng: np.random.Generator,
    *,
    size: int,
) -> npt.NDArray[np.uint8]:
    """Turn tissue into grey levels: response curve, uneven field, marker, collimation, blur and grain."""
    weave = Image.fromarray(rng.integers(0, 256, (size // 4, size // 4), dtype=np.uint8))
    trabeculae = np.asarray(weave.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255 - 0.5
    absorbed = 0.62 * soft + bone * (0.50 + 0.09 * trabeculae)
    grey = (1.0 - np.exp(-exposure.hardness * absorbed)) * (exposure.contrast / (1.0 - math.exp(-exposure.hardness)))
    ramp = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    across, down = exposure.gradient
    grey = exposure.background + grey * (1.0 + across * ramp[None, :] + down * ramp[:, None])
    picture = Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8))
    if exposure.marker is not None:
        _draw_marker(picture, exposure.marker, size=size)
    picture = picture.filter(ImageFilter.GaussianBlur(exposure.blur_pixels * size / 512))
    if exposure.collimation is not None:
        field = Image.new("L", (size, size))
        ImageDraw.Draw(field).polygon([(x * size, y * size) for x, y in exposure.collimation], fill=255)
        field = field.filter(ImageFilter.GaussianBlur(1.5 * size / 512))
        picture = Image.composite(picture, Image.new("L", (size, size), round(exposure.outside)), field)
    grain = rng.standard_normal((size, size), dtype=np.float32)
    grain = 0.7 * grain + 0.4 * (np.roll(grain, 1, 0) + np.roll(grain, 1, 1))
    return np.clip(np.asarray(picture, np.float32) + exposure.noise * grain, 0, 255).astype(np.uint8)


def _draw_marker(picture: Image.Image, marker: tuple[float, float, float, float], *, size: int) -> None:
    """A lead letter L, drawn as a polygon so that no font of the machine changes the picture."""
    x, y, height, degrees = marker
    letter = np.array([(-0.30, -0.5), (-0.10, -0.5), (-0.10, 0.32), (0.32, 0.32), (0.32, 0.5), (-0.30, 0.5)])
    angle = math.radians(degrees)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    corners = (letter @ turn) * height * size + np.array([x, y]) * size
    ImageDraw.Draw(picture).polygon(list(map(tuple, corners.tolist())), fill=250)
