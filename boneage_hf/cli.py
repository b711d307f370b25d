"""`boneage prepare | explore | train | fit-interval | evaluate | predict | explain | calibrate | ...`.

Arguments and printed lines only; each command imports what it needs when it runs, so that `boneage --help` is instant.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import InputError
from .recipes import add_training_arguments
from .sex import SEXES

if TYPE_CHECKING:
    from .own_table import TableColumns


def _prepare(options: argparse.Namespace) -> int:
    from . import data
    from .own_table import is_table

    settings: dict[str, Any] = {}  # those that were asked for
    if options.size is not None:
        settings["size"] = None if options.size == "original" else _positive_integer(options.size, "--size")
    if options.seed is not None:
        settings["seed"] = options.seed
    if options.phantom is not None:
        if options.out is not None:
            raise InputError("With --phantom there is no SOURCE: boneage prepare --phantom 200 OUT.")
        if settings.get("size", 1) is None or options.skip_bad or options.split not in (None, "reference"):
            raise InputError("--phantom takes a --size in px and neither --split nor --skip-bad.")
        report = data.prepare_phantoms(options.phantom, Path(options.source), **settings)
    elif options.out is None:
        raise InputError("boneage prepare needs SOURCE and OUT.")
    elif data.is_prepared_on_hub(options.source):
        rule = {} if options.split is None else {"split": options.split}
        report = data.copy_from_hub(options.source, options.out, settings | rule)
    elif data.is_hub_id(options.source) or is_table(options.source):
        if options.split not in (None, "reference"):
            raise InputError("A table of your own is split by the reference rule: leave out --split official.")
        columns = _table_columns(options)
        report = data.prepare_table(options.source, options.out, columns, skip_bad=options.skip_bad, **settings)
    else:
        rule = {} if options.split is None else {"split": options.split}
        report = data.prepare(options.source, options.out, skip_bad=options.skip_bad, **settings, **rule)
    print(report)
    return 0


def _table_columns(options: argparse.Namespace) -> "TableColumns":
    from .own_table import TableColumns, parse_sex_values

    if options.age_unit is None:
        raise InputError("Say what the table's ages are in: --age-unit months, or --age-unit years.")
    named = {
        "file": options.file_column,
        "sex": options.sex_column,
        "age": options.age_column,
        "id": options.id_column,
        "sex_values": None if options.sex_values is None else parse_sex_values(options.sex_values),
    }
    return TableColumns(options.age_unit, **{name: value for name, value in named.items() if value is not None})


def _explore(options: argparse.Namespace) -> int:
    from .explore import explore

    dataset = Path(options.dataset)
    for path in explore(dataset, Path(options.out) if options.out else dataset.with_name(f"{dataset.name}-plots")):
        print(path)
    return 0


def _train(options: argparse.Namespace) -> int:
    from .training import run_from_arguments

    return run_from_arguments(options)


def _evaluate(options: argparse.Namespace) -> int:
    from .evaluation import evaluate_checkpoint
    from .metrics import format_coverage, format_groups, format_metrics, format_over_age

    summary = evaluate_checkpoint(
        options.checkpoint,
        options.dataset,
        split=options.split,
        out=Path(options.out),
        batch_size=options.batch_size,
        flip_average=options.flip_average,
    )
    print(f"{summary['protocol']}, n = {summary['n']}, revision {summary['revision']}")
    print(format_metrics(summary["metrics"]))
    print("by sex and 24-month band of the reference age, months:")
    print(format_groups(summary["groups"]))
    print(format_over_age(summary))
    if summary["interval"] is not None:
        print("90 % interval, coverage of one clinical reading:")
        print(format_coverage(summary["interval"]))
    for name in (
        "metrics.json",
        "predictions.csv",
        "table.csv",
        "scatter.png",
        "bland_altman.png",
        "error_by_age.png",
    ):
        print(Path(options.out) / name)
    return 0


def _fit_interval(options: argparse.Namespace) -> int:
    from .calibrated_checkpoints import fit_interval_of_checkpoint

    fitted = fit_interval_of_checkpoint(
        options.checkpoint,
        options.dataset,
        Path(options.out),
        correct_age=options.correct_age,
        flip_average=options.flip_average,
        batch_size=options.batch_size,
    )
    print(fitted)
    print(options.out)
    return 0


def _fit_gate(options: argparse.Namespace) -> int:
    from .fitted_gate import fit_gate_of_checkpoint

    fitted = fit_gate_of_checkpoint(
        options.checkpoint, options.dataset, Path(options.out), images=options.images, batch_size=options.batch_size
    )
    print(fitted)
    print(options.out)
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from .calibrated_checkpoints import calibrate_checkpoint

    calibrated = calibrate_checkpoint(
        options.checkpoint,
        options.dataset,
        Path(options.out),
        split=options.split,
        flip_average=options.flip_average,
        batch_size=options.batch_size,
    )
    print(calibrated)
    print(options.out)
    return 0


def _predict(options: argparse.Namespace) -> int:
    if options.batch:
        return _predict_batch(options)
    if options.table is not None or options.out is not None:
        raise InputError("--table and --out belong to --batch: add --batch, or leave them out.")
    from .hub import checkpoint_revision, load_pipeline
    from .report import answer_as_json, answer_as_text, provenance, source_in_words
    from .service import model_name

    pipe = load_pipeline(options.checkpoint)
    if pipe.model.config.uses_sex and options.sex is None:
        raise InputError("This model needs the child's sex: add --sex female or --sex male.")
    source = provenance(model=model_name(pipe), revision=checkpoint_revision(pipe), day=date.today())
    failed = False
    for position, file in enumerate(options.files, start=1):
        try:
            answer = pipe(
                file, sex=options.sex, flip_average=options.flip_average, check_quality=options.check_quality
            )
        except InputError as error:
            failed = True
            print(f"error: file {position}: {error}", file=sys.stderr)
            continue
        quality = answer["quality"]
        if options.json:
            told = {"file": position, **answer_as_json(answer), **source}
            print(json.dumps(told | {"quality": quality.as_dict() if quality is not None else None}))
        else:
            print(f"file {position}: {answer_as_text(answer)}")
            for sentence in () if quality is None else (*quality.corrections, *quality.reasons):
                print(f"  {sentence}")
    if not options.json:
        del source["reference"]  # no answer here compares with it
        print(source_in_words(source), file=sys.stderr)
    return 2 if failed else 0


def _predict_batch(options: argparse.Namespace) -> int:
    if options.out is None or options.json:
        raise InputError("--batch needs --out ANSWERS.csv and takes no --json.")
    if Path(options.out).is_dir():
        raise InputError("--out is a folder: name the CSV file to write.")
    from tqdm import tqdm

    from .batch import collect, predict_batch, read_table, rows_to_csv
    from .files import write_text
    from .hub import checkpoint_revision, load_pipeline
    from .report import provenance, source_in_words
    from .service import model_name

    table = None if options.table is None else read_table(options.table)
    items = collect(options.files)
    if not items:
        raise InputError("The folder holds no file: name a folder, ZIP archive or files with radiographs.")
    pipe = load_pipeline(options.checkpoint)
    answers = predict_batch(
        pipe,
        items,
        table=table,
        sex=options.sex,
        flip_average=options.flip_average,
        check_quality=options.check_quality,
    )
    rows = list(tqdm(answers, total=len(items), unit="file", file=sys.stderr))
    source = provenance(model=model_name(pipe), revision=checkpoint_revision(pipe), day=date.today())
    write_text(Path(options.out), rows_to_csv(rows, source=source))
    failed = sum(row.problem is not None for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} answered: {options.out}")
    print(source_in_words(source), file=sys.stderr)
    return 1 if failed else 0


def _explain(options: argparse.Namespace) -> int:
    from .explain import explain_files
    from .hub import load_pipeline

    pipe = load_pipeline(options.checkpoint)
    pictures = explain_files(pipe, options.files, sex=options.sex, out=Path(options.out), grid=options.grid)
    for position, (path, low, high) in enumerate(pictures, start=1):
        print(f"file {position}: {path}  attention from {low:.2e} to {high:.2e}")
    return 0


def _summary(options: argparse.Namespace) -> int:
    from .summary import print_summary

    print(print_summary(options.checkpoint))
    return 0


def _card(options: argparse.Namespace) -> int:
    from .card import render_card
    from .files import write_text

    metrics, stress = (None if given is None else Path(given) for given in (options.metrics, options.stress))
    text = render_card(options.checkpoint, name=options.name, metrics_file=metrics, stress_folder=stress)
    write_text(Path(options.out), text)
    print(options.out)
    return 0


def _push_model(options: argparse.Namespace) -> int:
    from .publishing import push_model

    published = push_model(
        options.checkpoint,
        options.repo_id,
        metrics_file=None if options.metrics is None else Path(options.metrics),
        private=options.private,
        dry_run=options.dry_run,
        revision=options.revision,
        message=options.message,
    )
    print(published)
    return 0


def _push_dataset(options: argparse.Namespace) -> int:
    from .publishing import publication_terms, push_dataset

    terms = publication_terms(options.prepared) if options.public and options.accept_terms else None
    if terms is not None:
        print(terms)
    published = push_dataset(
        options.prepared,
        options.repo_id,
        public=options.public,
        accept_terms=options.accept_terms,
        dry_run=options.dry_run,
        revision=options.revision,
        message=options.message,
    )
    print(published)
    return 0


def _push_space(options: argparse.Namespace) -> int:
    from .publishing import push_space

    published = push_space(
        options.repo_id,
        model=options.model,
        private=options.private,
        dry_run=options.dry_run,
        message=options.message,
    )
    print(published)
    return 0


def _convert_lite0(options: argparse.Namespace) -> int:
    from .initial_weights import convert_lite0

    for key, value in convert_lite0(Path(options.out)).items():
        print(f"{key}: {value}")
    return 0


def _fold(options: argparse.Namespace) -> int:
    from .folding import fold_checkpoint

    print(fold_checkpoint(options.checkpoint, Path(options.out)))
    print(options.out)
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        import space_app
    except ModuleNotFoundError as error:
        if error.name != "space_app":
            raise
        raise InputError(
            "space_app.py is not installed beside the package; install the whole project again."
        ) from None
    return space_app.main(model=options.model, port=options.port, open_browser=options.open)


def _positive_integer(text: str, name: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"{name} takes a whole number above 0, not {text!r}.")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="boneage",
        description="Bone age in months from a child's hand radiograph. Research use, not a medical device.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    def add_flip(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--flip-average",
            action=argparse.BooleanOptionalAction,
            help="average with the mirrored image (default: as the checkpoint says)",
        )

    prepare = add("prepare", _prepare, "RSNA files -> a data set in parquet with a data card")
    prepare.add_argument(
        "source",
        help="folder in the layout of the challenge, a CSV or parquet table of your own, or the Hub id of a data set "
        "(with --phantom: the folder to write)",
    )
    prepare.add_argument("out", nargs="?", help="folder to write")
    prepare.add_argument("--size", help='largest side of the stored images in px, or "original" (default: 512)')
    prepare.add_argument("--split", choices=("reference", "official"), help="rule of the split (default: reference)")
    prepare.add_argument("--seed", type=int, help="of the reference split (default: 2017)")
    prepare.add_argument("--skip-bad", action="store_true", help="leave out and record unusable images")
    prepare.add_argument("--phantom", type=int, metavar="N", help="N drawn hands instead of a SOURCE")
    own = prepare.add_argument_group("a table of your own, or a data set of the Hub that was not prepared")
    own.add_argument("--file-column", metavar="NAME", help="paths, or images inside the table (default: file)")
    own.add_argument("--sex-column", metavar="NAME", help="default: sex")
    own.add_argument("--age-column", metavar="NAME", help="bone age (default: bone_age_months)")
    own.add_argument("--id-column", metavar="NAME", help="ids to keep, which name no person (default: row numbers)")
    own.add_argument("--age-unit", choices=("months", "years"), help="of the age column; required")
    own.add_argument("--sex-values", metavar="M=male,F=female", help="codes of the sex column (default: the words)")

    explore = add("explore", _explore, "plots of a prepared data set and a contact sheet of the augmentation")
    explore.add_argument("dataset")
    explore.add_argument("out", nargs="?", help="folder for the pictures (default: DATASET-plots)")

    train = add("train", _train, "train a recipe; resumable")
    add_training_arguments(train)

    evaluate = add("evaluate", _evaluate, "predictions and error measures of a checkpoint on a split")
    evaluate.add_argument("checkpoint", help='folder, Hub id, or "default"')
    evaluate.add_argument("dataset")
    evaluate.add_argument(
        "--split", required=True, choices=("train", "validation", "selection", "calibration", "test")
    )
    evaluate.add_argument("--out", required=True, help="folder for predictions.csv, table.csv and metrics.json")
    evaluate.add_argument("--batch-size", type=int, default=32)
    add_flip(evaluate)

    fit_interval = add(
        "fit-interval", _fit_interval, "a 90 %% interval for a trained checkpoint, from the calibration half"
    )
    fit_interval.add_argument("checkpoint", help='folder, Hub id, or "default"')
    fit_interval.add_argument("dataset", help="folder written by `boneage prepare`, the one of the training")
    fit_interval.add_argument("out", help="folder of the new checkpoint")
    fit_interval.add_argument(
        "--correct-age",
        action="store_true",
        help="also fit a monotone correction over age on the selection half; kept only if it wins by cross-validation",
    )
    add_flip(fit_interval)
    fit_interval.add_argument("--batch-size", type=int, default=32)

    fit_gate = add("fit-gate", _fit_gate, "the quality gate of a trained checkpoint: is it one hand, how does it lie")
    fit_gate.add_argument("checkpoint", help='folder, Hub id, or "default"')
    fit_gate.add_argument("dataset", help="folder written by `boneage prepare`, the one of the training")
    fit_gate.add_argument("out", help="folder of the new checkpoint")
    fit_gate.add_argument(
        "--images", type=int, default=3000, help="upright, and as many changed training images (default: %(default)s)"
    )
    fit_gate.add_argument("--batch-size", type=int, default=32)

    calibrate = add("calibrate", _calibrate, "offsets, slope and interval from 50 or more of your own labelled images")
    calibrate.add_argument("checkpoint", help='folder, Hub id, or "default"')
    calibrate.add_argument("dataset", help="folder written by `boneage prepare` from your own images")
    calibrate.add_argument("out", help="folder of the new checkpoint")
    calibrate.add_argument(
        "--split",
        choices=("train", "validation", "selection", "calibration", "test"),
        help="part of the data set to use (default: all of its images)",
    )
    add_flip(calibrate)
    calibrate.add_argument("--batch-size", type=int, default=32)

    predict = add("predict", _predict, "bone age of radiographs: PNG, JPEG, TIFF or DICOM")
    predict.add_argument("checkpoint", help='folder, Hub id, or "default"')
    predict.add_argument("files", nargs="+", metavar="FILE", help="with --batch also folders and ZIP archives")
    predict.add_argument("--sex", choices=SEXES, help="of the children; required by a model that uses sex")
    predict.add_argument(
        "--batch",
        action="store_true",
        help="a row for each file in --out; sex of --table, else of the DICOM file, else --sex; code 1 if some fail",
    )
    predict.add_argument(
        "--table", metavar="CSV", help="with --batch: columns file, sex (female or male), chronological_age_months"
    )
    predict.add_argument("--out", metavar="CSV", help="with --batch: the file to write")
    add_flip(predict)
    predict.add_argument(
        "--no-quality-check", dest="check_quality", action="store_false", help="answer whatever the picture shows"
    )
    predict.add_argument("--json", action="store_true", help="one JSON object per line")

    explain = add("explain", _explain, "attention map over the radiograph, as PNG")
    explain.add_argument("checkpoint", help='folder, Hub id, or "default"')
    explain.add_argument("files", nargs="+", metavar="FILE")
    explain.add_argument("--sex", choices=SEXES, help="of the children; required by a model that uses sex")
    explain.add_argument("--out", required=True, help="folder for the pictures")
    explain.add_argument("--grid", type=int, metavar="N", help="one figure of the first N radiographs instead")

    summary = add("summary", _summary, "layer table of a model with its values")
    summary.add_argument("checkpoint", nargs="?", help="folder, Hub id or default; without it the reference network")

    card = add("card", _card, "the model card of a checkpoint, filled from its config and its measured error")
    card.add_argument("checkpoint", help='folder, Hub id, or "default"')
    card.add_argument("--name", required=True, help="what a user types to load the checkpoint")
    card.add_argument("--metrics", help="metrics.json of `boneage evaluate`; without it the card says: not measured")
    card.add_argument(
        "--stress", help="result folder of `boneage-benchmark stress`: what changed images do to the error"
    )
    card.add_argument("--out", required=True, help="the file to write, usually README.md or model_card.md")

    convert = add("convert-lite0", _convert_lite0, "ImageNet weights of EfficientNet-Lite0 -> safetensors")
    convert.add_argument("out", help="the .safetensors file to write")

    fold = add("fold", _fold, "a checkpoint with vgg19_bn -> the same network as plain vgg19")
    fold.add_argument("checkpoint", help="folder or Hub id")
    fold.add_argument("out", help="folder of the new checkpoint")

    push = commands.add_parser("push", help="publish a checkpoint, data set or Space on the Hub, as one commit")
    kinds = push.add_subparsers(dest="what", required=True, metavar="WHAT")
    for what, run_push, text in (
        ("model", _push_model, "a checkpoint with code, card, licence and results"),
        ("dataset", _push_dataset, "a prepared data set; private unless --public"),
        ("space", _push_space, "the Space, with the model inside or by its id"),
    ):
        kind = kinds.add_parser(what, help=text, description=text)
        kind.set_defaults(run=run_push)
        if what == "model":
            kind.add_argument("checkpoint", help='folder, Hub id, or "default"')
        elif what == "dataset":
            kind.add_argument("prepared", help="folder written by `boneage prepare`")
        kind.add_argument("repo_id", metavar="OWNER/NAME", help="made if it is not there")
        if what == "model":
            kind.add_argument(
                "--metrics", help="metrics.json of `boneage evaluate` (default: the one beside the weights)"
            )
        elif what == "space":
            kind.add_argument("--model", required=True, help="Hub id, pinned at its revision; or the word inside")
        if what == "dataset":
            kind.add_argument("--public", action="store_true", help="let everyone see it")
            kind.add_argument("--accept-terms", action="store_true", help="the terms of the images are met")
        else:
            kind.add_argument("--private", action="store_true", help="only for you (default: public)")
        if what != "space":
            kind.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
        kind.add_argument("--message", help="of the commit")
        kind.add_argument("--dry-run", action="store_true", help="list files and sizes, send nothing")

    demo = add("demo", _demo, "open the Space")
    demo.add_argument("--model", default="default", help="folder, Hub id, or default")
    demo.add_argument("--port", type=int, default=7860)
    demo.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one sentence on stderr and exit code 2."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that cannot be written, a full disk; names of files stay out of it
        reason = error.strerror or "reading or writing failed"
        print(f"error: {reason}: check the folder that is written to and the room on its disk.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; a training goes on with --resume.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
