"""`boneage-benchmark`: run a system, compare results, write the report, check the tables, add a measured row."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from boneage_hf.errors import InputError
from boneage_hf.memory import keep_freed_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 is success, 2 is a mistake of the user, told in one sentence."""
    arguments = _parser().parse_args(argv)
    try:
        message: str = arguments.run(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = error.strerror or "reading or writing failed"
        print(f"error: {reason}: check the folder that is written to and the room on its disk.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was finished is kept by the commands that go on where they stopped.", file=sys.stderr)
        return 130
    print(message)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="boneage-benchmark", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    report = commands.add_parser("report", help="write report.md, report.html, report.csv and the pictures")
    report.add_argument("results", type=Path, nargs="*", metavar="RESULT", help="folders beside those of the package")
    report.add_argument("--data", type=Path, metavar="PREPARED", help="make the paired tests that no folder holds")
    report.add_argument(
        "--out", type=Path, default=Path("benchmark-report"), metavar="DIR", help="default: %(default)s"
    )
    report.set_defaults(run=_report)

    checkpoints = commands.add_parser("checkpoints", help="the table of the shipped checkpoints, as README.md has it")
    checkpoints.add_argument("--write", type=Path, metavar="README", help="put it into this file, between its marks")
    checkpoints.set_defaults(run=_checkpoints)

    run = commands.add_parser("run", help="predict the images of a protocol with one system and measure it")
    run.add_argument(
        "--system",
        required=True,
        metavar="KIND[:ARG]",
        help="checkpoint[:FOLDER|HUB_ID], transformers-remote[:HUB_ID[@REVISION]], predictions-csv:FILE, "
        "deeplasia-service[:URL], constant",
    )
    run.add_argument("--protocol", required=True, metavar="NAME", help="see `protocols`; or a .json file of your own")
    run.add_argument("--data", type=Path, required=True, metavar="PREPARED", help="folder of `boneage prepare`")
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="result folder; a stopped run goes on")
    run.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    run.add_argument(
        "--flip-average",
        action=argparse.BooleanOptionalAction,
        help="checkpoint: average an image and its mirror image (default: as the checkpoint says)",
    )
    run.add_argument("--device", help="such as cuda:0; by default the first accelerator, or else the CPU")
    run.add_argument(
        "--trained-on",
        action="append",
        metavar="PART",
        help="predictions-csv, transformers-remote: what the system has seen: a part of RSNA, or "
        '"other: NAME"; may be repeated',
    )
    run.add_argument("--trust-remote-code", action="store_true", help="transformers-remote: run the model's own code")
    run.add_argument("--crop-model", metavar="HUB_ID", help="transformers-remote (default: HUB_ID-crop)")
    run.add_argument("--no-histogram-matching", action="store_true", help="transformers-remote: another system")
    run.add_argument("--unit", choices=("months", "years"), default="months", help="predictions-csv")
    run.add_argument("--id-column", default="id", help="predictions-csv (default: %(default)s)")
    run.add_argument("--prediction-column", default="predicted_months", help="predictions-csv (default: %(default)s)")
    run.add_argument("--truth-column", help="predictions-csv: is held against the labels of the protocol")
    run.set_defaults(run=_run)

    compare = commands.add_parser("compare", help="test systems against each other on the same images")
    compare.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="result folders, two or more")
    compare.add_argument("--data", type=Path, required=True, metavar="PREPARED", help="folder of `boneage prepare`")
    compare.add_argument("--out", type=Path, metavar="DIR", help="gets comparison.csv and manifest.json, for `report`")
    compare.set_defaults(run=_compare)

    check = commands.add_parser("check", help="check every table and result folder")
    check.add_argument("results", type=Path, nargs="*", metavar="RESULT", help="default: all of the package")
    check.add_argument("--data", type=Path, metavar="PREPARED", help="also measure the predictions again")
    check.set_defaults(run=_check)

    add = commands.add_parser("add", help="take a metrics.json of `boneage evaluate` over into the measured rows")
    add.add_argument("metrics_json", type=Path, metavar="METRICS_JSON")
    add.add_argument(
        "--system", metavar="NAME", help="under which reports show it (default: as in the row it replaces)"
    )
    add.add_argument("--checkpoint", metavar="NAME", help="public name, where metrics.json holds another")
    add.add_argument("--protocol", metavar="NAME", help="where metrics.json names none that is known here")
    add.set_defaults(run=_add)

    protocols = commands.add_parser("protocols", help="list the protocols that a row may name")
    protocols.set_defaults(run=_protocols)

    speed = commands.add_parser("speed", help="how long a checkpoint or the training loop takes on this machine")
    speed.add_argument("checkpoint", nargs="*", help='folders, Hub ids, or "default"; with --out')
    speed.add_argument("--out", type=Path, metavar="DIR", help="gets a table and manifest.json")
    speed.add_argument("--repeats", type=int, default=20, help="timed calls of each kind (default: %(default)s)")
    speed.add_argument("--no-peers", action="store_true", help="leave out the networks of peers")
    speed.add_argument("--training", action="store_true", help="of the training loop, by image source")
    speed.add_argument("--recipe", default="finetune", help="name or .json file (default: %(default)s)")
    speed.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the recipe"
    )
    speed.add_argument("--steps", type=int, default=20, help="timed steps (default: %(default)s)")
    speed.add_argument("--mixed-precision", choices=("no", "bf16"), default="bf16")
    speed.set_defaults(run=_speed)

    load = commands.add_parser("load", help="latencies, errors and memory of the Space with many clients")
    load.add_argument("checkpoint", nargs="?", default="default", help="of the Space that is opened for it")
    load.add_argument("--url", help="ask this open Space instead")
    load.add_argument("--clients", type=int, default=20, metavar="N", help="default: %(default)s; 1: one by one")
    load.add_argument("--minutes", type=float, default=5.0, metavar="M", help="default: %(default)s")
    load.add_argument("--requests", type=int, metavar="N", help="of each client, instead of --minutes")
    load.set_defaults(run=_load)

    polarity = commands.add_parser("polarity", help="check the polarity rule on a prepared data set")
    polarity.add_argument("dataset", type=Path)
    polarity.add_argument("--split", default="validation", help="default: %(default)s")
    polarity.add_argument(
        "--sheets", type=Path, metavar="DIR", help="contact sheets of 300 radiographs to judge by eye"
    )
    polarity.set_defaults(run=_polarity)

    copies = commands.add_parser("copies", help="predictions for originals against those for their 299 px copies")
    copies.add_argument("checkpoint", help='folder, Hub id, or "default"')
    copies.add_argument("challenge", type=Path, help="folder in the layout of the challenge, with the copies")
    copies.add_argument("originals", type=Path, help="folder of ID.png")
    copies.set_defaults(run=_copies)

    stress = commands.add_parser(
        "stress", help="predictions for images that are turned, darkened, marked, coarser, ..."
    )
    stress.add_argument("--split", default="test", help="default: %(default)s")
    stress.add_argument("--limit", type=int, metavar="N", help="only N images of the split, evenly spaced")
    stress.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    stress.set_defaults(run=_stress)

    attention = commands.add_parser("attention", help="energy of the attention map inside the bones' boxes")
    attention.add_argument(
        "--boxes", default="builtin", metavar="CSV", help="table of boxes, or builtin: those of Koitka et al. 2018"
    )
    attention.set_defaults(run=_attention)

    gate = commands.add_parser("gate", help="how often the quality gate refuses hands and what is no hand")
    gate.add_argument("--split", default="test", help="default: %(default)s")
    gate.add_argument(
        "--changed", type=int, default=256, metavar="N", help="hands turned, mirrored, cut off (default: %(default)s)"
    )
    gate.set_defaults(run=_gate)

    ablations = commands.add_parser(
        "ablations", help="train arms that differ from a base arm in one choice each; hours, goes on where it stopped"
    )
    ablations.add_argument("dataset", help="folder written by `boneage prepare`, or the Hub id of one")
    ablations.add_argument(
        "--initial-weights", required=True, metavar="FILE", help="ImageNet weights made by `boneage convert-lite0`"
    )
    ablations.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets ablations.csv and predictions")
    ablations.add_argument("--arms", nargs="+", metavar="NAME", help="only these, and the base arm (default: all)")
    ablations.add_argument(
        "--seeds", type=int, choices=(1, 2), help="default: 1, and 2 where an arm is within 0.3 month of the base arm"
    )
    ablations.add_argument("--mixed-precision", choices=("no", "bf16"), default="bf16")
    ablations.set_defaults(run=_ablations)

    for command in (stress, attention, gate):
        command.add_argument("checkpoint", help='folder, Hub id, or "default"')
        command.add_argument("dataset", type=Path, metavar="PREPARED", help="folder written by `boneage prepare`")
        command.add_argument("--out", type=Path, required=True, metavar="DIR")

    # These read or write the measured rows; an installed package may not be the place for them.
    for command in (report, check, add):
        command.add_argument(
            "--measured", type=Path, metavar="CSV", help="default: results/measured.csv of the package"
        )
    return parser


