"""The certificate of a pair, on the artifacts and machine that it is to hold for (device side).

Where the target is the machine that exports, the certify stage makes it. Where it is not, the
bundle carries the certification images, routes everything to mild, and ``greenprune-bench
--certify`` makes it on the device.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenprune import bundle, schema
from greenprune.bundle import VARIANTS, CertificationPlan, DialRow, Manifest, Preprocessing
from greenprune.errors import BundleError, TargetError
from greenprune.progress import progress
from greenprune.registry import Runner, device_kind, load_target
from greenprune.runtime.networks import SCORE
from greenprune.runtime.preprocessing import preprocess
from greenprune.runtime.runners import check_bundled
from greenprune.runtime.selector import decide
from greenprune_calibration import certificate

BATCH = 100


def make_dial(
    scores: NDArray[Any],
    logits: Mapping[str, NDArray[Any]],
    right: Mapping[str, NDArray[np.float64]],
    plan: CertificationPlan,
) -> tuple[DialRow, ...]:
    """A row for each allowed loss of ``plan``.

    Args:
        scores: the deployed selector's, [N].
        logits: variant to its deployed answers, [N, classes].
        right: variant to how right these are, [N] in [0, 1].
        plan: thresholds, losses, confidence, reference.
    """
    rows = certificate.certify(
        scores=scores.astype(np.float64),
        right_aggressive=right["aggressive"],
        right_mild=right["mild"],
        right_reference=right[plan.reference],
        thresholds=plan.thresholds,
        losses=plan.max_accuracy_loss,
        delta=plan.delta,
        seed=plan.seed,
    )
    differ = logits["aggressive"].argmax(axis=1) != logits["mild"].argmax(axis=1)
    made = []
    for row in rows:
        accepted = decide(scores, row.threshold)
        disagreement = float(differ[accepted].mean()) if accepted.any() else None
        made.append(DialRow(**dataclasses.asdict(row), disagreement=disagreement))
    return tuple(made)


def operating_row(table: Iterable[DialRow], plan: CertificationPlan) -> DialRow:
    """The row that a session starts with."""
    return next(row for row in table if row.max_accuracy_loss == plan.operating_loss)


def promise(row: DialRow, reference: str, coverage: float) -> str:
    """What a row promises, for people; ``coverage`` is the share of inputs that it accepts."""
    if not row.certified:
        return f"not certified, so that mild answers everything: {row.reason}"
    return (
        f"at most {row.max_accuracy_loss * 100:.1f} points below the {reference} network with "
        f"{1 - row.delta:.0%} confidence (n = {row.n:,}): accepts {coverage:.0%}"
    )


def answers(
    open_network: Callable[[str], Runner],
    variants: Iterable[str],
    batches: Iterable[NDArray[np.float32]],
) -> dict[str, dict[str, NDArray[Any]]]:
    """What deployed networks answer: variant to output to [N, ...].

    Args:
        open_network: of a variant.
        variants: to ask.
        batches: prepared inputs, float32 [n, C, H, W] each; gone through once.
    """
    parts: dict[str, list[dict[str, NDArray[Any]]]] = {variant: [] for variant in variants}
    with ExitStack() as stack:
        runners = {}
        for variant in parts:
            runners[variant] = open_network(variant)
            stack.callback(runners[variant].close)
        for batch in batches:
            for variant, runner in runners.items():
                parts[variant].append(runner.run(batch))
    return {
        variant: {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        for variant, found in parts.items()
    }


def certify_bundle(path: Path | str, *, threads: int = 0) -> Manifest:
    """Certify a bundle on this machine with the images that it carries, and write that into it.

    An answer is right where its largest logit is the image's class.

    Args:
        path: the bundle's folder; its manifest is replaced, atomically.
        threads: for the runtime; 0 means one for each core.

    Raises:
        BundleError: the bundle is damaged, or carries no certification images.
        TargetError: this machine is none of the target's, or the runtime refuses an artifact.
        ExportError: a network does not answer here what it answered to the host.
    """
    opened = bundle.open_bundle(path)
    manifest = opened.manifest
    plan = manifest.certification
    if plan.inputs is None or plan.targets is None:
        raise BundleError(
            f"{opened.path}: carries no certification images; expected a bundle for a device other "
            "than the one that exported it, from a recipe with the built-in metric; this one "
            f"was certified on: {manifest.selector.certified_on or 'nothing'}"
        )
    target = load_target(manifest.target)
    if not target.is_here():
        raise TargetError(
            f"{opened.path}: a certificate for target '{target.name}' holds on "
            f"{device_kind(target)} alone, and this machine is "
            f"{platform.machine()}; run greenprune-bench --certify on the device"
        )

    def open_checked(variant: str) -> Runner:
        artifact = opened.artifact(variant, manifest.runtime)
        runner = target.open(artifact, manifest.runtime, threads)
        with ExitStack() as stack:
            stack.callback(runner.close)
            check_bundled(opened, variant, manifest.runtime, runner)
            stack.pop_all()
        return runner

    batches = _prepared(opened.read_array(plan.inputs), manifest.preprocessing)
    found = answers(open_checked, VARIANTS, batches)
    targets = opened.read_array(plan.targets)
    logits = {variant: each[manifest.outputs[0].name] for variant, each in found.items()}
    right = {
        variant: (each.argmax(axis=1) == targets).astype(np.float64)
        for variant, each in logits.items()
    }
    table = make_dial(found["aggressive"][SCORE], logits, right, plan)
    operating = operating_row(table, plan)
    record = dataclasses.replace(
        manifest.selector,
        threshold=operating.threshold if operating.certified else None,
        table=table,
        certified_on=manifest.setting(manifest.runtime),
    )
    return bundle.update_manifest(path, {"selector": record})


def _prepared(
    images: NDArray[Any], settings: Preprocessing | None
) -> Iterator[NDArray[np.float32]]:
    """Batches of the bundle's images as its networks take them."""
    with progress("certify", len(images)) as advance:
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            if settings is not None:
                batch = np.concatenate([preprocess(image, settings) for image in batch])
            yield batch
            advance(len(batch))


def describe(manifest: Manifest) -> dict[str, Any]:
    """What ``greenprune-bench --certify --json`` prints."""
    plan = manifest.certification
    operating = operating_row(manifest.selector.table, plan)
    return {
        "headline": promise(operating, plan.reference, operating.coverage),
        "selector": schema.encode(manifest.selector),
    }
