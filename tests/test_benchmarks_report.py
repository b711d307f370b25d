import csv
import dataclasses
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.compare import compare_errors
from benchmarks.findings import Findings, check_report
from benchmarks.measured import MEASURES, MeasuredResult
from benchmarks.pictures import _wrapped
from benchmarks.protocol import get_protocol
from benchmarks.registry import load_published, load_reference_table
from benchmarks.report import MISSING, Section, build_sections, to_html, to_markdown, write_report
from benchmarks.results_folder import Result
from benchmarks.run import over_age
from boneage_hf.errors import InputError
from boneage_hf.metrics import by_group, error_metrics, error_over_age, permutation_p_text

DECIMAL = get_protocol("rsna-test-200-decimal")


def digest_of(system: str) -> str:
    """Stands for the hash of a system's predictions."""
    return hashlib.sha256(system.encode()).hexdigest()


def measured_row(system: str, mae: float, protocol: str = DECIMAL.name, *, verified: bool = True) -> MeasuredResult:
    values: dict[str, tuple[float | None, float | None, float | None]] = dict.fromkeys(MEASURES, (0.5, 0.4, 0.6))
    values["mae_months"] = (mae, mae - 1, mae + 1)
    values["r2"] = (None, None, None)
    fingerprint = get_protocol(protocol).ground_truth_fingerprint or ""
    return MeasuredResult(
        system=system,
        checkpoint="example/bone-age",
        revision="0123456789abcdef",
        protocol=protocol,
        split="test",
        n=200,
        values=values,
        flip_average=True,
        predictions_sha256=digest_of(system),
        data_fingerprint="d" * 64,
        ground_truth_fingerprint=fingerprint if verified else "",
        package_version="0.1.0",
        commit="",
        versions="{}",
        date="2026-01-31",
    )


def sections_with(*measured: MeasuredResult, findings: Findings | None = None) -> list[Section]:
    return build_sections(load_reference_table(), load_published(), measured, findings)


def run_of(system: str, errors: np.ndarray, *, leakage: str = "none") -> Result:
    """A run on as many images as there are errors, all around 100 months."""
    reference = np.linspace(50, 150, len(errors))
    ids = [str(number) for number in range(len(errors))]
    groups = by_group(reference + errors, reference, n_resamples=50)
    metrics = {
        **result_metrics(reference + errors, reference),
        "n": len(errors),
        "predictions_sha256": digest_of(system),
        "groups": groups.astype(object).where(groups.notna(), None).to_dict(orient="records"),
        "flip_average": False,
        "trained_on": None,
        "interval": None,
    }
    named = {
        "name": system,
        "revision": f"revision of {system}",
        "preprocessing": "none",
        "adapter": "CheckpointSystem",
        "uses_sex": system != "B",
    }
    return Result(
        folder=f"{system}-folder",
        system=system,
        protocol=DECIMAL,
        leakage=leakage,
        predictions=pd.DataFrame({"id": ids, "predicted_months": reference + errors}),
        metrics=metrics,
        manifest={"system": named},
    )


