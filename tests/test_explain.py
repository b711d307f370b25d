"""Attention maps: their scale, their place over the radiograph, and the files they end in."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from boneage_hf import phantom
from boneage_hf.cli import main
from boneage_hf.configuration_boneage import BoneAgeConfig
from boneage_hf.errors import InputError
from boneage_hf.explain import (
    WHOLE,
    ExplainedRadiograph,
    attention_grid,
    explain_files,
    normalise_attention,
    overlay,
    part_of_map,
    upsample_attention,
)
from boneage_hf.hub import save_checkpoint
from boneage_hf.image_processing_boneage import BoneAgeImageProcessor
from boneage_hf.modeling_boneage import BoneAgeModel
from boneage_hf.pipeline_boneage import BoneAgePipeline
from boneage_hf.radiograph import read

SIZE = 96
SIDES = {"height": SIZE, "width": SIZE}


def tiny_model(*, sex_input: str = "none") -> BoneAgeModel:
    torch.manual_seed(0)
    return BoneAgeModel(BoneAgeConfig(backbone="tiny", image_size=SIZE, sex_input=sex_input)).eval()


def tiny_pipeline(**options: str) -> BoneAgePipeline:
    processor = BoneAgeImageProcessor(size=SIDES)
    return BoneAgePipeline(model=tiny_model(**options), image_processor=processor, task="bone-age")


@pytest.fixture
def draw_file(tmp_path: Path) -> Callable[..., Path]:
    """A drawn hand, narrower than high, as a PNG with a name that must show nowhere."""

    def write(months: float, *, inverted: bool = False) -> Path:
        picture = phantom.draw(months, "female", seed=int(months), size=128).crop((20, 0, 116, 128))
        if inverted:
            picture = picture.point(range(255, -1, -1))
        path = tmp_path / f"Doe_Jane_{months:.0f}{'i' if inverted else ''}.png"
        picture.save(path)
        return path

    return write


# --- the scale ------------------------------------------------------------------------------------------------------


def test_a_map_is_scaled_by_its_own_minimum_and_maximum() -> None:
    scaled = normalise_attention(np.array([[2.2e-5, 0.01], [0.02, 0.04]], dtype=np.float32))
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, [[0, 0.24959], [0.499725, 1]], atol=1e-5)


def test_the_smallest_raw_values_use_the_whole_scale() -> None:
    scaled = normalise_attention(np.array([[1e-30, 2e-30, 3e-30]]))
    np.testing.assert_allclose(scaled, [[0, 0.5, 1]])


def test_scaling_twice_is_scaling_once() -> None:
    once = normalise_attention(np.random.default_rng(0).random((5, 7)))
    np.testing.assert_array_equal(normalise_attention(once), once)


def test_a_constant_map_gives_zeros() -> None:
    assert not normalise_attention(np.full((3, 4), 0.3)).any()


@pytest.mark.parametrize("attention", [np.zeros((2, 3, 3)), np.zeros(4), np.zeros((0, 3))])
def test_only_the_map_of_one_image_is_scaled(attention: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"\(h, w\)"):
        normalise_attention(attention)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_map_with_a_value_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="NaN or infinity"):
        normalise_attention(np.array([[0.1, value]]))


# --- the place ------------------------------------------------------------------------------------------------------


def upsampled_slowly(attention: np.ndarray, height: int, width: int, part: tuple[float, ...]) -> np.ndarray:
    """Bilinear between the centres of cells, pixel by pixel; beyond the outer centres the nearest value."""
    rows, columns = attention.shape
    left, top, right, bottom = part

    def neighbours(pixel: int, pixels: int, start: float, end: float, cells: int) -> tuple[int, int, float]:
        place = (start + (pixel + 0.5) / pixels * (end - start)) * cells - 0.5
        low = int(np.floor(place))
        return min(max(low, 0), cells - 1), min(max(low + 1, 0), cells - 1), place - low

    result = np.empty((height, width))
    for y in range(height):
        above, below, dy = neighbours(y, height, top, bottom, rows)
        for x in range(width):
            before, after, dx = neighbours(x, width, left, right, columns)
            upper = attention[above, before] * (1 - dx) + attention[above, after] * dx
            lower = attention[below, before] * (1 - dx) + attention[below, after] * dx
            result[y, x] = upper * (1 - dy) + lower * dy
    return result


@pytest.mark.parametrize("part", [WHOLE, (0.2, 0.0, 0.8, 1.0), (0.0, 0.3, 1.0, 0.71)])
def test_upsampling_is_bilinear_between_the_centres_of_the_cells(part: tuple[float, float, float, float]) -> None:
    attention = np.random.default_rng(1).random((4, 6)).astype(np.float32)
    fast = upsample_attention(attention, 31, 43, part=part)
    assert fast.dtype == np.float32
    np.testing.assert_allclose(fast, upsampled_slowly(attention, 31, 43, part), atol=1e-5)


def test_upsampling_is_that_of_torch_without_aligned_corners() -> None:
    attention = np.random.default_rng(2).random((12, 12)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(attention)[None, None], size=(200, 131), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(upsample_attention(attention, 200, 131), expected[0, 0].numpy(), atol=1e-5)


def test_a_squashed_radiograph_fills_the_map() -> None:
    assert part_of_map((300, 700), size=SIDES, resize_mode="squash") == WHOLE


@pytest.mark.parametrize("image_size", [(100, 300), (300, 100), (211, 199), (96, 96), (1, 500)])
def test_a_padded_radiograph_fills_the_part_that_the_processor_gives_it(image_size: tuple[int, int]) -> None:
    processor = BoneAgeImageProcessor(
        size={"height": 96, "width": 128}, resize_mode="pad", correct_polarity=False, stretch_percentiles=None
    )
    prepared = processor.prepare(Image.new("L", image_size, 255))
    rows, columns = np.flatnonzero(prepared.any(axis=1)), np.flatnonzero(prepared.any(axis=0))
    filled = (columns[0] / 128, rows[0] / 96, (columns[-1] + 1) / 128, (rows[-1] + 1) / 96)
    assert part_of_map(image_size, size=processor.size, resize_mode="pad") == pytest.approx(filled)


# --- the picture ----------------------------------------------------------------------------------------------------


def test_an_overlay_has_the_size_of_the_radiograph_and_its_light_where_the_attention_is() -> None:
    attention = np.zeros((4, 4))
    attention[0, 3] = 1e-4
    picture = overlay(Image.new("L", (80, 160), 100), attention)
    assert (picture.mode, picture.size) == ("RGB", (80, 160))
    y, x = np.unravel_index(np.asarray(picture.convert("L")).argmax(), (160, 80))
    assert y < 40
    assert x >= 60


def test_opacity_goes_from_the_radiograph_alone_to_the_map_alone() -> None:
    image = phantom.draw(100, "male", seed=0, size=64)
    attention = np.random.default_rng(0).random((3, 3))
    assert overlay(image, attention, opacity=0).tobytes() == image.convert("RGB").tobytes()
    blank = Image.new("L", image.size, 255)
    assert overlay(image, attention, opacity=1).tobytes() == overlay(blank, attention, opacity=1).tobytes()


def test_the_raw_scale_of_a_map_does_not_change_the_picture() -> None:
    image = Image.new("L", (40, 40), 100)
    attention = np.arange(9.0).reshape(3, 3)
    assert overlay(image, attention).tobytes() == overlay(image, attention / 4096 + 0.25).tobytes()


def test_brightness_of_the_map_rises_with_attention() -> None:
    """What makes it readable without telling colours apart."""
    ramp = overlay(Image.new("L", (256, 1)), np.linspace(0, 1, 256)[None], opacity=1)
    red, green, blue = (np.asarray(ramp)[0, :, channel] / 255.0 for channel in range(3))
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    assert (np.diff(luminance[::8]) > 0).all()


def test_an_overlay_leaves_its_radiograph_as_it_was() -> None:
    image = phantom.draw(100, "male", seed=0, size=64)
    before = image.tobytes()
    overlay(image, np.arange(4.0).reshape(2, 2))
    assert image.tobytes() == before


def test_an_overlay_needs_a_grey_radiograph() -> None:
    with pytest.raises(InputError, match='mode "L"'):
        overlay(Image.new("RGB", (40, 40)), np.zeros((2, 2)))


@pytest.mark.parametrize("opacity", [-0.1, 1.1, float("nan")])
def test_an_opacity_out_of_range_is_refused(opacity: float) -> None:
    with pytest.raises(InputError, match="opacity"):
        overlay(Image.new("L", (40, 40)), np.zeros((2, 2)), opacity=opacity)


# --- the figure -----------------------------------------------------------------------------------------------------


def explained(
    months: float, *, reference: float | None = None, size: tuple[int, int] = (60, 90)
) -> ExplainedRadiograph:
    attention = np.random.default_rng(int(months)).random((3, 3)) * 1e-3
    return ExplainedRadiograph(Image.new("L", size, 90), attention, months, reference)


@pytest.mark.parametrize("count", [1, 2, 6, 7])
def test_the_figure_shows_each_radiograph_beside_its_map(count: int) -> None:
    figure = attention_grid([explained(20.0 + n) for n in range(count)])
    drawn = [axes for axes in figure.axes if axes.images]
    assert [len(axes.images) for axes in drawn] == [1] * (2 * count)
    shapes = [axes.images[0].get_array().shape for axes in drawn]  # type: ignore[union-attr]
    assert shapes == [(90, 60), (90, 60, 3)] * count


def test_the_figure_gives_predicted_and_reference_age_and_the_raw_range() -> None:
    known, unknown = explained(123.4, reference=120.0), explained(60.0)
    titles = [axes.get_title() for axes in attention_grid([known, unknown]).axes if axes.images]
    assert titles[0] == "1: predicted 123.4 months\nreference 120.0 months"
    assert titles[1] == f"attention {known.attention.min():.1e} to {known.attention.max():.1e}"
    assert titles[2] == "2: predicted 60.0 months"


def test_the_figure_reduces_large_radiographs_and_keeps_their_shape() -> None:
    figure = attention_grid([explained(50.0, size=(1000, 2000))])
    assert figure.axes[0].images[0].get_array().shape == (640, 320)  # type: ignore[union-attr]


def test_a_figure_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="at least one"):
        attention_grid([])


# --- the files ------------------------------------------------------------------------------------------------------


def test_pictures_are_named_by_position_and_as_large_as_the_radiographs(
    tmp_path: Path, draw_file: Callable[..., Path]
) -> None:
    files = [draw_file(60.0), draw_file(150.0)]
    out = tmp_path / "new" / "out"
    found = list(explain_files(tiny_pipeline(), files, sex=None, out=out))
    assert [path for path, _, _ in found] == [out / "attention-1.png", out / "attention-2.png"]
    assert sorted(path.name for path in out.iterdir()) == ["attention-1.png", "attention-2.png"]
    with Image.open(found[0][0]) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (96, 128))
        assert "Doe" not in str(picture.info)


def test_a_picture_is_the_radiograph_as_read_under_the_attention_of_the_pipeline(
    tmp_path: Path, draw_file: Callable[..., Path]
) -> None:
    file, pipe = draw_file(60.0, inverted=True), tiny_pipeline()
    ((path, low, high),) = explain_files(pipe, [file], sex=None, out=tmp_path)
    attention = pipe(file)["attention"]
    assert (low, high) == (attention.min(), attention.max())
    assert low < high
    with Image.open(path) as picture:
        assert picture.tobytes() == overlay(read(file).image, attention).tobytes()


def test_an_inverted_radiograph_has_the_map_of_the_one_it_was(draw_file: Callable[..., Path]) -> None:
    pipe = tiny_pipeline()
    upright, inverted = (pipe(draw_file(90.0, inverted=inverted))["attention"] for inverted in (False, True))
    np.testing.assert_allclose(upright, inverted, atol=1e-6)


def test_a_padded_radiograph_is_explained_without_its_bars(tmp_path: Path, draw_file: Callable[..., Path]) -> None:
    file = draw_file(60.0)
    processor = BoneAgeImageProcessor(size=SIDES, resize_mode="pad")
    pipe = BoneAgePipeline(model=tiny_model(), image_processor=processor, task="bone-age")
    ((path, _, _),) = explain_files(pipe, [file], sex=None, out=tmp_path)
    part = (12 / 96, 0.0, 84 / 96, 1.0)  # 96 x 128 px in a square: 72 of 96 columns
    with Image.open(path) as picture:
        assert picture.tobytes() == overlay(read(file).image, pipe(file)["attention"], part=part).tobytes()


def test_a_grid_is_one_figure_of_the_first_files(tmp_path: Path, draw_file: Callable[..., Path]) -> None:
    files = [draw_file(60.0), draw_file(150.0), tmp_path / "not there.png"]
    found = list(explain_files(tiny_pipeline(), files, sex=None, out=tmp_path / "out", grid=2))
    assert [path.name for path, _, _ in found] == ["attention-grid.png"] * 2
    assert found[0][1:] != found[1][1:]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["attention-grid.png"]
    with Image.open(found[0][0]) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("grid", [0, -1, 3])
def test_a_grid_of_more_files_than_there_are_is_refused(
    grid: int, tmp_path: Path, draw_file: Callable[..., Path]
) -> None:
    files = [draw_file(60.0), draw_file(150.0)]
    with pytest.raises(InputError, match="--grid"):
        list(explain_files(tiny_pipeline(), files, sex=None, out=tmp_path / "out", grid=grid))
    assert not (tmp_path / "out").exists()


def test_a_bad_file_is_named_by_its_position_only_and_earlier_pictures_stay(
    tmp_path: Path, draw_file: Callable[..., Path]
) -> None:
    bad = tmp_path / "Doe_John.png"
    bad.write_bytes(draw_file(60.0).read_bytes()[:400])
    with pytest.raises(InputError, match=r"^file 2: ") as refused:
        list(explain_files(tiny_pipeline(), [draw_file(60.0), bad], sex=None, out=tmp_path / "out"))
    assert "Doe" not in str(refused.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["attention-1.png"]


def test_sex_is_asked_for_where_the_model_needs_it(tmp_path: Path, draw_file: Callable[..., Path]) -> None:
    pipe, files = tiny_pipeline(sex_input="embedding"), [draw_file(60.0)]
    with pytest.raises(InputError, match='sex="female"'):
        list(explain_files(pipe, files, sex=None, out=tmp_path / "out"))
    assert len(list(explain_files(pipe, files, sex="male", out=tmp_path / "out"))) == 1


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, draw_file: Callable[..., Path]) -> None:
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(InputError, match="in the way"):
            list(explain_files(tiny_pipeline(), [draw_file(60.0)], sex=None, out=out))
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_picture_that_cannot_be_written_leaves_the_older_one(
    tmp_path: Path, draw_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "out" / "attention-1.png"
    older.parent.mkdir()
    older.write_bytes(b"older")

    def fail_half_way(self: Image.Image, target: Path, **options: str) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    file = draw_file(60.0)
    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        list(explain_files(tiny_pipeline(), [file], sex=None, out=older.parent))
    assert [path.read_bytes() for path in older.parent.iterdir()] == [b"older"]


def test_the_command_prints_picture_and_raw_range_of_each_file(
    tmp_path: Path, draw_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(tiny_model(), BoneAgeImageProcessor(size=SIDES), tmp_path / "model")
    out = tmp_path / "out"
    files = [str(draw_file(60.0)), str(draw_file(150.0))]
    assert main(["explain", str(tmp_path / "model"), *files, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"file {n}: {out / f'attention-{n}.png'}" for n in (1, 2)]
    assert all(" attention from " in line and " to " in line for line in lines)

    assert main(["explain", str(tmp_path / "model"), str(tmp_path / "none.png"), "--out", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: file 1: ")
