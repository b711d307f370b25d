import csv
import re
from decimal import Decimal
from pathlib import Path

import pytest

from benchmarks.registry import COLUMNS, PUBLISHED, find, load_published, load_reference_table, squares_to
from boneage_hf.errors import InputError


def write_changed(folder: Path, system: str, protocol: str, changes: dict[str, str]) -> Path:
    """A copy of the published table in which one row is changed."""
    with open(PUBLISHED / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    matching = [row for row in rows if (row["system"], row["protocol"]) == (system, protocol)]
    assert len(matching) == 1
    matching[0].update(changes)
    path = folder / "results.csv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_published_table_is_in_order() -> None:
    results = load_published()
    assert len(results) == 26
    assert len({result.system for result in results}) == 20


def test_numbers_keep_the_digits_of_their_source_and_unknown_ones_stay_unknown() -> None:
    row = find(load_published(), "VGG19+Attention (reference project)", "own-split-1024")
    assert (str(row.mae_months), str(row.rmse_months), str(row.mse_months)) == ("16.2751", "20.6213", "425.24")
    assert str(row.mad_months) == "13.5901"
    assert find(load_published(), "AXNet", "own-split").rmse_months is None


def test_deeplasia_has_its_two_errors_on_different_test_sets() -> None:
    results = load_published()
    rsna = find(results, "Deeplasia", "rsna-test-200")
    assert (rsna.mae_months, rsna.rmse_months) == (Decimal("3.87"), Decimal("5.1"))
    assert find(results, "Deeplasia", "dha-1383").rmse_months == Decimal("7.7")
    assert find(results, "Deeplasia", "gdbd-702").rmse_months == Decimal("7.7")


def test_numbers_that_no_source_prints_in_months_are_marked_as_derived() -> None:
    derived = {result.system for result in load_published() if result.kind == "derived"}
    assert derived == {"BoneXpert v3", "Constant prediction (training mean by sex)"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"citation": ""}, "has no citation; every number needs a source"),
        ({"rmse_months": "3.5"}, "the MAE 3.87 is above the RMSE 3.5"),
        ({"mse_months": "58.8"}, "the MSE 58.8 is not the square of the RMSE 5.1"),
        ({"rmse_months": "", "mse_months": "14.0"}, "the MAE 3.87 is above the root of the MSE 14.0"),
        ({"mad_meaning": ""}, "MAD means two things"),
        ({"mad_months": "", "mad_meaning": "median"}, "MAD means two things"),
        ({"mad_months": "3.9"}, "the MAD 3.9 is said to be the MAE, which is 3.87"),
        ({"status": "sure"}, 'status is "sure"; it must be one of confirmed'),
        ({"kind": "guessed"}, 'kind is "guessed"'),
        ({"uses_sex": "maybe"}, 'uses_sex is "maybe"'),
        ({"protocol": "rsna-test-20"}, 'did you mean "rsna-test-200"?'),
        ({"n": "199"}, "n is 199, its protocol says 200"),
        ({"raters": "1"}, "raters is 1, its protocol says 6"),
        ({"n": "-5"}, 'n is "-5"; give a whole number'),
        ({"mae_months": "3,87"}, 'mae_months is "3,87"; give a number'),
        ({"mae_months": "nan"}, 'mae_months is "nan"; give a number'),
        ({"mae_low_months": "3.0"}, "the range of the MAE has one end only"),
        ({"mae_low_months": "4.0", "mae_high_months": "5.0"}, "the range of the MAE, 4.0 to 5.0, does not fit"),
        ({"doi": "https://doi.org/10.1007/x"}, "it must begin with 10."),
        ({"mae_months": "", "rmse_months": "", "mad_months": "", "mad_meaning": ""}, "has no number"),
        ({"protocol": "dha-1383", "n": "1383", "raters": "2"}, "line 5 (Deeplasia, dha-1383): repeats line 4"),
    ],
)
def test_a_broken_row_is_refused_by_name(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    path = write_changed(tmp_path, "Deeplasia", "rsna-test-200", changes)
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        load_published(path)
    assert re.match(r"results\.csv line [45] \(Deeplasia, ", str(refused.value))


def test_a_table_with_a_missing_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("system,year\nA,2020\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"missing or unknown: ci, citation"):
        load_published(path)


def test_an_unquoted_comma_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(",".join(COLUMNS) + "\n" + "A," + "," * len(COLUMNS) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 2 \(A\): has 22 cells, not 20; quote texts"):
        load_published(path)


def test_a_table_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"results\.csv cannot be read"):
        load_published(tmp_path / "results.csv")


@pytest.mark.parametrize(
    ("rmse", "mse", "fits"),
    [
        ("17.35", "301.0", True),
        ("20.6213", "425.24", True),
        ("20.6213", "425.25", False),
        ("5.1", "26", True),
        ("5.1", "27", True),  # 5.148 squared is 26.502
        ("5.1", "28", False),
    ],
)
def test_rmse_and_mse_agree_within_what_rounding_hides(rmse: str, mse: str, fits: bool) -> None:
    assert squares_to(Decimal(rmse), Decimal(mse)) is fits


def test_an_unknown_system_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r'did you mean "Deeplasia"\?'):
        find(load_published(), "Deeplasie", "rsna-test-200")


def test_a_system_without_a_result_under_a_protocol_is_refused_with_those_it_has() -> None:
    with pytest.raises(InputError, match="it has dha-1383, gdbd-702, rsna-test-200"):
        find(load_published(), "Deeplasia", "rsna-val-1425")


def test_the_printed_table_agrees_with_the_published_rows_it_rounds() -> None:
    printed = {row.method: row for row in load_reference_table()}
    own = find(load_published(), "VGG19+Attention (reference project)", "own-split-1024")
    assert None not in (own.mae_months, own.rmse_months, own.mad_months)
    for text, number in (
        (printed["Proposed VGG19 + attention"].mae, own.mae_months),
        (printed["Proposed VGG19 + attention"].rmse, own.rmse_months),
        (printed["Proposed VGG19 + attention"].mad, own.mad_months),
    ):
        assert number is not None
        assert Decimal(text) == round(number, 2)