def _report(arguments: argparse.Namespace) -> str:
    from .findings import load_findings
    from .measured import load_measured
    from .report import write_report
    from .results_folder import result_folders

    # Rows of another table than the package's have their folders elsewhere.
    folders = [*(result_folders() if arguments.measured is None else []), *arguments.results]
    findings = load_findings(folders, data=arguments.data)
    try:
        files = write_report(arguments.out, measured=load_measured(arguments.measured), findings=findings)
    except OSError as error:
        raise InputError(f"the report cannot be written ({error.strerror}); give another folder with --out.") from None
    return "\n".join(f"wrote {file}" for file in files)


def _run(arguments: argparse.Namespace) -> str:
    from boneage_hf.metrics import format_metrics, permutation_p_text

    from .protocol import read_protocol
    from .run import choose_device, run_system
    from .systems import SystemOptions, build_system
    from .systems.base import check_trained_on

    protocol = read_protocol(arguments.protocol)
    options = SystemOptions(
        data=arguments.data,
        batch_size=arguments.batch_size,
        flip_average=arguments.flip_average,
        device=choose_device(arguments.device),
        trained_on=check_trained_on(arguments.trained_on) if arguments.trained_on else None,
        trust_remote_code=arguments.trust_remote_code,
        crop_model=arguments.crop_model,
        histogram_matching=not arguments.no_histogram_matching,
        unit=arguments.unit,
        id_column=arguments.id_column,
        prediction_column=arguments.prediction_column,
        truth_column=arguments.truth_column,
    )
    system = build_system(arguments.system, options)
    summary = run_system(system, protocol=protocol, data=arguments.data, out=arguments.out)
    lines = [f"{summary['system']} under {summary['protocol']}, leakage: {summary['leakage']}"]
    lines.append(format_metrics(summary["metrics"]))
    claim = summary["equal_over_age"]
    if claim is not None:
        lines.append(
            f'"{claim["claim"]}": {claim["verdict"]} (p {permutation_p_text(claim)}; the MAEs of 24-month bands '
            f"differ by up to {claim['spread_months']:.1f} months)"
        )
    return "\n".join([*lines, f"wrote {arguments.out}"])


