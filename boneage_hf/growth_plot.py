"""Growth plot: bone age over chronological age, with the bands that belong to the standard deviation score.

The score measures from the chronological age, so its bands of 1 and 2 SD lie around the line where both ages are
equal; the table's mean skeletal age is a thin second line. Axes are ruled in years, because a person reads them.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from .clinical import OLDEST_MONTHS, Assessment, growth_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blues of two lightnesses, black and vermilion (Okabe and Ito): told apart in grey and with any colour blindness.
_BAND_2_SD, _BAND_1_SD, _LINE, _MEAN, _CHILD = "#dfeaf4", "#b3cfe6", "#000000", "#0072B2", "#D55E00"

_SIZE_INCHES = (6.4, 4.6)

# Matplotlib's settings are global to the process: whoever draws from several threads takes turns.
_TURN = threading.Lock()


@contextmanager
def drawing_style() -> Iterator[None]:
    """Settings under which the same input gives the same bytes, with text that stays text; one thread at a time."""
    import matplotlib

    settings: Any = {  # a key of another name is refused by matplotlib itself
        "svg.hashsalt": "boneage-hf",
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
        "font.family": ["DejaVu Sans"],
        "font.size": 9.0,
        "axes.unicode_minus": False,
    }
    with _TURN, matplotlib.rc_context(settings):
        yield


def describe_growth(assessment: Assessment) -> str:
    """The plot in words, for those who do not see it: one or two sentences."""
    age = assessment.chronological_age_months
    where = "no chronological age" if age is None else f"a chronological age of {age:.1f} months"
    interval = assessment.interval_months
    ends = "without an interval" if interval is None else f"with the interval {interval[0]:.1f} to {interval[1]:.1f}"
    return f"Growth plot: bone age {assessment.bone_age_months:.1f} months, {ends}, at {where}. {assessment.statement}"


def draw_growth(axes: "Axes", assessment: Assessment) -> None:
    """Draw the plot on axes that are still empty; call it within [`drawing_style`]."""
    table = growth_table(assessment.sex)
    ages = table.age_months
    for width, colour in ((2, _BAND_2_SD), (1, _BAND_1_SD)):
        low = [age - width * sd for age, sd in zip(ages, table.sd_months, strict=True)]
        high = [age + width * sd for age, sd in zip(ages, table.sd_months, strict=True)]
        axes.fill_between(ages, low, high, color=colour, linewidth=0, label=f"within {width} SD")
    axes.plot([0, OLDEST_MONTHS], [0, OLDEST_MONTHS], color=_LINE, linewidth=1, label="bone age = chronological age")
    axes.plot(
        ages, table.mean_months, color=_MEAN, linewidth=0.8, linestyle="--", label="mean skeletal age of the table"
    )
    _draw_child(axes, assessment)
    ticks = range(0, int(OLDEST_MONTHS) + 1, 24)
    labels = [str(months // 12) for months in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    interval = assessment.interval_months or (assessment.bone_age_months, assessment.bone_age_months)
    # A model's answer may leave the range of ages; the child is on the plot all the same.
    axes.set(xlim=(0, OLDEST_MONTHS), ylim=(min(0.0, interval[0] - 6), max(OLDEST_MONTHS, interval[1] + 6)))
    axes.set_xlabel("chronological age (years)")
    axes.set_ylabel("bone age (years)")
    axes.set_title(f"Brush Foundation table, {'girls' if assessment.sex == 'female' else 'boys'}", fontsize=9)
    axes.grid(color="#888888", linewidth=0.3, alpha=0.5)
    axes.legend(loc="upper left", fontsize=7.5, framealpha=0.9)


def growth_plot_svg(assessment: Assessment) -> str:
    """The plot as an `<svg>` element to stand in a page: text as text, a title for screen readers, white ground."""
    with drawing_style():
        stream = io.StringIO()
        # No date and no version: the same child gives the same text.
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        _figure(assessment).savefig(stream, format="svg", metadata=nothing)
    drawn = stream.getvalue()
    words = escape(describe_growth(assessment))
    opening, rest = drawn[drawn.index("<svg") :].split(">", 1)
    return f'{opening} role="img" aria-label="{words}">\n <title>{words}</title>{rest}'


def growth_plot_png(assessment: Assessment, *, dpi: int = 150) -> bytes:
    """The plot as a PNG file of 6.4 x 4.6 inches."""
    with drawing_style():
        stream = io.BytesIO()
        _figure(assessment).savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def _figure(assessment: Assessment) -> "Figure":
    # Figure without pyplot: no global list of figures, safe in threads.
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, layout="constrained", facecolor="white")
    draw_growth(figure.subplots(), assessment)
    return figure


def _draw_child(axes: "Axes", assessment: Assessment) -> None:
    bone_age, interval = assessment.bone_age_months, assessment.interval_months
    age = assessment.chronological_age_months
    if age is None:
        axes.axhline(bone_age, color=_CHILD, linewidth=1.6, label="this child (chronological age not given)")
        if interval is not None:
            axes.axhspan(*interval, color=_CHILD, alpha=0.2, linewidth=0, label="its interval")
        return
    error, label = None, "this child"
    if interval is not None:
        # An interval need not hold the answer; a bar cannot have a negative length.
        error = [[max(bone_age - interval[0], 0.0)], [max(interval[1] - bone_age, 0.0)]]
        label = "this child, with its interval"
    axes.errorbar(
        [age],
        [bone_age],
        yerr=error,
        fmt="D",
        color=_CHILD,
        markersize=6,
        markeredgecolor="black",
        capsize=4,
        elinewidth=1.8,
        label=label,
        zorder=5,
    )
