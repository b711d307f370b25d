"""Many radiographs at once: files, folders and ZIP archives in, a row for each out, an answer or the reason why not.

One file is in memory at a time, archives are never unpacked to disk, and one bad file never stops the others. What is
wrong with a file is a sentence in its row; only a table that cannot be used at all is an error.
"""

import csv
import io
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Literal

from .clinical import assess
from .errors import InputError
from .pipeline_boneage import BoneAgePipeline
from .quality import RefusedError
from .radiograph import MAX_AGE_MONTHS, MAX_FILE_BYTES, Prefill, content_of, read_prefill
from .sex import SEXES, Sex

#: Most files in one archive: hours of reading on two cores, and more than a reader checks in one sitting.
MAX_MEMBERS = 2000

#: Most bytes of all files of an archive together, unpacked (8 GiB): 500 uncompressed 16-bit images of 8 million
#: pixels. They are unpacked one at a time; this bounds the time, not the memory.
MAX_TOTAL_BYTES = 8 * 1024**3

#: Most times that a file may shrink in an archive: a radiograph has noise and does not come near it, even uncompressed
#: and with a wide black background; deflate makes 1,032 of zeros.
MAX_RATIO = 200

#: Most bytes of the directory of an archive: 1 KiB for each file (46 bytes and its name). Python reads it whole.
MAX_DIRECTORY_BYTES = 1024 * MAX_MEMBERS

#: Most bytes of a table (4 MiB): 2,000 bytes for each file of the largest archive.
MAX_TABLE_BYTES = 4 * 1024**2

#: From this difference on (one month), the chronological ages of table and header contradict each other: rounding to
#: whole months and counting by days stay below it.
AGE_TOLERANCE_MONTHS = 1.0

#: Columns of a table, in any order and in capitals or not; the first is required.
TABLE_COLUMNS = ("file", "sex", "chronological_age_months")

ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")
#: What makes a spreadsheet take a cell for a formula, in both widths; tab and return are skipped over by some.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001

Source = str | os.PathLike[str] | tuple[str, bytes]


@dataclass(frozen=True)
class BatchItem:
    """One file to be answered.

    Attributes:
        file: its name without folders, with U+FFFD for what cannot be printed.
        place: its path as given or as in the archive; tells files of the same name apart.
        content: gives its bytes when its turn comes, or raises InputError.
    """

    file: str
    place: str = field(repr=False)
    content: Callable[[], bytes] = field(repr=False, compare=False)


@dataclass(frozen=True)
class TableRow:
    """What a table says about one file; `problem` says why it cannot be used, `warning` what of it is left out."""

    sex: Sex | None = None
    chronological_age_months: float | None = None
    problem: str | None = None
    warning: str | None = None


@dataclass(frozen=True)
class BatchRow:
    """Answer or reason for one file; None where something is not known. The fields are the columns of the CSV file.

    Attributes:
        file: its name; its path where several files of the batch have that name.
        bone_age_months: and the ends of its 90 % interval, where the checkpoint has one.
        sex_source: ``"table"``, ``"dicom"`` (the header) or ``"common"`` (given for all files).
        chronological_age_months: of the table or, without it, of the DICOM header.
        sds: standard deviation score as in `clinical.py`, those of the interval's ends, and `verdict`
            (``"delayed"``, ``"normal"``, ``"advanced"``, or None where that is not decided at this precision).
        quality: verdict of the quality gate, with its reasons in `quality_reasons`.
        corrections: what was put right of the image.
        warnings: sentences on what a person should check although there is an answer.
        problem: the sentence that says why there is no answer; None where there is one.
    """

    file: str
    bone_age_months: float | None = None
    interval_low_months: float | None = None
    interval_high_months: float | None = None
    sex: Sex | None = None
    sex_source: Literal["table", "dicom", "common"] | None = None
    chronological_age_months: float | None = None
    sds: float | None = None
    sds_low: float | None = None
    sds_high: float | None = None
    verdict: str | None = None
    quality: str | None = None
    quality_reasons: str | None = None
    corrections: str | None = None
    warnings: str | None = None
    problem: str | None = None


# --- files and archives -> items ------------------------------------------------------------------------------------


def collect(sources: Iterable[Source]) -> list[BatchItem]:
    """The files behind paths of files, folders and ZIP archives, and behind pairs (name, bytes) of files and archives.

    A folder stands for the files directly in it, in the order of their names; archives are known by their content.
    Hidden files, folders inside archives and ``__MACOSX`` are passed over. A file or an archive that is refused is an
    item too: its `content` raises InputError with the reason. Nothing is read yet but the directories of archives,
    which stay open as long as their items live.
    """
    return [item for source in sources for item in _items_of(source)]


