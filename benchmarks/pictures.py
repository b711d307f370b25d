"""The pictures of a report as SVG: aggregates only, told apart by shape as well as by colour, with text as outlines.

The same input gives the same bytes with the same version of matplotlib.
"""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from boneage_hf.growth_plot import drawing_style

from .attention import draw_shares
from .findings import Study
from .results_folder import Result
from .statistics import ALPHA, bland_altman
from .stress import DARK, KINDS, luminance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe & Ito, Color Universal Design (2008), dark enough for white paper; each with a marker and a line of its own.
STYLES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", "-"),
    ("#56B4E9", "P", "--"),
    ("#000000", "X", "-."),
)

_GRID = {"color": "#d0d0d0", "linewidth": 0.6}


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One line of the ranking: a measured system, its MAE in months with the interval, and its rank in words."""

    name: str
    mae: float
    low: float
    high: float
    rank: str


@dataclass(frozen=True, kw_only=True)
class Costed:
    """One system in the plot of cost.

    Attributes:
        gflop, milliseconds: per image; of the network alone, batch 1, fp32.
        cited: the MAE is a published one from another test set, so it compares with no other point.
        at_least: the cost is a lower bound.
    """

    name: str
    mae: float
    gflop: float
    milliseconds: float
    cited: bool = False
    at_least: bool = False


def draw_ranking(groups: Mapping[str, Sequence[Ranked]]) -> str:
    """MAE with 95 % interval and rank; a panel per protocol (name -> systems), best on top."""

    def draw(figure: "Figure") -> None:
        sizes = [len(systems) + 0.8 for systems in groups.values()]
        axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=sizes)[:, 0]
        for axis, (protocol, systems) in zip(axes, groups.items(), strict=True):
            places = range(len(systems))
            for place, one in zip(places, systems, strict=True):
                ends = [[one.mae - one.low], [one.high - one.mae]]
                axis.errorbar(one.mae, place, xerr=ends, fmt="o", color="#0072B2", ecolor="#000000", capsize=3)
            axis.set_yticks(places, [_wrapped(one.name) for one in systems])
            right = axis.secondary_yaxis("right")
            right.set_yticks(places, [f"{one.mae:.2f} [{one.low:.2f}, {one.high:.2f}]\n{one.rank}" for one in systems])
            right.tick_params(length=0)
            right.spines["right"].set_visible(False)
            axis.set(ylim=(len(systems) - 0.5, -0.5), title=f"protocol {protocol}", xlabel="MAE (months)")
            axis.set_xlim(0, 1.08 * max(one.high for one in systems))
            axis.grid(axis="x", **_GRID)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)

    lines = sum(len(systems) for systems in groups.values())
    return _svg(draw, size=(9, 0.9 * len(groups) + 0.55 * lines + 0.3))


def draw_age(groups: Mapping[str, Mapping[str, Result]]) -> str:
    """MAE and bias with 95 % intervals by 24-month band of the reference; protocol -> name of the system -> run."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots(len(groups), 2, squeeze=False)
        systems = list(dict.fromkeys(name for runs in groups.values() for name in runs))
        for (left, right), (protocol, runs) in zip(axes, groups.items(), strict=True):
            bands = _bands(next(iter(runs.values())))
            for axis, measure, title in (
                (left, "mae_months", "MAE (months)"),
                (right, "bias_months", "bias: predicted - reference (months)"),
            ):
                for index, (name, run) in enumerate(runs.items()):
                    colour, marker, line = STYLES[systems.index(name) % len(STYLES)]
                    rows = _bands(run)
                    values, low, high = (
                        np.array([row[f"{measure}{end}"] for row in rows], dtype=float)
                        for end in ("", "_low", "_high")
                    )
                    shift = 0.12 * (index - (len(runs) - 1) / 2)
                    axis.errorbar(
                        np.arange(len(rows)) + shift,
                        values,
                        yerr=[np.maximum(values - low, 0), np.maximum(high - values, 0)],
                        color=colour,
                        marker=marker,
                        linestyle=line,
                        linewidth=1.2,
                        markersize=4.5,
                        capsize=2,
                        label=_wrapped(name),
                    )
                axis.set_xticks(range(len(bands)), [f"{row['group']}\nn={row['n']}" for row in bands], fontsize=6.5)
                axis.set(xlabel=f"reference bone age (months), {protocol}", title=title)
                axis.grid(axis="y", **_GRID)
                axis.spines[["top", "right"]].set_visible(False)
            left.set_ylim(0, None)
            right.axhline(0, color="#000000", linewidth=0.8)
        # A system keeps one line in the legend, however many protocols it stands under.
        found = (axis.get_legend_handles_labels() for axis in axes[:, 0])
        handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)

    return _svg(draw, size=(11.5, 4.2 * len(groups)))