def result_metrics(predicted: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    matched = pd.DataFrame({"predicted_months": predicted, "reference_months": reference})
    return {
        "metrics": error_metrics(predicted, reference, n_resamples=50),
        "error_over_age": error_over_age(predicted, reference, n_resamples=50),
        **over_age(matched),
    }


def findings_of(**errors: np.ndarray) -> Findings:
    """Runs with their comparison."""
    runs = tuple(run_of(system, values) for system, values in errors.items())
    compared = compare_errors(
        errors, protocol=DECIMAL.name, leakages={run.system: run.leakage for run in runs}, draws=200
    )
    standings = tuple(
        dataclasses.replace(standing, predictions_sha256=digest_of(standing.system)) for standing in compared.standings
    )
    return Findings(runs=runs, comparisons=(dataclasses.replace(compared, standings=standings),))


def noise(scale: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, 200)


def section(sections: list[Section], heading: str) -> Section:
    (found,) = [candidate for candidate in sections if candidate.heading == heading]
    return found


def rows_of(found: Section) -> list[dict[str, str]]:
    assert found.table is not None
    return [dict(zip(found.table.columns, row, strict=True)) for row in found.table.rows]


def test_the_reference_table_stands_as_it_was_printed() -> None:
    found = section(sections_with(), "The comparison table as the reference project prints it")
    assert found.table is not None
    assert found.table.columns == ("Method", "MAE", "MSE", "MAD", "RMSE")
    assert found.table.rows == (
        ("Proposed VGG19 + attention", "16.28", "425.24", "13.59", "20.62"),
        ("AXNet", "7.70", "108.87", MISSING, MISSING),
        ("Deeplasia (state of the art)", MISSING, MISSING, "3.87", "7.67"),
    )


def test_the_corrected_table_gives_data_set_readers_and_status() -> None:
    own, axnet, rsna, dha, dysplasia = rows_of(section(sections_with(), "The same table, corrected"))
    assert (own["MAE"], own["n"], own["Readers"], own["Status"]) == ("16.2751", "1024", "1", "as-reported")
    assert own["Printed as MAD"].startswith("13.5901: unstated; below the MAE")
    assert (axnet["RMSE"], axnet["n"], axnet["Status"]) == ("10.43 (root of the MSE)", MISSING, "as-reported")
    assert (rsna["MAE"], rsna["RMSE"], rsna["n"], rsna["Readers"]) == ("3.87", "5.1", "200", "6")
    assert (dha["RMSE"], dha["n"]) == ("7.7", "1383")
    assert dysplasia["RMSE"] == "7.7"
    assert "Digital Hand Atlas" in dha["Data set"]


def test_three_notes_say_what_was_wrong() -> None:
    notes = section(sections_with(), "The same table, corrected").notes
    assert [note.split(".")[0] for note in notes] == [
        "MAD means two things",
        "Deeplasia's two printed figures are from different test sets",
        "There is no common protocol",
    ]
    assert all(figure in notes[0] for figure in ("3.87", "13.5901", "16.2751"))


def test_without_measured_rows_the_report_says_so() -> None:
    found = section(sections_with(), "Measured by this project")
    assert found.table is None
    assert found.paragraphs[0].startswith("Nothing has been measured yet")


def test_every_published_row_is_in_the_table_of_its_protocol_and_no_other() -> None:
    sections = sections_with()
    for protocol in {result.protocol for result in load_published()}:
        systems = sorted(row["System"] for row in rows_of(section(sections, f"Protocol {protocol}")))
        assert systems == sorted(result.system for result in load_published() if result.protocol == protocol)


def test_a_status_other_than_confirmed_is_shown() -> None:
    rows = {row["System"]: row for row in rows_of(section(sections_with(), "Protocol rsna-test-200"))}
    assert rows["BoNet+"]["Status"] == "secondary"
    assert rows["Constant prediction (training mean by sex)"]["Status"] == "computed"
    assert '<td class="unconfirmed">secondary</td>' in to_html(sections_with())


def test_a_range_is_printed_as_a_range_and_an_unknown_number_as_a_dash() -> None:
    rows = {row["System"]: row for row in rows_of(section(sections_with(), "Protocol rsna-test-200"))}
    human = rows["One human reader against the six-reader reference"]
    assert (human["MAE"], human["RMSE"], human["MSE"]) == ("4.8 to 7.0", MISSING, MISSING)


def test_cited_rows_get_no_place_and_stand_by_year() -> None:
    found = section(sections_with(), "Protocol rsna-test-200")
    rows = rows_of(found)
    assert "Place" not in rows[0]
    years = [int(row["Year"]) for row in rows if row["Year"] != MISSING]
    assert years == sorted(years)


def test_rows_on_splits_of_their_own_are_said_not_to_compare() -> None:
    found = section(sections_with(), "Protocol own-split")
    assert "Every row is on other images: do not compare them with one another." in found.paragraphs


def test_a_rank_is_printed_where_the_paired_tests_support_it() -> None:
    findings = findings_of(A=noise(30, 1), B=noise(4, 2))
    rows = [measured_row("A", 24.0), measured_row("B", 3.0), measured_row("C", 1.0, "rsna-test-200-integer")]
    sections = sections_with(*rows, findings=findings)
    ranks = {row["System"]: row["Rank"] for row in rows_of(section(sections, f"Protocol {DECIMAL.name}"))[:2]}
    assert ranks == {"B": "1", "A": "2"}
    alone = rows_of(section(sections, "Protocol rsna-test-200-integer"))
    assert [row["System"] for row in alone] == ["C"]
    assert "Rank" not in alone[0]
    (pair,) = rows_of(section(sections, f"Paired tests under {DECIMAL.name}"))
    assert (pair["Lower MAE"], pair["Other"], pair["Verdict"]) == ("B", "A", "B is better")


def test_systems_that_are_alike_get_no_rank_but_the_images_needed() -> None:
    findings = findings_of(A=noise(10, 1), B=noise(10, 2))
    sections = sections_with(measured_row("A", 8.0), measured_row("B", 8.1), findings=findings)
    ranks = {row["Rank"] for row in rows_of(section(sections, f"Protocol {DECIMAL.name}"))}
    assert ranks == {"none: not distinguishable at n = 200"}
    (pair,) = rows_of(section(sections, f"Paired tests under {DECIMAL.name}"))
    assert pair["Verdict"].startswith("not distinguishable at n = 200")
    assert int(pair["Images needed"].replace(",", "")) > 200


def test_without_the_paired_tests_there_is_no_rank_and_the_report_says_why() -> None:
    findings = dataclasses.replace(findings_of(A=noise(30, 1), B=noise(4, 2)), comparisons=())
    sections = sections_with(measured_row("A", 24.0), measured_row("B", 3.0), findings=findings)
    found = section(sections, f"Protocol {DECIMAL.name}")
    assert {row["Rank"] for row in rows_of(found)} == {MISSING}
    assert any("need the labels" in paragraph for paragraph in found.paragraphs)
    assert section(sections, f"Paired tests under {DECIMAL.name}").paragraphs[0].startswith("Not made")


def test_a_comparison_of_other_systems_gives_no_rank() -> None:
    findings = findings_of(A=noise(30, 1), B=noise(4, 2))
    more = dataclasses.replace(findings, runs=(*findings.runs, run_of("C", noise(5, 3))))
    rows = [measured_row(name, mae) for name, mae in (("A", 24.0), ("B", 3.0), ("C", 4.0))]
    found = section(sections_with(*rows, findings=more), f"Protocol {DECIMAL.name}")
    assert {row["Rank"] for row in rows_of(found)} == {MISSING}


def test_a_measured_row_without_verified_ground_truth_gets_no_rank() -> None:
    findings = findings_of(A=noise(30, 1), B=noise(4, 2))
    rows = [measured_row("B", 3.0), measured_row("A", 24.0), measured_row("C", 1.0, verified=False)]
    found = {
        row["System"]: row
        for row in rows_of(section(sections_with(*rows, findings=findings), f"Protocol {DECIMAL.name}"))
    }
    assert found["C"]["Rank"] == MISSING
    assert found["C"]["Note"] == "version of the ground truth not shown: no rank"
    assert found["B"]["Rank"] == "1"


def test_a_protocol_says_which_measured_systems_know_the_sex() -> None:
    findings = findings_of(A=noise(30, 1), B=noise(4, 2))
    rows = [measured_row("B", 3.0), measured_row("A", 24.0), measured_row("C", 1.0)]
    found = rows_of(section(sections_with(*rows, findings=findings), f"Protocol {DECIMAL.name}"))
    knows = {row["System"]: row["Knows the sex"] for row in found if row["System"] in ("A", "B", "C")}
    assert knows == {"A": "yes", "B": "no", "C": MISSING}


def test_a_system_that_has_seen_the_test_is_flagged_everywhere() -> None:
    seen = run_of("A", noise(4, 1), leakage="trained on rsna-training-12611")
    sections = sections_with(measured_row("A", 3.0), findings=Findings(runs=(seen,)))
    (row,) = rows_of(section(sections, "Measured by this project"))
    assert row["Leakage"] == "trained on rsna-training-12611"
    assert "Leakage: trained on rsna-training-12611" in section(sections, "System A").paragraphs[0]
    assert "leakage: trained on" in section(sections, "Ranking of measured systems").pictures[0].alt


def test_every_system_has_its_groups_limits_slopes_and_the_tested_claim() -> None:
    found = section(
        sections_with(measured_row("A", 3.0), findings=Findings(runs=(run_of("A", noise(9, 1)),))), "System A"
    )
    said = " ".join(found.paragraphs)
    for part in (
        "limits of agreement",
        "Regression to the mean",
        '"Equally good over the whole age range"',
        "no interval",
    ):
        assert part in said
    groups = [row["Group"] for row in rows_of(found)]
    assert groups[0] == "all"
    assert "48-72 months" in groups


def test_a_measured_row_is_shown_with_its_interval_and_its_hash() -> None:
    (row,) = rows_of(section(sections_with(measured_row("B", 9.0)), "Measured by this project"))
    assert (row["MAE"], row["R2"], row["Flip average"]) == ("9.00 [8.00, 10.00]", MISSING, "yes")
    assert row["Within 12 months"] == "50.0 % [40.0 %, 60.0 %]"
    assert row["Predictions (sha256)"] == digest_of("B")[:12] + "..."
    assert row["Checkpoint"] == "example/bone-age @ 0123456789ab"


class _Page(HTMLParser):
    """Collects what a screen reader or a browser without network would stumble over."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.resources: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self.scopes: list[str | None] = []
        self.captions = 0
        self.pictures: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in ("link", "script", "iframe", "object") or not (attributes.get("src") or "data:").startswith("data:"):
            self.resources.append(tag)
        if tag == "img":
            self.pictures.append(attributes.get("alt") or "")
        elif tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "th":
            self.scopes.append(attributes.get("scope"))
        if tag in ("h1", "h2", "h3"):
            self.headings.append(tag)
        self.captions += tag == "caption"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if any(tag in ("td", "th") for tag in self.open):
            self.tables[-1][-1][-1] += data


def parsed(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_needs_nothing_from_elsewhere() -> None:
    findings = findings_of(A=noise(30, 1), B=noise(4, 2))
    page = to_html(sections_with(measured_row("A", 24.0), measured_row("B", 3.0), findings=findings))
    assert parsed(page).resources == []
    assert not re.search(r"url\(|@import", page)
    assert [alt.split(" ")[0] for alt in parsed(page).pictures] == ["MAE", "MAE"]


def test_the_page_can_be_read_aloud() -> None:
    page = to_html(sections_with(measured_row("B", 9.0)))
    reader = parsed(page)
    assert '<html lang="en">' in page
    assert reader.headings.count("h1") == 1
    assert reader.headings[0] == "h1"
    assert reader.captions == len(reader.tables) > 5
    assert set(reader.scopes) == {"col", "row"}


def test_a_link_ends_before_the_punctuation_of_its_sentence() -> None:
    page = to_html([Section("Links", ("(A, https://doi.org/10.1/a.b), then https://doi.org/10.1/c-d.",))])
    assert re.findall(r'href="([^"]*)"', page) == ["https://doi.org/10.1/a.b", "https://doi.org/10.1/c-d"]


def test_every_picture_can_be_scrolled_on_a_narrow_screen_and_by_keyboard() -> None:
    page = to_html(sections_with(measured_row("A", 24.0), findings=findings_of(A=noise(30, 1), B=noise(4, 2))))
    figures = re.findall(r"<figure[^>]*>", page)
    assert len(figures) == 2
    assert all('class="scroll" role="region" tabindex="0" aria-label="Picture ' in figure for figure in figures)


def test_a_tall_section_is_printed_upright() -> None:
    page = to_html([Section("Wide"), Section("Tall", upright=True)])
    assert [found.split("<h")[0] for found in re.findall(r"<section.*\n<h\d", page)] == [
        "<section>\n",
        '<section class="upright">\n',
    ]


def test_the_page_and_the_markdown_hold_the_same_cells() -> None:
    sections = sections_with(measured_row("B|<b>", 9.0), measured_row("A", 12.0))
    tables = [found.table for found in sections if found.table is not None]
    expected = [[list(table.columns), *map(list, table.rows)] for table in tables]
    assert parsed(to_html(sections)).tables == expected
    lines = [line for line in to_markdown(sections).splitlines() if line.startswith("|") and "---" not in line]
    cells = [
        [cell.replace(r"\|", "|") for cell in re.split(r"(?<!\\) \| ", line.removeprefix("| ").removesuffix(" |"))]
        for line in lines
    ]
    assert cells == [row for table in expected for row in table]


def test_a_report_is_written_whole_and_the_same_again(tmp_path: Path) -> None:
    findings = findings_of(A=noise(30, 1), B=noise(4, 2))
    rows = [measured_row("A", 24.0), measured_row("B", 3.0)]
    first = write_report(tmp_path / "new" / "folder", measured=rows, findings=findings)
    names = ["report.md", "report.html", "report.csv", "ranking.svg", "age.svg", "manifest.json"]
    assert [path.name for path in first] == names
    second = write_report(tmp_path / "again", measured=rows, findings=findings)
    assert [path.read_bytes() for path in first[:-1]] == [path.read_bytes() for path in second[:-1]]
    check_report(tmp_path / "again")
    (tmp_path / "again" / "ranking.svg").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=r"ranking\.svg is not the one"):
        check_report(tmp_path / "again")


def test_a_report_replaces_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    findings = findings_of(A=noise(30, 1), B=noise(4, 2))
    write_report(tmp_path, measured=[measured_row("A", 24.0), measured_row("B", 3.0)], findings=findings)
    write_report(tmp_path, measured=())
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.html", "report.csv", "manifest.json"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="no report"):
        write_report(tmp_path / "other", measured=())
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_picture_that_no_report_wrote_is_left(tmp_path: Path) -> None:
    findings = findings_of(A=noise(30, 1), B=noise(4, 2))
    write_report(tmp_path, measured=[measured_row("A", 24.0), measured_row("B", 3.0)], findings=findings)
    (tmp_path / "mine.svg").write_text("", encoding="utf-8")
    write_report(tmp_path, measured=())
    assert {path.name for path in tmp_path.glob("*.svg")} == {"mine.svg"}


def test_results_of_another_command_are_not_overwritten_by_a_report(tmp_path: Path) -> None:
    write_report(tmp_path, measured=())
    (tmp_path / "manifest.json").write_text('{"run_key": "1"}', encoding="utf-8")
    with pytest.raises(InputError, match="results of another command"):
        write_report(tmp_path, measured=())


def test_a_system_that_was_trained_on_nothing_is_said_to_be() -> None:
    known = {None: "not known", (): "nothing", ("other: A", "other: B"): "other: A, other: B"}
    for trained_on, said in known.items():
        run = run_of("A", noise(4, 1))
        run = dataclasses.replace(run, metrics={**run.metrics, "trained_on": trained_on})
        found = section(sections_with(measured_row("A", 3.0), findings=Findings(runs=(run,))), "System A")
        assert f"Trained on: {said}. Leakage" in found.paragraphs[0]


def test_the_level_of_intervals_stands_beside_their_coverage() -> None:
    run = run_of("A", noise(4, 1))
    part = {"n": 9, "coverage": 0.8, "coverage_ci95": [0.7, 0.9], "mean_width_months": 20.0}
    interval = {"all": part, "by_predicted_tercile": {}, "by_reference_tercile": {}}
    system = {**run.manifest["system"], "interval": {"alpha": 0.1}}
    run = dataclasses.replace(run, metrics={**run.metrics, "interval": interval}, manifest={"system": system})
    found = section(sections_with(measured_row("A", 3.0), findings=Findings(runs=(run,))), "System A")
    assert "Its 90 % intervals hold the reference in 80.0 % [70.0, 90.0]" in " ".join(found.paragraphs)


def test_predictions_made_elsewhere_are_said_to_be_of_unknown_images() -> None:
    run = run_of("A", noise(4, 1))
    system = {**run.manifest["system"], "reads_images": False, "adapter": "PredictionsCsvSystem"}
    findings = Findings(runs=(dataclasses.replace(run, manifest={"system": system}),))
    sections = sections_with(measured_row("A", 3.0), findings=findings)
    assert "Which copies of the images" in " ".join(section(sections, "System A").paragraphs)
    assert "images seen: unknown" in section(sections, "Ranking of measured systems").pictures[0].alt
    (row,) = [row for row in rows_of(section(sections, f"Protocol {DECIMAL.name}")) if row["System"] == "A"]
    assert row["Note"] == "images seen: unknown"


def test_the_smallest_p_value_of_a_permutation_test_is_said_to_be_a_bound() -> None:
    assert permutation_p_text({"p_value": 1 / 2001, "permutations": 2000}) == (
        "<= 0.0005, the smallest that 2,000 permutations can give"
    )
    assert permutation_p_text({"p_value": 2 / 2001, "permutations": 2000}) == "= 0.0010"
    assert permutation_p_text({"p_value": 0.2}) == "= 0.2000"


def test_signs_and_words_are_explained_where_they_stand() -> None:
    sections = sections_with(measured_row("A", 3.0), findings=Findings(runs=(run_of("A", noise(9, 1)),)))
    assert "Flip average: predictions are means" in section(sections, "Measured by this project").paragraphs[0]
    assert "-/+ is half of the 95 % interval" in " ".join(section(sections, "System A").paragraphs)
    assert "(derived): converted to months" in " ".join(section(sections, "Protocol rsna-test-200").paragraphs)


def test_the_csv_has_all_rows_and_leaves_unknown_numbers_empty(tmp_path: Path) -> None:
    write_report(tmp_path, measured=[measured_row("B", 9.0)])
    with open(tmp_path / "report.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = {name: sum(row["table"] == name for row in rows) for name in ("as printed", "corrected", "protocol")}
    assert counts == {"as printed": 3, "corrected": 5, "protocol": len(load_published()) + 1}
    assert [row["mae_months"] for row in rows[:3]] == ["16.28", "7.70", ""]
    assert rows[-1]["status"] == "measured"
    assert float(rows[-1]["mae_months"]) == 9.0


def test_the_notes_follow_the_published_table() -> None:
    published = [
        dataclasses.replace(result, mad_months=result.mae_months, mae_months=result.mae_months)
        if result.system.startswith("VGG19+Attention")
        else result
        for result in load_published()
    ]
    notes = section(build_sections(load_reference_table(), published, ()), "The same table, corrected").notes
    assert "13.5901" not in notes[0]


@pytest.mark.parametrize("character", ["<", "&", '"'])
def test_text_of_a_table_cannot_become_markup(character: str) -> None:
    page = to_html(sections_with(measured_row(f"A{character}script", 9.0)))
    assert "<script" not in page
    assert any(f"A{character}script" in row for table in parsed(page).tables for row in table)


def test_a_long_name_in_a_picture_is_not_broken_within_a_word() -> None:
    assert _wrapped("boneage-hf vgg19-attention-sex", 10).split("\n") == ["boneage-hf", "vgg19-attention-", "sex"]
