"""Systems that the benchmark can run, one adapter each; `--system KIND[:ARG]` names one."""

from collections.abc import Callable

from boneage_hf.errors import InputError

from ..protocol import did_you_mean
from .base import System, SystemOptions, leakage

__all__ = ["KINDS", "System", "SystemOptions", "build_system", "leakage"]


def _checkpoint(argument: str, options: SystemOptions) -> System:
    from .checkpoint import CheckpointSystem

    return CheckpointSystem.build(argument, options)


def _transformers_remote(argument: str, options: SystemOptions) -> System:
    from .transformers_remote import TransformersRemoteSystem

    return TransformersRemoteSystem.build(argument, options)


def _predictions_csv(argument: str, options: SystemOptions) -> System:
    from .predictions_csv import PredictionsCsvSystem

    return PredictionsCsvSystem.build(argument, options)


def _deeplasia_service(argument: str, options: SystemOptions) -> System:
    from .deeplasia_service import DeeplasiaServiceSystem

    return DeeplasiaServiceSystem.build(argument, options)


def _constant(argument: str, options: SystemOptions) -> System:
    from .constant import ConstantSystem

    return ConstantSystem.build(argument, options)


#: Kind -> what builds it from the text after the colon. AXNet has no public weights: its row stays cited.
KINDS: dict[str, Callable[[str, SystemOptions], System]] = {
    "checkpoint": _checkpoint,
    "transformers-remote": _transformers_remote,
    "predictions-csv": _predictions_csv,
    "deeplasia-service": _deeplasia_service,
    "constant": _constant,
}


#: Kinds that cannot know what they were trained on: `--trained-on` says it.
TOLD = ("predictions-csv", "transformers-remote")


def build_system(spec: str, options: SystemOptions) -> System:
    """The system that `KIND[:ARG]` names; `checkpoint` alone is the packaged one.

    Raises:
        InputError: the kind is unknown, it is told what it knows itself, or the adapter cannot use the argument or
            the options.
    """
    kind, _, argument = spec.partition(":")
    if kind.lower() == "axnet":
        raise InputError("AXNet has no public weights, so it cannot be run; its published row stays cited.")
    if kind not in KINDS:
        raise InputError(f'there is no kind of system "{kind}"; {did_you_mean(kind, KINDS)}')
    if options.trained_on is not None and kind not in TOLD:
        raise InputError(
            f'"{kind}" itself knows what it was trained on; leave out --trained-on, which is for {" and ".join(TOLD)}.'
        )
    return KINDS[kind](argument, options)
