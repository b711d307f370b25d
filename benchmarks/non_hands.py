"""Pictures that are no radiograph of one hand: real ones that Python packages carry, and drawn ones.

Everything here is found offline and made the same way on every machine with the same fonts. Of each kind some
pictures (`purpose="tuning"`: other originals, other seeds) may be used to choose what the quality gate measures; only
those of `purpose="counted"` are measured. Views (crops, mirror images) of few originals are not independent: each kind
says how many originals it has.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from boneage_hf.errors import InputError
from boneage_hf.radiograph import read

Purpose = Literal["tuning", "counted"]

#: Originals by kind: package and file. Those of "tuning" are never counted.
_PHOTOGRAPHS: dict[Purpose, tuple[tuple[str, str], ...]] = {
    "tuning": (
        ("skimage.data", "camera.png"),
        ("skimage.data", "coffee.png"),
        ("sklearn.datasets.images", "china.jpg"),
    ),
    "counted": (
        ("skimage.data", "astronaut.png"),
        ("skimage.data", "chelsea.png"),
        ("skimage.data", "coins.png"),
        ("skimage.data", "clock_motion.png"),
        ("skimage.data", "motorcycle_left.png"),
        ("skimage.data", "rocket.jpg"),
        ("sklearn.datasets.images", "flower.jpg"),
        ("matplotlib.mpl-data.sample_data", "grace_hopper.jpg"),
        ("gradio.media_assets.images", "cheetah1.jpg"),
        ("gradio.media_assets.images", "lion.jpg"),
        ("gradio.media_assets.images", "tower.jpg"),
    ),
}
_TEXTURES: dict[Purpose, tuple[tuple[str, str], ...]] = {
    "tuning": (("skimage.data", "brick.png"),),
    "counted": (("skimage.data", "grass.png"), ("skimage.data", "gravel.png")),
}
_SCIENCE: dict[Purpose, tuple[tuple[str, str], ...]] = {
    "tuning": (("skimage.data", "cell.png"), ("skimage.data", "moon.png")),
    "counted": (
        ("skimage.data", "ihc.png"),
        ("skimage.data", "retina.jpg"),
        ("skimage.data", "hubble_deep_field.jpg"),
        ("skimage.data", "microaneurysms.png"),
        ("skimage.data", "phantom.png"),
    ),
}
_RADIOGRAPHS: dict[Purpose, tuple[tuple[str, str], ...]] = {
    "tuning": (),
    # A chest and a lower leg.
    "counted": (("data_store.data", "RG1_UNCR.dcm"), ("data_store.data", "RG3_UNCR.dcm")),
}
_SECTIONS: dict[Purpose, tuple[tuple[str, str], ...]] = {
    # CT of a head and of a vertebra, ultrasound, a test pattern.
    "tuning": (
        ("data_store.data", "693_UNCR.dcm"),
        ("data_store.data", "bad_sequence.dcm"),
        ("data_store.data", "color-pl.dcm"),
        ("data_store.data", "mlut_18.dcm"),
    ),
    # MR of a shoulder and an abdomen, CT of an abdomen, ultrasound of a lymph node, a bone scan.
    "counted": (
        ("data_store.data", "MR2_UNCR.dcm"),
        ("data_store.data", "MR-SIEMENS-DICOM-WithOverlays.dcm"),
        ("data_store.data", "explicit_VR-UN.dcm"),
        ("data_store.data", "US1_UNCR.dcm"),
        ("data_store.data", "JPEG2000_UNC.dcm"),
    ),
}
_PAGES: dict[Purpose, tuple[tuple[str, str], ...]] = {
    "tuning": (("skimage.data", "text.png"),),
    "counted": (("skimage.data", "page.png"),),
}


@dataclass(frozen=True)
class Kind:
    """One kind of non-hands.

    Attributes:
        name: for tables.
        n: pictures that are counted; a quarter as many, and at least four, are for tuning where there are originals.
        note: what the pictures are.
        originals: how many real originals or independent drawings they come from, by purpose.
        make: index and purpose -> picture of mode "L" or "RGB", with at least 64 pixels a side.
    """

    name: str
    n: int
    note: str
    originals: dict[Purpose, int]
    make: Callable[[int, Purpose], Image.Image]

    def pictures(self, purpose: Purpose) -> Iterator[Image.Image]:
        count = self.n if purpose == "counted" else max(4, self.n // 4)
        for index in range(count if self.originals[purpose] else 0):
            yield self.make(index, purpose)


def load_original(package: str, name: str) -> Image.Image:
    """One real picture of a package, as `radiograph.read` shows it if it is DICOM.

    Raises:
        InputError: the package is not installed.
    """
    top, *folders = package.split(".")
    spec = find_spec(top)  # imports nothing
    root = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path(top)
    try:
        content = root.joinpath(*folders, name).read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"The non-hands need the packages of the extra benchmark, and {top} is missing: "
            'pip install "boneage-hf[benchmark]".'
        ) from None
    if name.endswith(".dcm"):
        return read(content).image
    image = Image.open(BytesIO(content))
    return image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")


_load = cache(load_original)


def _views(files: dict[Purpose, tuple[tuple[str, str], ...]], *, grey: bool, seed: int) -> dict[str, Any]:
    """Views of originals in turn: first each of them whole, then crops of 40 to 90 % of a side, half mirrored."""

    def make(index: int, purpose: Purpose) -> Image.Image:
        originals = files[purpose]
        image = _load(*originals[index % len(originals)])
        image = image.convert("L") if grey else image
        if index < len(originals):
            return image.copy()
        rng = np.random.default_rng([seed, index])
        width, height = (max(64, round(side * rng.uniform(0.4, 0.9))) for side in image.size)
        width, height = min(width, image.width), min(height, image.height)
        left = int(rng.integers(0, image.width - width + 1))
        top = int(rng.integers(0, image.height - height + 1))
        crop = image.crop((left, top, left + width, top + height))
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if index % 2 else crop

    return {"make": make, "originals": {purpose: len(names) for purpose, names in files.items()}}


def _drawn(draw: Callable[[np.random.Generator], Image.Image], n: int, seed: int) -> dict[str, Any]:
    def make(index: int, purpose: Purpose) -> Image.Image:
        return draw(np.random.default_rng([seed, index, purpose == "tuning"]))

    return {"make": make, "originals": {"counted": n, "tuning": max(4, n // 4)}}


_WORDS = (
    *("the", "report", "of", "this", "week", "says", "that", "number", "and", "value", "differ", "more", "than"),
    *("anyone", "would", "have", "thought", "before", "a", "table", "was", "made", "for", "readers", "who", "ask"),
)


def _text_lines(pen: ImageDraw.ImageDraw, rng: np.random.Generator, box: tuple[int, int, int, int], fill: int) -> None:
    left, top, right, bottom = box
    size = int(rng.integers(11, 22))
    font = ImageFont.load_default(size)
    y = top
    while y + size < bottom:
        words = " ".join(rng.choice(_WORDS, size=60))
        line = words[: int((right - left) / (0.5 * size))]
        if rng.uniform() > 0.15:
            pen.text((left, y), line[: int(len(line) * rng.choice([1.0, 1.0, 1.0, 0.6]))], fill=fill, font=font)
        y += round(1.35 * size)


def _text_page(rng: np.random.Generator) -> Image.Image:
    width, height = int(rng.integers(500, 900)), int(rng.integers(600, 1100))
    paper, ink = (int(rng.integers(215, 256)), int(rng.integers(0, 70)))
    if rng.uniform() < 0.3:
        paper, ink = ink, paper
    page = Image.new("L", (width, height), paper)
    _text_lines(ImageDraw.Draw(page), rng, (50, 60, width - 50, height - 60), ink)
    if rng.uniform() < 0.6:  # as scanned: blurred, uneven, grainy
        page = page.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.2)))
        shade = np.linspace(1.0, rng.uniform(0.75, 1.0), width)[None, :]
        grainy = np.asarray(page, np.float32) * shade + rng.normal(0, rng.uniform(1, 6), (height, width))
        page = Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8))
    return page


def _screenshot(rng: np.random.Generator) -> Image.Image:
    width, height = (int(side) for side in rng.choice([(1280, 800), (1024, 768), (800, 1280), (1440, 900)]))
    dark = bool(rng.uniform() < 0.5)
    ground, panel, ink = (28, 44, 220) if dark else (245, 225, 30)
    screen = Image.new("L", (width, height), ground)
    pen = ImageDraw.Draw(screen)
    pen.rectangle((0, 0, width, int(rng.integers(30, 70))), fill=panel)
    for _ in range(int(rng.integers(3, 9))):
        left, top = int(rng.integers(0, width - 200)), int(rng.integers(60, height - 150))
        right, bottom = left + int(rng.integers(150, 500)), top + int(rng.integers(80, 400))
        pen.rounded_rectangle(
            (left, top, right, bottom), radius=8, fill=panel + int(rng.integers(-12, 13)), outline=128
        )
        if rng.uniform() < 0.25:  # a picture in a window
            ramp = np.linspace(0, 255, 120)[None, :] * np.linspace(rng.uniform(), 1, 90)[:, None]
            screen.paste(Image.fromarray(ramp.astype(np.uint8)), (left + 10, top + 10))
        else:
            _text_lines(pen, rng, (left + 10, top + 10, min(right, width) - 10, min(bottom, height) - 10), ink)
    for column in range(int(rng.integers(2, 12))):
        x = 20 + column * 60
        pen.ellipse((x, height - 45, x + 32, height - 13), fill=int(rng.integers(60, 240)))
    return screen


def _plot(rng: np.random.Generator) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(rng.uniform(4, 8), rng.uniform(4, 8)), dpi=100)
    dark = rng.uniform() < 0.3
    figure.set_facecolor("0.1" if dark else "white")
    axes = figure.add_subplot()
    axes.set_facecolor("0.15" if dark else "white")
    x = np.linspace(0, 10, 200)
    match int(rng.integers(0, 6)):
        case 0:
            for _ in range(int(rng.integers(1, 6))):
                axes.plot(x, np.cumsum(rng.normal(size=200)), linewidth=rng.uniform(0.8, 3))
        case 1:
            axes.scatter(rng.normal(size=300), rng.normal(size=300), s=rng.uniform(5, 60), alpha=0.6)
        case 2:
            axes.bar(range(8), rng.uniform(0.1, 1, 8))
        case 3:
            axes.hist(rng.normal(size=1000), bins=30)
        case 4:
            axes.imshow(rng.normal(size=(16, 16)).cumsum(0).cumsum(1), cmap="viridis")
        case _:
            axes.contourf(x, x, np.sin(x)[None, :] * np.cos(x * rng.uniform(0.3, 2))[:, None], cmap="gray")
    axes.set_title(" ".join(rng.choice(_WORDS, size=4)))
    axes.grid(visible=bool(rng.uniform() < 0.5))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()).convert("L")


def _noise(rng: np.random.Generator) -> Image.Image:
    side = int(rng.integers(200, 700))
    values = rng.normal(size=(side, side))
    kind = int(rng.integers(0, 4))
    if kind:  # 1/f^a noise: clouds, the steeper the smoother
        frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None, :])
        frequency[0, 0] = 1 / side
        values = np.fft.ifft2(np.fft.fft2(values) / frequency ** (0.6 * kind)).real
    scaled = (values - values.mean()) / values.std() * rng.uniform(20, 60) + rng.uniform(80, 170)
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))


def _shapes(rng: np.random.Generator) -> Image.Image:
    """Bright ellipses, bars and gradients on dark: what a simple rule on brightness would take for a hand."""
    side = int(rng.integers(300, 700))
    picture = Image.new("L", (side, side), int(rng.integers(0, 60)))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, 12))):
        x, y = rng.uniform(0.05, 0.8, 2) * side
        width, height = rng.uniform(0.05, 0.6, 2) * side
        draw = (pen.ellipse, pen.rectangle)[int(rng.integers(0, 2))]
        draw((x, y, x + width, y + height), fill=int(rng.integers(60, 256)))
    soft = picture.rotate(float(rng.uniform(0, 180))).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 8))))
    grain = rng.normal(0, rng.uniform(1, 5), (side, side))
    return Image.fromarray(np.clip(np.asarray(soft, np.float32) + grain, 0, 255).astype(np.uint8))


def kinds() -> tuple[Kind, ...]:
    """All kinds, 405 counted pictures together."""
    return (
        Kind("photographs, grey", 55, "views of real photographs", **_views(_PHOTOGRAPHS, grey=True, seed=1)),
        Kind("photographs, colour", 22, "views of real photographs", **_views(_PHOTOGRAPHS, grey=False, seed=2)),
        Kind("textures", 30, "views of grass and gravel", **_views(_TEXTURES, grey=True, seed=3)),
        Kind("microscopy, eye, sky", 30, "views of real pictures", **_views(_SCIENCE, grey=True, seed=4)),
        Kind("other radiographs", 30, "views of a chest and a lower leg", **_views(_RADIOGRAPHS, grey=True, seed=5)),
        Kind("CT, MR, ultrasound, scan", 40, "views of real pictures", **_views(_SECTIONS, grey=True, seed=6)),
        Kind("book page", 18, "views of one real page", **_views(_PAGES, grey=True, seed=7)),
        Kind("text pages", 40, "drawn, some as scanned", **_drawn(_text_page, 40, 8)),
        Kind("screenshots", 40, "drawn windows, text and icons", **_drawn(_screenshot, 40, 9)),
        Kind("plots", 40, "matplotlib", **_drawn(_plot, 40, 10)),
        Kind("noise", 30, "white to cloudy", **_drawn(_noise, 30, 11)),
        Kind("shapes", 30, "bright soft shapes on dark", **_drawn(_shapes, 30, 12)),
    )
