"""From graphs to artifacts: one for each runtime and precision, checked, and the fastest chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from greenprune import certification, models, schema, training
from greenprune.bundle import VARIANTS
from greenprune.data import Split, normalise
from greenprune.errors import ExportError, RecipeError, TargetError
from greenprune.harness.race import race
from greenprune.pipeline import Job, Work
from greenprune.registry import PRECISIONS, Build, Target, load_target, runtime_name, split_runtime
from greenprune.runtime.networks import SCORE
from greenprune.runtime.runners import verify_artifact
from greenprune_calibration import graphs, inspection
from greenprune_calibration.samples import draw_balanced

BATCH = 100
CHECKED = "checked_by"
"""What a target's probe says of the tool that checks graphs in place of the device."""
SCORED = "aggressive"
"""The network whose graph has the selector's score as a second output."""
RACED = ("aggressive", "mild")
"""The networks that an app calls: the runtime that is fastest for the two together wins."""


def runtimes(job: Job) -> list[str]:
    """What to build for, by :func:`~greenprune.registry.runtime_name`: each runtime in every
    precision from the target's widest to the one that is asked for.

    Raises:
        TargetError: an unknown target, a precision or runtime that it does not offer, or none of
            its runtimes is installed.
    """
    settings = job.recipe.compile
    target = load_target(settings.target)
    found = target.capabilities
    if settings.precision not in found.precisions:
        raise TargetError(
            f"target '{target.name}' has no precision '{settings.precision}'; expected one of "
            f"{', '.join(found.precisions)}"
        )
    here = found.runtimes if found.built_on_device else target.runtimes_here()
    wanted = list(settings.runtimes) or list(here)
    if not wanted:
        raise TargetError(
            f"target '{settings.target}': none of its runtimes is installed here; expected one of "
            f"{', '.join(found.runtimes)}: {target.how_to_install(found.runtimes[0])}"
        )
    for runtime in wanted:
        if runtime not in found.runtimes:
            raise TargetError(
                f"compile.runtimes: target '{settings.target}' has no runtime '{runtime}'; "
                f"expected some of {', '.join(found.runtimes)}"
            )
    up_to = PRECISIONS.index(settings.precision) + 1
    precisions = [precision for precision in PRECISIONS[:up_to] if precision in found.precisions]
    return [runtime_name(runtime, precision) for precision in precisions for runtime in wanted]


def check_measurable(job: Job) -> None:
    """Raises TargetError: the target builds on its device and this is not one, so that a whole run
    could not measure what it made."""
    target = load_target(job.recipe.compile.target)
    if target.capabilities.built_on_device and not target.is_here():
        raise TargetError(
            f"compile.target = '{target.name}': a whole run ends with a measurement, and "
            f"{' or '.join(target.capabilities.runtimes)} is not on this machine; expected a "
            "target that runs here, such as x86, or `greenprune prune`, which measures nothing; "
            f"then `greenprune-export --target {target.name}`, and greenprune-bench on the device"
        )


@dataclass(frozen=True, kw_only=True)
class Int8Report:
    """What int8 cost one network on one runtime."""

    float_accuracy: float
    """On the development images, by the fp32 artifact of the same runtime."""
    accuracy: float
    kept_float: tuple[str, ...]
    """Layers that stay in floating point, since int8 cost more than was allowed with them."""
    layers: dict[str, str]
    """What each layer computes in, as the runtime tells; empty where it runs elsewhere."""


def compile_artifacts(work: Work) -> dict[str, Any]:
    """Compile each graph for each runtime; every artifact must reproduce its network."""
    job = work.job
    target = load_target(job.recipe.compile.target)
    exported = job.place("export")
    reference_input = np.load(exported / "reference_input.npy", allow_pickle=False)
    artifacts: dict[str, dict[str, str]] = {variant: {} for variant in VARIANTS}
    differences: dict[str, dict[str, float]] = {variant: {} for variant in VARIANTS}
    int8: dict[str, dict[str, Any]] = {}
    energies: dict[str, Any] = {}
    for name in runtimes(job):
        runtime, precision = split_runtime(name)
        for variant in VARIANTS:
            graph, folder = exported / f"{variant}.onnx", work.folder / name
            if precision == "int8":
                plain = work.folder / artifacts[variant][runtime]
                made, report = _compile_int8(job, target, graph, runtime, folder, plain)
                int8.setdefault(name, {})[variant] = schema.encode(report)
            else:
                build = Build(runtime=runtime, precision=precision)
                made = target.compile(graph, build, folder, variant)
            parity = verify_artifact(
                target,
                made,
                name,
                reference_input,
                reference_outputs(exported, variant),
                threads=job.recipe.threads,
            )
            artifacts[variant][name] = f"{name}/{made.name}"
            differences[variant][name] = parity.largest_difference
            simulated = target.simulated_energy(made)
            if simulated is not None:
                energies[variant] = simulated
    machine = target.probe()
    checked = {"headline": f"checked by {machine[CHECKED]}"} if CHECKED in machine else {}
    return {
        "artifacts": artifacts,
        "largest_difference": differences,
        "int8": int8,
        "simulated_energy": energies,
        "machine": machine,
        **checked,
    }


def reference_outputs(folder: Path, variant: str) -> dict[str, NDArray[np.float32]]:
    """What the network itself answered, by output name."""
    return {
        path.stem.removeprefix(f"{variant}_"): np.load(path, allow_pickle=False)
        for path in sorted(folder.glob(f"{variant}_*.npy"))
    }