def _checkpoints(arguments: argparse.Namespace) -> str:
    from .checkpoints_table import checkpoints_text, write_into

    if arguments.write is None:
        return checkpoints_text()
    write_into(arguments.write)
    return f"wrote {arguments.write}"


def _compare(arguments: argparse.Namespace) -> str:
    from .compare import check_comparison_out, compare_folders, write_comparison
    from .findings import is_comparison

    if arguments.out is not None:
        check_comparison_out(arguments.out)
    # One pattern of names finds runs and the comparison that was made of them.
    passed = [folder for folder in arguments.results if is_comparison(folder)]
    found = compare_folders([folder for folder in arguments.results if folder not in passed], arguments.data)
    files = write_comparison(found, arguments.out) if arguments.out is not None else ()
    return "\n".join([*map(_passed_over, passed), str(found), *(f"wrote {file}" for file in files)])


def _passed_over(folder: Path) -> str:
    return f"passed over {folder}, which is a comparison and no run"


def _check(arguments: argparse.Namespace) -> str:
    from .attention import load_boxes
    from .findings import check_findings
    from .measured import load_measured
    from .registry import load_published, load_reference_table
    from .results_folder import result_folders

    published, printed, measured = load_published(), load_reference_table(), load_measured(arguments.measured)
    # Rows of another table than the package's have their folders elsewhere.
    rows = measured if arguments.measured is None and not arguments.results else ()
    folders = arguments.results or result_folders()
    check_findings(folders, rows=rows, data=arguments.data)
    boxed = len(load_boxes())
    return (
        f"{len(published)} published, {len(printed)} printed and {len(measured)} measured rows, the boxes of {boxed} "
        f"radiographs and {len(folders)} result folders are in order."
    )