def _bands(run: Result) -> list[Mapping[str, Any]]:
    return [row for row in run.metrics["groups"] if row["grouping"] == "age_band_months"]


def draw_agreement(predicted: NDArray[np.float64], reference: NDArray[np.float64], *, title: str) -> str:
    """Density of predicted against reference, and Bland and Altman's plot with limits of agreement, binned.

    Args:
        predicted, reference: (n,), months, n of 2 or more.
    """

    def draw(figure: "Figure") -> None:
        from matplotlib.colors import LogNorm

        left, right = figure.subplots(1, 2)
        top = 12 * np.ceil(max(predicted.max(), reference.max()) / 12)
        found = bland_altman(predicted, reference)
        differences, means = predicted - reference, (predicted + reference) / 2
        reach = max(float(np.abs(differences).max()), 1.96 * found["sd_months"], 12) * 1.05
        panels = ((left, reference, predicted, (0, top)), (right, means, differences, (-reach, reach)))
        for axis, x, y, span in panels:
            shown = axis.hexbin(
                x,
                y,
                gridsize=(40, 23),
                extent=(0, top, *span),
                mincnt=1,
                cmap="cividis_r",
                norm=LogNorm(vmin=1, vmax=max(2, len(x) / 50)),
                linewidths=0.2,
            )
            axis.set_ylim(*span)
            axis.set_xlim(0, top)
            axis.spines[["top", "right"]].set_visible(False)
        left.plot([0, top], [0, top], color="#000000", linewidth=1, label="equal")
        for offset in (-12, 12):
            label = "12 months off" if offset > 0 else None
            left.plot([0, top], [offset, top + offset], color="#000000", linewidth=0.8, linestyle=":", label=label)
        left.set(xlabel="reference bone age (months)", ylabel="predicted bone age (months)")
        left.set(title="predicted against reference", aspect="equal")
        left.legend(fontsize=7.5, frameon=False, loc="upper left")
        lines = (
            ("bias", found["bias_months"], found["bias_margin_months"], "-"),
            ("limits of agreement", found["lower_limit_months"], found["limit_margin_months"], "--"),
            ("", found["upper_limit_months"], found["limit_margin_months"], "--"),
        )
        for label, value, margin, line in lines:
            right.axhspan(value - margin, value + margin, color="#999999", alpha=0.35, linewidth=0)
            ends = f" {found['upper_limit_months']:+.1f}" if label.startswith("limits") else ""
            text = f"{label} {value:+.1f}{' to' if ends else ''}{ends}" if label else None
            right.axhline(value, color="#000000", linewidth=1.1, linestyle=line, label=text)
        right.set(xlabel="mean of predicted and reference (months)", ylabel="predicted - reference (months)")
        right.set(title="Bland-Altman; grey: 95 % intervals")
        right.legend(fontsize=7.5, frameon=False, loc="upper right")
        figure.colorbar(shown, ax=[left, right], label="images per cell", fraction=0.025, pad=0.01, format="%g")
        figure.suptitle(f"{title}, n = {len(predicted):,}", fontsize=9)

    return _svg(draw, size=(11, 4.8))


def draw_stress(studies: Mapping[str, Study]) -> str:
    """Heat maps with a row per setting and a column per system (name -> study), numbers in the cells.

    Left the change of the MAE, "n.s." where the absolute errors do not change significantly after Holm's correction;
    right the share of predictions moved by more than 12 months.
    """

    def draw(figure: "Figure") -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize, SymLogNorm
        from matplotlib.patches import Rectangle

        largest = max(1.0, *(float(study.table["mae_change_months"].abs().max()) for study in studies.values()))
        # Most changes are small and a few are huge; the middle colour is no change.
        change = (
            "change of the MAE (months)",
            "mae_change_months",
            "PuOr_r",
            SymLogNorm(1.0, vmin=-largest, vmax=largest),
        )
        moved = ("share moved by more than 12 months", "moved_over_12_months", "Blues", Normalize(0, 1))
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (title, column, colours, norm) in zip(axes, (change, moved), strict=True):
            for place, study in enumerate(studies.values()):
                values, p_values = (
                    dict(zip(study.table["setting"], study.table[key], strict=True))
                    for key in (column, "mae_change_holm_p")
                )
                for row, name in enumerate(names):
                    if name not in values:
                        continue
                    value = float(values[name])
                    colour = colormaps[colours](norm(value))
                    text = f"{value:+.2f}" if column.startswith("mae") else f"{100 * value:.1f} %"
                    if column.startswith("mae") and float(p_values[name]) >= ALPHA:
                        text += " n.s."
                    ink = "white" if luminance(colour) < DARK else "black"
                    axis.add_patch(Rectangle((place, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=1))
                    axis.text(place + 0.5, row + 0.52, text, ha="center", va="center", fontsize=7.5, color=ink)
            axis.set(xlim=(0, len(studies)), ylim=(len(names), 0), title=title)
            axis.set_xticks(np.arange(len(studies)) + 0.5, [_wrapped(name, 16) for name in studies], fontsize=7.5)
            axis.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7.5)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            figure.colorbar(ScalarMappable(norm, colours), ax=axis, fraction=0.04, pad=0.02, format="%g")
        kinds = [name.split(" ")[0] for name in names]
        for row in range(1, len(names)):
            if kinds[row] != kinds[row - 1]:
                for axis in axes:
                    axis.axhline(row, color="#000000", linewidth=0.8, zorder=3)

    every = {
        str(name): str(kind) for study in studies.values() for name, kind in study.table[["setting", "kind"]].values
    }
    names = [name for kind in KINDS for name, own in every.items() if own == kind]
    return _svg(draw, size=(3.4 + 1.7 * max(2, len(studies)), 1.3 + 0.21 * len(names)))