def _compile_int8(
    job: Job, target: Target, graph: Path, runtime: str, folder: Path, plain: Path
) -> tuple[Path, Int8Report]:
    """Quantise; while that costs too much on the development images, keep twice as many of the
    layers that it damages most in floating point. The selector's score always stays there."""
    settings = job.recipe.compile
    images = np.load(job.place("calibrate") / "calibration_inputs.npy", allow_pickle=False)
    with _readable_graph():
        always = graphs.feeding_only(graph, SCORE) if graph.stem == SCORED else []
    float_accuracy = _development_accuracy(job, target, plain, runtime)
    damaged: list[str] | None = None
    kept = 0
    while True:
        worst = tuple((damaged or [])[:kept])
        build = Build(
            runtime=runtime,
            precision="int8",
            calibration=images,
            keep_float=(*always, *worst),
        )
        made = target.compile(graph, build, folder, graph.stem)
        name = runtime_name(runtime, "int8")
        accuracy = _development_accuracy(job, target, made, name)
        if float_accuracy - accuracy <= settings.int8_max_loss:
            break
        if damaged is None:
            with _readable_graph():
                damaged = [layer for layer, _ in inspection.sensitivity(graph, images)]
        if kept >= len(damaged):
            raise TargetError(
                f"{graph.stem} on {name}: {accuracy:.2%} on the development images with every "
                f"layer in floating point, {float_accuracy:.2%} without quantisation; expected at "
                f"most compile.int8_max_loss = {settings.int8_max_loss} less; raise it, or do "
                "without int8"
            )
        kept = max(1, 2 * kept)
    return made, Int8Report(
        float_accuracy=float_accuracy,
        accuracy=accuracy,
        kept_float=worst,
        layers=target.layer_precisions(made, name),
    )


@contextmanager
def _readable_graph() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ExportError(str(error)) from error


def _development_accuracy(job: Job, target: Target, artifact: Path, runtime: str) -> float:
    split = job.data.development
    found = answers(job, target, {"network": artifact}, runtime, split)["network"]
    return float(right(job, found["logits"], split).mean())


def answers(
    job: Job, target: Target, artifacts: dict[str, Path], runtime: str, split: Split
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """What artifacts answer to a split: variant -> output name -> array."""
    return certification.answers(
        lambda variant: target.open_on_host(artifacts[variant], runtime, job.recipe.threads),
        artifacts,
        (prepared(job, part) for part in split.inputs.split(BATCH)),
    )


def calibration_images(job: Job) -> NDArray[np.float32]:
    """Training images to calibrate int8 with: where each has a class, these as even as they can
    be; else at random."""
    train = job.data.train
    count = min(job.recipe.compile.calibration_images, len(train.targets))
    labelled = train.targets.ndim == 1 and not train.targets.is_floating_point()
    labels = train.targets.numpy() if labelled else np.zeros(len(train.targets), np.int64)
    drawn = draw_balanced(labels, count, job.recipe.seed + 30)
    return prepared(job, train.inputs[torch.from_numpy(drawn)])


def prepared(job: Job, inputs: torch.Tensor) -> NDArray[np.float32]:
    """Images as the networks take them."""
    return normalise(inputs, job.data.preprocessing).numpy()


def right(job: Job, logits: NDArray[np.float32], split: Split) -> NDArray[np.float64]:
    """How right each answer is, [N] in [0, 1], by the recipe's metric."""
    metric = models.resolve(job.recipe.task.metric, RecipeError)[0]
    scores = training.evaluate(torch.from_numpy(logits), split.targets, metric)
    return scores.double().numpy()


def choose_runtime(work: Work) -> dict[str, Any]:
    """Race the artifacts on this machine, each network in a process of its own. What int8 is not
    shown to make faster, or where no layer is int8, is left out. On a device that is not here,
    nothing can be raced: the narrowest precision on the target's first runtime is taken."""
    job = work.job
    target = load_target(job.recipe.compile.target)
    compiled = job.results(f"compile-{target.name}")
    left_out = _without_int8(compiled["int8"])
    names = [name for name in runtimes(job) if name not in left_out]
    if len(names) == 1 or not target.is_here():
        narrowest = split_runtime(names[-1])[1]
        runtime = next(name for name in names if split_runtime(name)[1] == narrowest)
        said = {"headline": "; ".join([runtime, *left_out.values()])} if left_out else {}
        return {"runtime": runtime, "left_out": left_out, "race": None, **said}
    place = job.place(f"compile-{target.name}")
    built = compiled["artifacts"]
    found = race(
        target.name,
        {name: {variant: place / built[variant][name] for variant in RACED} for name in names},
        job.place("calibrate") / "replay_inputs.npy",
        threads=job.recipe.threads,
        seed=job.recipe.seed,
    )
    for name in names:
        runtime, precision = split_runtime(name)
        slower = found.ratio(name, runtime)
        if precision == "int8" and slower.high >= 1:
            left_out[name] = (
                f"int8 is not shown to be faster: it takes {slower.value:.2f} "
                f"[{slower.low:.2f}, {slower.high:.2f}] times as long as fp32 on {runtime} here"
            )
    runtime = next(name for name in found.order if name not in left_out)
    return {
        "runtime": runtime,
        "left_out": left_out,
        "race": schema.encode(found),
        "headline": "; ".join([f"{runtime} is the fastest", *left_out.values()]),
    }


def _without_int8(reports: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Runtimes on which a network that an app calls has no layer in int8, and what to say of it."""
    return {
        name: f"{name}: int8 is in no layer of the {variant} network"
        for name, networks in reports.items()
        for variant in RACED
        if (layers := networks[variant]["layers"]) and "int8" not in layers.values()
    }