def _add(arguments: argparse.Namespace) -> str:
    from .findings import is_comparison
    from .measured import add_measured_row

    if not arguments.metrics_json.exists() and is_comparison(arguments.metrics_json.parent):
        return _passed_over(arguments.metrics_json.parent)
    try:
        result, replaced = add_measured_row(
            arguments.metrics_json,
            system=arguments.system,
            checkpoint=arguments.checkpoint,
            protocol=arguments.protocol,
            path=arguments.measured,
        )
    except OSError as error:
        raise InputError(
            f"the table cannot be written ({error.strerror}); give another one with --measured."
        ) from None
    lines = [f"{'replaced' if replaced else 'added'} {result.system} under {result.protocol}, n = {result.n}"]
    if not result.same_ground_truth:
        lines.append(
            "the version of its ground truth is not shown to be the protocol's, so it gets no place in a ranking"
        )
    return "\n".join(lines)


def _speed(arguments: argparse.Namespace) -> str:
    if arguments.training == bool(arguments.checkpoint) or (arguments.out is None and not arguments.training):
        raise InputError(
            "Give checkpoints with --out DIR to time them, or --training without one for the training loop."
        )
    if not arguments.training:
        from .latency import measure_speed

        peers = not arguments.no_peers
        return str(measure_speed(arguments.checkpoint, out=arguments.out, repeats=arguments.repeats, peers=peers))
    from boneage_hf.recipes import load_recipe

    from .speed import training_speed

    recipe = load_recipe(arguments.recipe, arguments.set)
    options = {"steps": arguments.steps, "mixed_precision": arguments.mixed_precision}
    return str(training_speed(recipe, out=arguments.out, **options))


def _load(arguments: argparse.Namespace) -> str:
    from .load import measure_load

    return str(
        measure_load(
            url=arguments.url,
            checkpoint=arguments.checkpoint,
            clients=arguments.clients,
            minutes=arguments.minutes,
            requests=arguments.requests,
        )
    )


def _polarity(arguments: argparse.Namespace) -> str:
    from .reading import check_polarity

    return str(check_polarity(arguments.dataset, split=arguments.split, sheets=arguments.sheets))


def _copies(arguments: argparse.Namespace) -> str:
    from boneage_hf.hub import load_pipeline

    from .reading import check_copies

    return str(check_copies(load_pipeline(arguments.checkpoint), arguments.challenge, arguments.originals))


def _stress(arguments: argparse.Namespace) -> str:
    # Before numpy and torch, whose threads get arenas of their own while that is allowed. The threads of the stress
    # test would take those over, and such an arena hands large blocks back at once (384 px: 68 s a setting, not 17).
    keep_freed_memory()
    from .stress import stress_checkpoint

    return str(
        stress_checkpoint(
            arguments.checkpoint,
            arguments.dataset,
            out=arguments.out,
            split=arguments.split,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
        )
    )


def _attention(arguments: argparse.Namespace) -> str:
    from .attention import attention_of_checkpoint

    return str(
        attention_of_checkpoint(arguments.checkpoint, arguments.dataset, out=arguments.out, boxes=arguments.boxes)
    )


def _gate(arguments: argparse.Namespace) -> str:
    from .gate import gate_of_checkpoint

    return str(
        gate_of_checkpoint(
            arguments.checkpoint,
            arguments.dataset,
            out=arguments.out,
            split=arguments.split,
            changed_images=arguments.changed,
        )
    )


def _ablations(arguments: argparse.Namespace) -> str:
    from .ablations import ablate

    return str(
        ablate(
            arguments.dataset,
            initial_weights=arguments.initial_weights,
            out=arguments.out,
            names=arguments.arms,
            seeds=arguments.seeds,
            mixed_precision=arguments.mixed_precision,
        )
    )


def _protocols(arguments: argparse.Namespace) -> str:
    from .protocol import PROTOCOLS

    width = max(len(name) for name in PROTOCOLS)
    return "\n".join(f"{name:<{width}}  {value.data_set}: {value.split}" for name, value in PROTOCOLS.items())
