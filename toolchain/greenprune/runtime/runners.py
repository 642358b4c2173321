"""The parity gate: an artifact must answer what its network answered (device side)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune.bundle import Bundle
from greenprune.errors import ExportError
from greenprune.registry import Runner, Target, split_runtime


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an artifact of some precision may be from its network."""

    largest_difference: float
    """Of any output value, relative to the largest reference value of that output."""
    agreement: float
    """Share of samples with the same top-1 class; a tie within the difference agrees."""


TOLERANCES = {
    "fp32": Tolerance(largest_difference=1e-3, agreement=1.0),
    "fp16": Tolerance(largest_difference=2e-2, agreement=1.0),
    "int8": Tolerance(largest_difference=0.3, agreement=0.8),
}
"""For int8 this finds graphs that are broken; what int8 costs is judged on the development images,
layer by layer if need be."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far an artifact is from its network."""

    largest_difference: float
    agreement: float


def check_bundled(opened: Bundle, variant: str, runtime: str, runner: Runner) -> Parity:
    """Compare a bundle's network, open on this machine, with what the host's network answered.

    Raises:
        ExportError: as :func:`verify_artifact`.
        BundleError: the samples are damaged.
    """
    manifest = opened.manifest
    references = manifest.variants[variant].reference_outputs
    return check_answers(
        runner,
        runtime,
        opened.read_array(manifest.samples.reference_input),
        {name: opened.read_array(path) for name, path in references.items()},
        f"{opened.path}: {variant} on {runtime}",
    )


def verify_artifact(
    target: Target,
    artifact: Path,
    runtime: str,
    reference_input: NDArray[np.float32],
    reference_outputs: Mapping[str, NDArray[np.float32]],
    *,
    threads: int = 0,
) -> Parity:
    """Open a compiled artifact and compare its answers, to the whole batch and to one sample.

    Args:
        target: whose artifact it is.
        artifact: its main file.
        runtime: its name with the precision, which picks the tolerance.
        reference_input: float32 [N, C, H, W].
        reference_outputs: output name to the network's own answers, the batch first; those of two
            and more dimensions have their classes in the second.
        threads: for the runtime; 0 means one for each core.

    Raises:
        ExportError: an output is missing, of another shape, not finite or too far off; it says by
            how much.
        TargetError: the runtime refuses the artifact.
    """
    runner = target.open_on_host(artifact, runtime, threads)
    try:
        where = f"{artifact} on {runtime}"
        return check_answers(runner, runtime, reference_input, reference_outputs, where)
    finally:
        runner.close()


def check_answers(
    runner: Runner,
    runtime: str,
    reference_input: NDArray[np.float32],
    reference_outputs: Mapping[str, NDArray[np.float32]],
    where: str,
) -> Parity:
    """:func:`verify_artifact` of one that is open; ``where`` stands in messages."""
    tolerance = TOLERANCES[split_runtime(runtime)[1]]
    parities = [
        _compare(runner, reference_input[:count], reference_outputs, tolerance, where)
        for count in (len(reference_input), 1)
    ]
    return Parity(
        largest_difference=max(parity.largest_difference for parity in parities),
        agreement=min(parity.agreement for parity in parities),
    )


def _compare(
    runner: Runner,
    inputs: NDArray[np.float32],
    references: Mapping[str, NDArray[np.float32]],
    tolerance: Tolerance,
    where: str,
) -> Parity:
    missing = [name for name in references if name not in runner.output_names]
    if missing:
        raise ExportError(
            f"{where}: expected the outputs {', '.join(references)}, "
            f"found {', '.join(runner.output_names)}; export it again"
        )
    answers = runner.run(inputs)
    differences, agreements = [0.0], [1.0]
    for name, whole in references.items():
        answer, reference = answers[name], whole[: len(inputs)]
        if answer.shape != reference.shape or not np.isfinite(answer).all():
            raise ExportError(
                f"{where}: output '{name}': expected finite values of shape "
                f"{list(reference.shape)}, found shape {list(answer.shape)}, "
                f"{int((~np.isfinite(answer)).sum())} of them not finite; export it again"
            )
        scale = max(float(np.abs(whole).max()), 1e-12)
        differences.append(float(np.abs(answer - reference).max()) / scale)
        if reference.ndim >= 2:
            tie = tolerance.largest_difference * scale
            agreements.append(_agreement(answer, reference, tie))
    parity = Parity(largest_difference=max(differences), agreement=min(agreements))
    if (
        parity.largest_difference > tolerance.largest_difference
        or parity.agreement < tolerance.agreement
    ):
        raise ExportError(
            f"{where}: its answers to {len(inputs)} samples differ from the network's by "
            f"{parity.largest_difference:.2e} of the largest output (at most "
            f"{tolerance.largest_difference:.0e} is expected) with the same class for "
            f"{parity.agreement:.1%} (at least {tolerance.agreement:.1%}); it is not shipped: "
            "try another runtime or precision"
        )
    return parity


def _agreement(answer: NDArray[Any], reference: NDArray[Any], tie: float) -> float:
    """Share of samples whose top class is the reference's, or ties with it in the reference."""
    chosen = np.expand_dims(answer.argmax(axis=1), 1)
    behind = reference.max(axis=1) - np.take_along_axis(reference, chosen, axis=1).squeeze(1)
    return float((behind <= tie).mean())