def draw_attention(name: str, study: Study) -> str:
    """Energy inside the boxes against its four rivals, by region and by part and age third."""

    def draw(figure: "Figure") -> None:
        draw_shares(figure, study.table)
        figure.suptitle(name, fontsize=9)

    return _svg(draw, size=(11, 4.1))


def draw_cost(systems: Sequence[Costed]) -> str:
    """MAE against GFLOP, left, and against milliseconds, right; the costs on a logarithmic scale."""
    return _svg(partial(draw_cost_into, systems=systems), size=(11, 4.6 + 0.35 * -(-len(systems) // 3)))


def draw_cost_into(figure: "Figure", systems: Sequence[Costed]) -> None:
    """As [`draw_cost`], into a figure of matplotlib."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    axes = figure.subplots(1, 2, sharey=True)
    own, cited = ([one for one in systems if one.cited is kind] for kind in (False, True))
    # A name beside each point would hide its neighbour where two cost alike: the legend holds them.
    looks: list[tuple[Costed, str, str]] = [  # system, colour, marker
        *((one, STYLES[index % len(STYLES)][0], STYLES[index % len(STYLES)][1]) for index, one in enumerate(own)),
        *((one, "#444444", STYLES[index % len(STYLES)][1]) for index, one in enumerate(cited)),
    ]
    for axis, measure in zip(axes, ("gflop", "milliseconds"), strict=True):
        for one, colour, marker in looks:
            cost = getattr(one, measure)
            axis.plot(
                cost,
                one.mae,
                linestyle="",
                marker=marker,
                markersize=7,
                color=colour,
                markerfacecolor="none" if one.cited else colour,
                zorder=3,
            )
            if one.at_least:
                axis.annotate(
                    "",
                    (cost * 1.45, one.mae),
                    (cost * 1.08, one.mae),
                    arrowprops={"arrowstyle": "->", "color": "#444444"},
                )
        costs = [getattr(one, measure) for one in systems]
        axis.set_xscale("log")
        axis.set_xlim(min(costs) / 3, max(costs) * 3)
        axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 3)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(0, 1.1 * max(one.mae for one in systems))
        axis.grid(**_GRID)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(xlabel="GFLOP per image", ylabel="MAE (months)")
    axes[1].set_xlabel("milliseconds per image on the CPU (network alone, batch 1, fp32)")
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=marker,
            markersize=7,
            color=colour,
            markerfacecolor="none" if one.cited else colour,
            label=f"{_wrapped(one.name, 52)}\n{_costs(one)}",
        )
        for one, colour, marker in looks
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7.5, frameon=False)
    if cited:
        figure.suptitle(
            "hollow: cited MAE from another test set, cost measured here; compares with no other point", fontsize=9
        )


def _costs(one: Costed) -> str:
    sign = "\N{GREATER-THAN OR EQUAL TO} " if one.at_least else ""
    gflop, milliseconds = (
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (one.gflop, one.milliseconds)
    )
    cited = "cited: " if one.cited else ""
    return f"{cited}{one.mae:.2f} months, {sign}{gflop} GFLOP, {sign}{milliseconds} ms"


def _wrapped(name: str, width: int = 30) -> str:
    return "\n".join(textwrap.wrap(name, width, break_long_words=False))


def _svg(draw: Callable[["Figure"], None], *, size: tuple[float, float]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    # Outlines: what is drawn does not depend on the fonts of the reader's machine.
    with drawing_style(), matplotlib.rc_context({"svg.fonttype": "path", "axes.titlesize": 9.5}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
