"""A protocol over drawn hands, for tests of the benchmark."""

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.protocol import Protocol
from boneage_hf.data import read_manifest


def protocol_of(prepared: Path, **changes: object) -> Protocol:
    """The eight hands of the validation split as a test."""
    manifest = read_manifest(prepared)
    fields: dict[str, object] = {
        "name": "drawn-hands-8",
        "data_set": "drawn hands",
        "split": "validation",
        "n": 8,
        "readers": None,
        "ground_truth": "as drawn",
        "ground_truth_fingerprint": manifest["splits"]["validation"]["fingerprint"],
        "preprocessing_note": "none",
        "prepared_split": "validation",
    }
    return Protocol.from_dict(fields | changes)


def protocol_file(protocol: Protocol, folder: Path) -> Path:
    path = folder / "protocol.json"
    path.write_text(json.dumps(asdict(protocol)), encoding="utf-8")
    return path