def _items_of(source: Source) -> list[BatchItem]:
    if isinstance(source, tuple):
        name, content = source
        if content.startswith(ZIP_STARTS):
            return _items_of_archive(name, io.BytesIO(content), len(content))
        return [BatchItem(_base_name(name), name, partial(content_of, content))]
    path = os.fspath(source)
    if os.path.isdir(path):
        try:
            inside = sorted(entry.path for entry in os.scandir(path) if entry.is_file())
        except OSError:
            return [_refused(path, "The folder may not be read by this user: change its permissions.")]
        return [item for file in inside if not os.path.basename(file).startswith(".") for item in _items_of(file)]
    try:
        # Only a regular file is opened: a pipe would block.
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                is_archive = file.read(4).startswith(ZIP_STARTS)
            if is_archive:
                return _items_of_archive(path, open(path, "rb"), os.path.getsize(path))
    except (OSError, ValueError):
        pass  # `content_of` says what is wrong with it
    return [BatchItem(_base_name(path), path, partial(content_of, path))]


def _items_of_archive(name: str, stream: io.BufferedIOBase, size: int) -> list[BatchItem]:
    refusal = None
    try:
        refusal = _refusal_of_directory(stream, size)
        if refusal is None:
            archive = zipfile.ZipFile(stream)
            members = [member for member in archive.infolist() if not _is_passed_over(member)]
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error, EOFError):
        refusal = "The ZIP archive is damaged or truncated: copy it again from its source."
    if refusal is None:
        if not members:
            refusal = "The ZIP archive holds no file: put the radiographs into it."
        elif len(members) > MAX_MEMBERS:
            refusal = _too_many_members()
        elif sum(member.file_size for member in members) > MAX_TOTAL_BYTES:
            refusal = f"The ZIP archive unpacks to more than {MAX_TOTAL_BYTES // 1024**3} GiB: split it."
    if refusal is not None:
        stream.close()
        return [_refused(name, refusal)]
    seen: set[str] = set()
    items = []
    for member in members:
        reason = _refusal_of_member(member, seen)
        seen.add(member.filename)
        if reason is None:
            content = partial(_content_of_member, archive, member)
            items.append(BatchItem(_base_name(member.filename), member.filename, content))
        else:
            items.append(_refused(member.filename, reason))
    return items


def _refusal_of_directory(stream: io.BufferedIOBase, size: int) -> str | None:
    """Why the directory of an archive is not read; its end record is found in the way `zipfile` finds it."""
    stream.seek(max(0, size - 22 - 2**16))
    tail = stream.read(22 + 2**16)
    if tail[-22:].startswith(b"PK\x05\x06") and tail.endswith(b"\x00\x00"):
        start = len(tail) - 22
    else:
        start = tail.rfind(b"PK\x05\x06")
    if start < 0 or len(tail) - start < 22:
        return "The ZIP archive is damaged or truncated: copy it again from its source."
    if tail[max(0, start - 20) : start].startswith(b"PK\x06\x07"):  # ZIP64: its second record has the true sizes
        return (
            f"The ZIP archive has the form for more than 4 GiB or 65,535 files: split it into parts of {MAX_MEMBERS}."
        )
    (directory_bytes,) = struct.unpack_from("<I", tail, start + 12)
    return _too_many_members() if directory_bytes > MAX_DIRECTORY_BYTES else None


def _is_passed_over(member: zipfile.ZipInfo) -> bool:
    parts = re.split(r"[/\\]", member.filename)
    is_hidden = parts[-1].startswith(".") and parts[-1] != ".."
    return member.is_dir() or not parts[-1] or "__MACOSX" in parts or is_hidden


def _refusal_of_member(member: zipfile.ZipInfo, seen: set[str]) -> str | None:
    name = member.filename
    parts = re.split(r"[/\\]", name)
    kind = stat.S_IFMT(member.external_attr >> 16)
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in parts:
        return "The name in the archive points outside of it: pack the files by plain relative names."
    if name in seen:
        return "The archive holds this name twice, and which file is meant is not known: pack it once."
    if kind not in (0, stat.S_IFREG):
        return "This is a link or device in the archive, not a file: pack the radiograph itself."
    if member.flag_bits & 0x1:
        return "The file is encrypted in the archive: pack it without a password."
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "The file is compressed in a way that is not read: pack it as an ordinary ZIP archive (deflate)."
    if member.file_size > MAX_FILE_BYTES:
        return f"The file unpacks to more than {MAX_FILE_BYTES // 1024**2} MiB, more than any single radiograph needs."
    if member.file_size > MAX_RATIO * max(member.compress_size, 1):
        return f"The file unpacks to more than {MAX_RATIO} times its size, as no radiograph does: check what it is."
    return None


