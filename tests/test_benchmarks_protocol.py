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
        (FIELDS | {"n": 0}, "n is 0; give a positive whole number"),
        (FIELDS | {"ground_truth_fingerprint": "abc"}, "no sha256"),
        (FIELDS | {"name": ""}, "no name"),
        (FIELDS | {"n": "1024"}, "n is '1024'; give a positive whole number"),
        (FIELDS | {"n": True}, "n is True; give a positive whole number"),
        (FIELDS | {"readers": 1.5}, "readers is 1.5; give a positive whole number"),
        (FIELDS | {"ground_truth_fingerprint": 5}, "no sha256"),
        (FIELDS | {"overlaps": None}, "must be a list of names"),
        (FIELDS | {"data_set": ["D"]}, "data_set must be a text"),
        (FIELDS | {"same_images": "yes"}, "same_images must be true or false"),
        (FIELDS | {"overlaps": ["rsna-traning-12611"]}, 'did you mean "rsna-training-12611"?'),
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
