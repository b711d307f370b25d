import dataclasses
import re

import pytest

from benchmarks.protocol import PROTOCOLS, Protocol, get_protocol
from boneage_hf.errors import InputError

FIELDS = {
    "name": "mine",
    "data_set": "D",
    "split": "test",
    "n": 3,
    "readers": 2,
    "ground_truth": "one reading",
    "ground_truth_fingerprint": None,
    "preprocessing_note": "none",
}


def test_a_protocol_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_protocol("rsna-test-200").n = 199  # type: ignore[misc]


def test_equal_fields_make_equal_protocols_and_another_ground_truth_makes_another() -> None:
    assert Protocol.from_dict(FIELDS) == Protocol.from_dict(FIELDS)
    assert Protocol.from_dict(FIELDS) != Protocol.from_dict(FIELDS | {"ground_truth": "two readings"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (FIELDS | {"reader": 2}, 'no field "reader"; did you mean "readers"?'),
        ({key: value for key, value in FIELDS.items() if key != "split"}, 'needs the field "split"'),
        (FIELDS | {"unit": "years"}, 'the unit is "years"; convert to "months"'),
        (FIELDS | {"n": 0}, "n is 0; give a positive number"),
        (FIELDS | {"ground_truth_fingerprint": "abc"}, "no sha256"),
        (FIELDS | {"name": ""}, "no name"),
    ],
)
def test_a_wrong_protocol_is_refused_with_its_cure(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Protocol.from_dict(fields)


def test_an_unknown_protocol_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r'did you mean "rsna-val-1425"\?'):
        get_protocol("rsna-val-1452")


def test_protocols_are_filed_under_their_own_name_and_all_differ() -> None:
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())
    assert len(set(PROTOCOLS.values())) == len(PROTOCOLS)


def test_the_two_ground_truth_files_of_the_rsna_test_set_are_two_protocols() -> None:
    decimal, integer = get_protocol("rsna-test-200-decimal"), get_protocol("rsna-test-200-integer")
    assert None not in (decimal.ground_truth_fingerprint, integer.ground_truth_fingerprint)
    assert decimal.ground_truth_fingerprint != integer.ground_truth_fingerprint
    assert get_protocol("rsna-test-200").ground_truth_fingerprint is None


def test_splits_that_authors_drew_alone_are_marked() -> None:
    assert [protocol.name for protocol in PROTOCOLS.values() if not protocol.same_images] == ["own-split"]