def _content_of_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        with archive.open(member) as file:
            content = file.read(MAX_FILE_BYTES + 1)
    # zipfile documents the first; the others come from damaged local headers and data.
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, EOFError, ValueError):
        raise InputError("The file is damaged in the archive: pack it again from its source.") from None
    except struct.error:
        raise InputError("The file is damaged in the archive: pack it again from its source.") from None
    if content.startswith(ZIP_STARTS):
        raise InputError("This is an archive inside an archive, which is not opened: give it by itself.")
    return content_of(content)


def _too_many_members() -> str:
    return f"The ZIP archive holds more than {MAX_MEMBERS:,} files: split it."


def _refused(name: str, reason: str) -> BatchItem:
    return BatchItem(_base_name(name), name, partial(_raise, reason))


def _raise(reason: str) -> bytes:
    raise InputError(reason)


def _base_name(name: str) -> str:
    return _printable(re.split(r"[/\\]", name.rstrip("/\\"))[-1][:255])


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in name)


# --- the table ------------------------------------------------------------------------------------------------------


def read_table(source: str | os.PathLike[str] | bytes) -> dict[str, TableRow]:
    """A CSV table with what is known about the children: file (as given to `collect`) -> row.

    The first line names the columns, in any order and in capitals or not: ``file`` (name or path), and ``sex``
    (``female`` or ``male``) or ``chronological_age_months`` (a number from 0 to MAX_AGE_MONTHS) or both; empty cells
    are not known, other columns are not looked at. UTF-8; separated by comma, semicolon or tab (there 96,5 is 96.5).

    Raises:
        InputError: it is not such a table. What is wrong with one row is in that row.
    """
    content = content_of(source)
    if len(content) > MAX_TABLE_BYTES:
        raise InputError(f"The table is larger than {MAX_TABLE_BYTES // 1024**2} MiB: keep only its three columns.")
    try:
        text = content.decode("utf-8-sig")
        first = text.split("\n", 1)[0]
        delimiter = max(",;\t", key=first.count)
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error):
        raise InputError("The table is not a CSV file in UTF-8: save it from the spreadsheet as CSV UTF-8.") from None
    header = [name.strip().lower() for name in lines[0]] if lines else []
    known = [name for name in header if name in TABLE_COLUMNS]
    if "file" not in known or len(known) < 2 or len(set(known)) < len(known):
        raise InputError(
            "The first line of the table must name the column file, and sex or chronological_age_months or both, once."
        )
    rows: dict[str, TableRow] = {}
    for line in lines[1:]:
        cells = {name: cell.strip() for name, cell in zip(header, line, strict=False)}
        name = cells.get("file", "")
        if not name:
            continue
        row = _table_row(cells.get("sex", ""), cells.get("chronological_age_months", ""))
        if name in rows and rows[name] != row:
            row = TableRow(problem="The table holds two different rows for this file: keep the right one.")
        rows[name] = row
    return rows


def _table_row(sex: str, age: str) -> TableRow:
    known: dict[str, Sex] = {name: name for name in SEXES}
    if sex and sex not in known:
        return TableRow(problem="The sex in the table must be exactly female or male: correct its cell.")
    row = TableRow(sex=known.get(sex))
    if not age:
        return row
    try:
        months = float(age.replace(",", "."))
    except ValueError:
        months = math.nan
    if not 0 <= months <= MAX_AGE_MONTHS:
        return replace(
            row, warning=f"The chronological age in the table is no number of months from 0 to {MAX_AGE_MONTHS:.0f}."
        )
    return replace(row, chronological_age_months=months)


# --- answers --------------------------------------------------------------------------------------------------------


def predict_batch(
    pipe: BoneAgePipeline,
    items: Sequence[BatchItem],
    *,
    table: Mapping[str, TableRow] | None = None,
    sex: Sex | None = None,
    flip_average: bool | None = None,
    check_quality: bool = True,
) -> Iterator[BatchRow]:
    """A row for each item, as soon as it is there, then one for each row of the table without a file.

    Sex is that of the table, else of the DICOM header, else ``sex`` for all; where none says it and the model needs
    it, the row says so. Where two of them differ, the first is used and the row carries a warning. A row of the table
    belongs to the file with its path or, if only one file has it, its name. Where several files share a name, their
    rows say the path, and where they share that too, a number.
    """
    table = table or {}
    count = Counter(item.file for item in items)
    places = Counter(item.place for item in items)
    used: set[str] = set()
    for item, shown in zip(items, _names_apart(items), strict=True):
        given, told = item.place if item.place in table else item.file, TableRow()
        if given in table:
            used.add(given)
            told = table[given]
            if places[item.place] > 1:
                told = TableRow(
                    problem="Several files have this path: rename them, or the table cannot tell them apart."
                )
            elif given != item.place and count[item.file] > 1:
                told = TableRow(problem=f"Several files have this name: give their paths in the table, here: {shown}")
        yield _answered(pipe, item, shown, told, sex, flip_average=flip_average, check_quality=check_quality)
    for name in table:
        if name not in used:
            yield BatchRow(_base_name(name), problem="The table names a file that was not given: check its spelling.")


