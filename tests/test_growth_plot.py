"""The growth plot as text, as bytes and as what is drawn."""

import re
import threading
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from boneage_hf.clinical import Assessment, assess, growth_table
from boneage_hf.growth_plot import draw_growth, drawing_style, growth_plot_png, growth_plot_svg

NAMESPACE = "{http://www.w3.org/2000/svg}"


def child(age: float | None = 120.0, *, interval: tuple[float, float] | None = (90.0, 114.0)) -> Assessment:
    return assess(bone_age_months=102.0, interval_months=interval, sex="female", chronological_age_months=age)


def test_the_svg_is_one_element_with_a_title_and_readable_text() -> None:
    drawn = growth_plot_svg(child())
    root = ElementTree.fromstring(drawn)
    assert root.tag == f"{NAMESPACE}svg"
    assert root.get("role") == "img"
    title = root.findtext(f"{NAMESPACE}title") or ""
    assert root.get("aria-label") == title
    assert "102.0 months" in title
    words = "".join(root.itertext())
    for text in ("chronological age (years)", "bone age (years)", "within 2 SD", "this child, with its interval"):
        assert text in words


def test_the_svg_refers_to_nothing_outside_itself() -> None:
    drawn = growth_plot_svg(child())
    assert [link for link in re.findall(r'href="([^"]*)"', drawn) if not link.startswith("#")] == []
    assert [link for link in re.findall(r"url\(([^)]*)\)", drawn) if not link.startswith("#")] == []
    assert "<metadata" not in drawn
    assert "<script" not in drawn


def test_the_same_child_gives_the_same_bytes_also_from_several_threads() -> None:
    expected = growth_plot_svg(child()), growth_plot_png(child(), dpi=50)
    found: list[tuple[str, bytes]] = []
    threads = [
        threading.Thread(target=lambda: found.append((growth_plot_svg(child()), growth_plot_png(child(), dpi=50))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 3
    assert expected[1].startswith(b"\x89PNG")


def test_the_child_and_its_interval_lie_where_their_months_are() -> None:
    with drawing_style():
        axes = Figure().subplots()
        draw_growth(axes, child())
    (container,) = axes.containers
    point, _, (bars,) = container
    assert point.get_xydata().tolist() == [[120.0, 102.0]]
    assert bars.get_segments()[0].tolist() == [[120.0, 90.0], [120.0, 114.0]]


def test_the_bands_lie_around_the_chronological_age_and_the_mean_is_that_of_the_table() -> None:
    with drawing_style():
        axes = Figure().subplots()
        draw_growth(axes, child())
    table = growth_table("female")
    wide, narrow = axes.collections[:2]
    for width, band in ((2, wide), (1, narrow)):
        edges = {tuple(round(value, 6) for value in point) for point in np.asarray(band.get_paths()[0].vertices)}
        for age, sd in zip(table.age_months, table.sd_months, strict=True):
            assert (round(age, 6), round(age - width * sd, 6)) in edges
            assert (round(age, 6), round(age + width * sd, 6)) in edges
    lines = {line.get_label(): line for line in axes.lines}
    drawn = np.asarray(lines["mean skeletal age of the table"].get_ydata(), dtype=float)
    assert tuple(drawn.tolist()) == table.mean_months


@pytest.mark.parametrize("interval", [None, (90.0, 114.0)])
def test_without_a_chronological_age_a_line_stands_for_the_child(interval: tuple[float, float] | None) -> None:
    words = "".join(ElementTree.fromstring(growth_plot_svg(child(None, interval=interval))).itertext())
    assert "this child (chronological age not given)" in words
    assert ("its interval" in words) == (interval is not None)


def test_an_answer_beyond_all_ages_is_still_on_the_plot() -> None:
    far = assess(bone_age_months=-7, interval_months=(-20, 260), sex="male", chronological_age_months=6)
    with drawing_style():
        axes = Figure().subplots()
        draw_growth(axes, far)
    low, high = axes.get_ylim()
    assert low < -20
    assert high > 260


def test_settings_of_matplotlib_are_put_back() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    growth_plot_svg(child())
    assert dict(matplotlib.rcParams) == before
