"""Protocols: on which images and against which ground truth a number was obtained; numbers compare within one only."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boneage_hf.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A frozen description of a test; equal protocols are the condition for comparing numbers.

    Attributes:
        name: as in the column `protocol` of the result tables.
        data_set: whose radiographs.
        split: which of them.
        n: number of images, or None where sources do not say.
        readers: readings behind each reference age, or None where sources do not say.
        ground_truth: version of the reference ages, in words.
        ground_truth_fingerprint: sha256 of the lines `id,months` (`boneage_hf.splits.fingerprint`), or None where the
            version is not known; without it no two numbers can be shown to be against the same labels.
        unit: of the ages; always months.
        preprocessing_note: what is done to the images before a system sees them.
        same_images: False where the name covers test sets that each author drew alone.
        prepared_split: the split of a data set written by `boneage prepare` that holds these images, or None where
            none does; systems can be run only where there is one and the fingerprint is known.
        overlaps: names in `TRAINING_PARTS` that hold images of this test; another name would never be found in what a
            system has seen, which would then pass for clean.

    Raises:
        InputError: a field is of another type, or has a value that cannot be.
    """

    name: str
    data_set: str
    split: str
    n: int | None
    readers: int | None
    ground_truth: str
    ground_truth_fingerprint: str | None
    unit: str = "months"
    preprocessing_note: str
    same_images: bool = True
    prepared_split: str | None = None
    overlaps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            raise InputError("a protocol has no name; give it one.")
        for field in ("name", "data_set", "split", "ground_truth", "unit", "preprocessing_note"):
            if not isinstance(getattr(self, field), str):
                raise InputError(f"protocol {self.name}: {field} must be a text in quotes.")
        if not isinstance(self.same_images, bool):
            raise InputError(f"protocol {self.name}: same_images must be true or false.")
        if self.unit != "months":
            raise InputError(f'protocol {self.name}: the unit is "{self.unit}"; convert to "months".')
        for field, value in (("n", self.n), ("readers", self.readers)):
            # Python's True is the int 1.
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= 1):
                raise InputError(
                    f"protocol {self.name}: {field} is {value!r}; give a positive whole number, or None if unknown."
                )
        digest = self.ground_truth_fingerprint
        if digest is not None and not (isinstance(digest, str) and is_sha256(digest)):
            raise InputError(
                f"protocol {self.name}: ground_truth_fingerprint is no sha256; give 64 hex digits or None."
            )
        if self.prepared_split not in (None, "validation", "test"):
            raise InputError(
                f'protocol {self.name}: prepared_split is "{self.prepared_split}"; test on "test" or "validation".'
            )
        for part in self.overlaps:
            if part not in TRAINING_PARTS:
                hint = did_you_mean(part, TRAINING_PARTS)
                raise InputError(f'protocol {self.name}: overlaps names no training part with "{part}"; {hint}')

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Protocol":
        """Build a protocol from a mapping; an unknown or a missing field raises `InputError`."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise InputError(f'a protocol has no field "{name}"; {did_you_mean(name, known)}')
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in fields:
                raise InputError(f'a protocol needs the field "{field.name}"; say None where sources do not tell.')
        overlaps = fields.get("overlaps", ())
        if not isinstance(overlaps, (list, tuple)) or not all(isinstance(name, str) for name in overlaps):
            raise InputError("overlaps of a protocol must be a list of names of training parts.")
        return cls(**{**fields, "overlaps": tuple(overlaps)})


def is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}."


#: Parts of data sets that systems were trained on -> fingerprint of their labels (`boneage_hf.splits.fingerprint`).
TRAINING_PARTS: dict[str, str] = {
    "rsna-training-12611": "f1116d2570e549c22bb59b8e8f8348450c244c955e140948ed0446138b95a298",
    "rsna-reference-train-9458": "bfe85996c66c9d7137ae82cdc600de31ae85ad65db799c8df6542af45b3c384b",
    "rsna-validation-1425": "dfa784cdf29e62d97d3c18047cc2651124a4c286208675ff8d0ba9f59aed16bf",
}

_AS_CITED = "each system its own; see the source"
_AS_MEASURED = "as prepared for the run, whose manifest names the copies; then each system its own"
_SIX_READERS = "weighted mean of six readings"

#: Every protocol that a row may name.
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="reference-test-1024",
            data_set="RSNA 2017 Pediatric Bone Age Challenge, training set (12,611)",
            split="this project's test split: 1,024 images, kept apart from training and selection",
            n=1024,
            readers=1,
            ground_truth="one clinical reading",
            ground_truth_fingerprint="abb87207f300674f92502b6ea0646aa3212a13a59ce5afcc3d097f0a4d5f6176",
            preprocessing_note="JPEG copies of 299 x 299 px, the sides squashed, for every system; then each its own",
            prepared_split="test",
            overlaps=("rsna-training-12611",),
        ),
        Protocol(
            name="rsna-test-200-decimal",
            data_set="RSNA 2017 Pediatric Bone Age Challenge",
            split="test, ids 4360 to 4559",
            n=200,
            readers=6,
            ground_truth=f"{_SIX_READERS}, decimal file",
            ground_truth_fingerprint="6804a6b6e661fe7d64adc12b21a31f85ab10ba68bf5e077b826af419bf8f6441",
            preprocessing_note=_AS_MEASURED,
            prepared_split="test",
        ),
        Protocol(
            name="rsna-test-200-integer",
            data_set="RSNA 2017 Pediatric Bone Age Challenge",
            split="test, ids 4360 to 4559",
            n=200,
            readers=6,
            ground_truth=f"{_SIX_READERS}, integer file",
            ground_truth_fingerprint="44330955ea010ad681a2abc566f168e73066c9fecb6e1e71986c03eab864f043",
            preprocessing_note=_AS_MEASURED,
            prepared_split="test",
        ),
        Protocol(
            name="rsna-test-200",
            data_set="RSNA 2017 Pediatric Bone Age Challenge",
            split="test",
            n=200,
            readers=6,
            ground_truth=f"{_SIX_READERS}; the sources do not say which of the two files in circulation. The files "
            "differ by 2.78 months on average and by more than 6 in 19 of the 200 images, so a gap of that size "
            "between two rows may come from the file alone",
            ground_truth_fingerprint=None,
            preprocessing_note=_AS_CITED,
        ),
        Protocol(
            name="rsna-val-1425",
            data_set="RSNA 2017 Pediatric Bone Age Challenge",
            split="validation",
            n=1425,
            readers=1,
            ground_truth="one clinical reading",
            ground_truth_fingerprint="dfa784cdf29e62d97d3c18047cc2651124a4c286208675ff8d0ba9f59aed16bf",
            preprocessing_note=_AS_CITED,
            prepared_split="validation",
            overlaps=("rsna-validation-1425",),
        ),
        Protocol(
            name="own-split-1024",
            data_set="RSNA 2017 Pediatric Bone Age Challenge, training set",
            split="1,024 random images of the reference project's own validation part; their ids are not published",
            n=1024,
            readers=1,
            ground_truth="one clinical reading",
            ground_truth_fingerprint=None,
            preprocessing_note=_AS_CITED,
        ),
        Protocol(
            name="own-split",
            data_set="a part of a public data set that each author drew alone",
            split="another one in every row",
            n=None,
            readers=None,
            ground_truth="differs from row to row",
            ground_truth_fingerprint=None,
            preprocessing_note=_AS_CITED,
            same_images=False,
        ),
        Protocol(
            name="dha-1383",
            data_set="Digital Hand Atlas",
            split="1,383 images",
            n=1383,
            readers=2,
            ground_truth="two readings; version not stated",
            ground_truth_fingerprint=None,
            preprocessing_note=_AS_CITED,
        ),
        Protocol(
            name="dha-1202",
            data_set="Digital Hand Atlas",
            split="1,202 images",
            n=1202,
            readers=2,
            ground_truth="two readings; version not stated",
            ground_truth_fingerprint=None,
            preprocessing_note=_AS_CITED,
        ),
        Protocol(
            name="gdbd-702",
            data_set="GDBD, a cohort with skeletal dysplasias",
            split="702 images",
            n=702,
            readers=2,
            ground_truth="two readings; version not stated",
            ground_truth_fingerprint=None,
            preprocessing_note=_AS_CITED,
        ),
        Protocol(
            name="rhpe-test",
            data_set="Radiological Hand Pose Estimation (RHPE)",
            split="test",
            n=None,
            readers=None,
            ground_truth="version not stated",
            ground_truth_fingerprint=None,
            preprocessing_note=_AS_CITED,
        ),
    )
}


def read_protocol(name_or_file: str) -> Protocol:
    """A protocol by its name, or one of your own from a `.json` file with the fields of `Protocol`.

    Raises:
        InputError: the name is unknown, or the file cannot be read, misses a field, has an unknown one, or takes the
            name of a shipped protocol.
    """
    if not name_or_file.endswith(".json"):
        return get_protocol(name_or_file)
    try:
        fields = json.loads(Path(name_or_file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError("the protocol file cannot be read as JSON; write the fields of a protocol into it.") from None
    if not isinstance(fields, dict):
        raise InputError("the protocol file holds no table of fields; write the fields of a protocol into it.")
    protocol = Protocol.from_dict(fields)
    if protocol.name in PROTOCOLS and protocol != PROTOCOLS[protocol.name]:
        raise InputError(f'"{protocol.name}" is the name of another protocol; give yours a name of its own.')
    return protocol


def get_protocol(name: str) -> Protocol:
    """Look a protocol up; an unknown name raises `InputError` with the nearest known one."""
    if name not in PROTOCOLS:
        raise InputError(f'there is no protocol "{name}"; {did_you_mean(name, PROTOCOLS)}')
    return PROTOCOLS[name]