def _names_apart(items: Sequence[BatchItem]) -> list[str]:
    """What the row of each item calls its file."""
    count = Counter(item.file for item in items)
    names = [item.file if count[item.file] == 1 else _printable(item.place) for item in items]
    count, seen = Counter(names), Counter[str]()
    for position, name in enumerate(names):
        if count[name] > 1:
            seen[name] += 1
            names[position] = f"{name} ({seen[name]})"
    return names


def _answered(
    pipe: BoneAgePipeline,
    item: BatchItem,
    shown: str,
    told: TableRow,
    common: Sex | None,
    *,
    flip_average: bool | None,
    check_quality: bool,
) -> BatchRow:
    row = BatchRow(shown)
    if told.problem is not None:
        return replace(row, problem=told.problem)
    try:
        content = item.content()
        header = read_prefill(content)
        row = _with_what_is_known(row, told, header, common)
        if row.sex is None and pipe.model.config.uses_sex:
            raise InputError("The child's sex is not known: give it in the table, or one for all files.")
        answer = pipe(content, sex=row.sex, flip_average=flip_average, check_quality=check_quality)
    except RefusedError as error:
        quality = error.quality
        return replace(row, problem=str(error), quality=quality.verdict, quality_reasons=" ".join(quality.reasons))
    except InputError as error:
        return replace(row, problem=str(error))
    interval = None if answer["interval_months"] is None else (*answer["interval_months"],)
    low, high = interval or (None, None)
    assessed = None
    if row.sex is not None:
        assessed = assess(
            bone_age_months=answer["bone_age_months"],
            interval_months=interval,
            sex=row.sex,
            chronological_age_months=row.chronological_age_months,
        )
    quality = answer["quality"]
    sds_low, sds_high = (assessed and assessed.sds_interval) or (None, None)
    return replace(
        row,
        bone_age_months=answer["bone_age_months"],
        interval_low_months=low,
        interval_high_months=high,
        sds=None if assessed is None else assessed.sds,
        sds_low=sds_low,
        sds_high=sds_high,
        verdict=None if assessed is None else assessed.verdict,
        quality=None if quality is None else quality.verdict,
        quality_reasons=None if quality is None else " ".join(quality.reasons) or None,
        corrections=None if quality is None else " ".join(quality.corrections) or None,
    )


def _with_what_is_known(row: BatchRow, told: TableRow, header: Prefill, common: Sex | None) -> BatchRow:
    warnings = [] if told.warning is None else [told.warning]
    stated: list[tuple[Literal["table", "dicom", "common"], Sex]] = []
    if told.sex is not None:
        stated.append(("table", told.sex))
    if header.sex is not None:
        stated.append(("dicom", header.sex))
    if common is not None:
        stated.append(("common", common))
    if told.sex is not None and header.sex not in (None, told.sex):
        warnings.append("The DICOM header says the other sex than the table: check which is right.")
    elif told.sex is None and header.sex is not None and common not in (None, header.sex):
        warnings.append("The DICOM header says the other sex than the one given for all files: check which is right.")
    elif told.sex is None and "sex" in header.unusable and common is not None:
        warnings.append("The DICOM header's sex is neither female nor male: the one for all files was taken.")
    age, header_age = told.chronological_age_months, header.chronological_age_months
    if age is None:
        age = header_age
        if "chronological age" in header.unusable:
            warnings.append("The DICOM header's dates give no possible chronological age: give it in the table.")
    elif header_age is not None and abs(age - header_age) > AGE_TOLERANCE_MONTHS:
        warnings.append("The DICOM header says another chronological age than the table: check which is right.")
    return replace(
        row,
        sex=stated[0][1] if stated else None,
        sex_source=stated[0][0] if stated else None,
        chronological_age_months=age,
        warnings=" ".join(warnings) or None,
    )


# --- rows -> CSV ----------------------------------------------------------------------------------------------------


def rows_to_csv(rows: Iterable[BatchRow], *, source: Mapping[str, str]) -> str:
    """The rows as a CSV table (RFC 4180): months to two decimals, empty where not known.

    A text that a spreadsheet would take for a formula gets an apostrophe in front.

    Args:
        source: of all answers, see `report.provenance`; a column each, so that it stays with every row.
    """
    names = [column.name for column in fields(BatchRow)]
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow([*names, *source])
    common = [_cell(text) for text in source.values()]
    writer.writerows([*(_cell(getattr(row, name)) for name in names), *common] for row in rows)
    return table.getvalue()


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(_FORMULA_STARTS) else value
    return f"{value:.2f}"
