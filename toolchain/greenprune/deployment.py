"""From graphs to a measured bundle: the stages after export, for one target."""

from __future__ import annotations

import datetime
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from greenprune import bundle, certification, compilation, models, schema, storage, training
from greenprune.bundle import VARIANTS
from greenprune.cores import session_threads
from greenprune.data import Split
from greenprune.errors import RecipeError, RunError
from greenprune.harness import Results, bench, read_results, write_results
from greenprune.harness.environment import versions
from greenprune.nncec import account as accounting
from greenprune.nncec import factors, ledger
from greenprune.nncec.report import write_report
from greenprune.pipeline import (
    LEDGER_FILE,
    Job,
    Stage,
    Work,
    counted_as,
    is_current,
    ledger_identity,
    read_stage,
)
from greenprune.pruning import cost, record
from greenprune.registry import Target, device_kind, load_target
from greenprune.runtime import decide

BATCH = 100
REPLAY_BYTES = 64 << 20
"""A bundle's replay images stay below this, whatever their size."""


def stages(target: str) -> list[Stage]:
    """calibrate, compile, race, certify, bundle, bench, account, report: folders of one target."""

    def of(section: str) -> Any:
        return lambda job: schema.encode(getattr(job.recipe, section))

    compiled, raced, certified = f"compile-{target}", f"race-{target}", f"certify-{target}"
    bundled, benched, accounted = f"bundle-{target}", f"bench-{target}", f"account-{target}"
    return [
        Stage("calibrate", calibrate, needs=("export",), depends=_calibrate_depends),
        Stage(
            compiled,
            compilation.compile_artifacts,
            needs=("calibrate", "export"),
            depends=_compile_depends,
        ),
        Stage(raced, compilation.choose_runtime, needs=(compiled,), depends=_threads),
        Stage(certified, certify, needs=(raced, "selector"), depends=of("certify")),
        Stage(bundled, write_bundle, needs=("calibrate", compiled, certified)),
        Stage(benched, measure, needs=(bundled,), depends=_bench_depends),
        Stage(accounted, account, needs=(benched,), depends=of("account"), version=3),
        Stage(f"report-{target}", report, needs=(accounted,), version=2),
    ]


def _threads(job: Job) -> Any:
    return session_threads(job.recipe.threads)


def _bench_depends(job: Job) -> Any:
    return [schema.encode(job.recipe.bench), _threads(job)]


def _calibrate_depends(job: Job) -> Any:
    return [job.recipe.compile.calibration_images, job.recipe.bench.replay_images]


def _compile_depends(job: Job) -> Any:
    settings = job.recipe.compile
    return [
        schema.encode(settings),
        compilation.runtimes(job),
        load_target(settings.target).probe(),
    ]


def calibrate(work: Work) -> dict[str, Any]:
    """Draw the samples that the bundle carries: for calibration and for replaying."""
    job = work.job
    data, recipe = job.data, job.recipe
    image_bytes = 4 * data.test.inputs[0].numel()
    replayed = slice(0, max(1, min(recipe.bench.replay_images, REPLAY_BYTES // image_bytes)))
    arrays: dict[str, NDArray[Any]] = {
        "calibration_inputs": compilation.calibration_images(job),
        "replay_inputs": compilation.prepared(job, data.test.inputs[replayed]),
        "replay_targets": data.test.targets[replayed].numpy(),
    }
    for name, array in arrays.items():
        storage.save_array(work.folder / f"{name}.npy", array)
    return {name: len(array) for name, array in arrays.items()}


def default_runtime(job: Job) -> str:
    """The runtime that the bundle's sessions use, and that is certified."""
    return str(job.results(f"race-{job.recipe.compile.target}")["runtime"])


def built_artifacts(job: Job, variant: str) -> dict[str, str]:
    """Runtime to path, without what the race left out."""
    target = job.recipe.compile.target
    left_out = job.results(f"race-{target}")["left_out"]
    built = job.results(f"compile-{target}")["artifacts"][variant]
    return {name: path for name, path in built.items() if name not in left_out}


def answers(job: Job, split: Split) -> dict[str, dict[str, NDArray[np.float32]]]:
    """What each deployed artifact answers to a split: variant -> output name -> array."""
    target, runtime = load_target(job.recipe.compile.target), default_runtime(job)
    place = job.place(f"compile-{target.name}")
    deployed = {variant: place / built_artifacts(job, variant)[runtime] for variant in VARIANTS}
    return compilation.answers(job, target, deployed, runtime, split)


def certify(work: Work) -> dict[str, Any]:
    """Certify thresholds on the deployed artifacts; report the pair on the test images."""
    job = work.job
    plan = certification_plan(job)
    deployed = answers(job, job.data.certification)
    right = {
        variant: compilation.right(job, found["logits"], job.data.certification)
        for variant, found in deployed.items()
    }
    logits = {variant: found["logits"] for variant, found in deployed.items()}
    table = certification.make_dial(deployed["aggressive"]["score"], logits, right, plan)
    target = load_target(job.recipe.compile.target)
    here = target.is_here()
    if not here:
        table = tuple(_uncertified(row, target) for row in table)
    energies = job.results(f"compile-{target.name}")["simulated_energy"]
    if energies:
        table = tuple(replace(row, energy_mac_units=_pair_energy(row, energies)) for row in table)
    operating = certification.operating_row(table, plan)
    threshold = operating.threshold if operating.certified else None
    tested = _test_pair(job, threshold)
    setting = bundle.setting(target.name, default_runtime(job))
    return {
        "table": schema.encode(table),
        "threshold": threshold,
        "certified_on": setting if here else "",
        "test": tested,
        "headline": certification.promise(operating, plan.reference, tested["coverage"]),
    }


def _pair_energy(row: bundle.DialRow, energies: dict[str, Any]) -> float:
    """E_aggressive + (1 - coverage) E_mild; mild's alone where nothing is accepted."""
    aggressive, mild = (
        float(energies[name]["energy_mac_units"]) for name in ("aggressive", "mild")
    )
    return mild if row.threshold is None else aggressive + (1 - row.coverage) * mild


def certification_plan(job: Job) -> bundle.CertificationPlan:
    """What the certificate is made from; its images travel where it is made on the device.

    They do not where the metric is the user's own code, which the device does not have.
    """
    settings = job.recipe.certify
    target = load_target(job.recipe.compile.target)
    own_metric = models.resolve(job.recipe.task.metric, RecipeError)[0] is not training.accuracy
    travels = not target.is_here() and not own_metric
    return bundle.CertificationPlan(
        inputs="samples/certification_inputs.npy" if travels else None,
        targets="samples/certification_targets.npy" if travels else None,
        thresholds=tuple(thresholds(job)),
        max_accuracy_loss=settings.max_accuracy_loss,
        operating_loss=settings.operating_loss,
        reference=settings.reference,
        delta=settings.delta,
        seed=job.recipe.seed + 40,
    )


def _uncertified(row: bundle.DialRow, target: Target) -> bundle.DialRow:
    """A certificate holds on the device alone: nothing is promised for one that is not here."""
    reason = (
        f"scored on {platform.machine()}, not on {device_kind(target)}; "
        "run greenprune-bench --certify on the device"
    )
    return replace(row, certified=False, reason=row.reason or reason)


def thresholds(job: Job) -> list[float]:
    """The selector's grid of thresholds, strict to loose."""
    content = (job.place("selector") / "thresholds.json").read_text(encoding="utf-8")
    return [float(value) for value in json.loads(content)]


def _test_pair(job: Job, threshold: float | None) -> dict[str, Any]:
    split = job.data.test
    deployed = answers(job, split)
    right = {
        name: compilation.right(job, found["logits"], split) for name, found in deployed.items()
    }
    accepted = decide(deployed["aggressive"]["score"], threshold)
    pair = np.where(accepted, right["aggressive"], right["mild"])
    return {
        "images": len(pair),
        "coverage": float(accepted.mean()),
        "accuracy": {
            **{name: float(values.mean()) for name, values in right.items()},
            "pair": float(pair.mean()),
        },
    }


def write_bundle(work: Work) -> dict[str, Any]:
    """Assemble what is shipped."""
    job = work.job
    target = job.recipe.compile.target
    exported, compiled = job.place("export"), job.place(f"compile-{target}")
    files: dict[str, Any] = {
        f"samples/{path.name}": path
        for place in (job.place("calibrate"), exported)
        for path in sorted(place.glob("*.npy"))
    }
    plan = certification_plan(job)
    if plan.inputs is not None and plan.targets is not None:
        files |= {plan.inputs: _decoded(job.data.certification.inputs, job)}
        files |= {plan.targets: job.data.certification.targets.numpy()}
    files |= {f"graphs/{name}.onnx": exported / f"{name}.onnx" for name in VARIANTS}
    files |= {
        f"artifacts/{path.relative_to(compiled)}": path
        for runtime in built_artifacts(job, "dense")
        for path in sorted((compiled / runtime).iterdir())
    }
    readme = load_target(target).readme()
    if readme is not None:
        files["README.md"] = readme.encode()
    manifest = bundle.write(work.folder / "bundle", _manifest(job), files)
    return {"bytes": sum(entry.bytes for entry in manifest.files.values())}


def _decoded(inputs: torch.Tensor, job: Job) -> NDArray[Any]:
    """Images as an app decodes them, uint8 [N, H, W, C]; prepared inputs as they are."""
    if job.data.preprocessing is None:
        return inputs.numpy()
    return inputs.permute(0, 2, 3, 1).contiguous().numpy()


def _manifest(job: Job) -> bundle.Manifest:
    recipe, data = job.recipe, job.data
    certified = job.results(f"certify-{recipe.compile.target}")
    selector = job.results("selector")
    shape = tuple(int(size) for size in data.train.inputs.shape[1:])
    return bundle.Manifest(
        schema=bundle.SCHEMA_VERSION,
        name=recipe.name,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        target=recipe.compile.target,
        runtime=default_runtime(job),
        input=bundle.TensorSpec(name="input", shape=(None, *shape), dtype="float32"),
        outputs=(
            bundle.TensorSpec(name="logits", shape=(None, len(data.class_names)), dtype="float32"),
        ),
        preprocessing=data.preprocessing,
        class_names=data.class_names,
        variants={variant: _variant(job, variant) for variant in VARIANTS},
        selector=bundle.SelectorRecord(
            kind=selector["kind"],
            reason=selector["reason"],
            reference=recipe.certify.reference,
            threshold=certified["threshold"],
            table=tuple(bundle.DialRow(**row) for row in certified["table"]),
            certified_on=certified["certified_on"],
        ),
        samples=bundle.Samples(
            reference_input="samples/reference_input.npy",
            calibration_inputs="samples/calibration_inputs.npy",
            replay_inputs="samples/replay_inputs.npy",
            replay_targets="samples/replay_targets.npy",
        ),
        certification=certification_plan(job),
        simulated_energy=job.results(f"compile-{recipe.compile.target}")["simulated_energy"],
        provenance={
            "recipe": _without_places(schema.encode(recipe)),
            "seed": recipe.seed,
            "versions": versions(),
            "int8": job.results(f"compile-{recipe.compile.target}")["int8"],
            "race": job.results(f"race-{recipe.compile.target}"),
            "networks": {
                variant: storage.sha256(_network_folder(job, variant) / "weights.safetensors")
                for variant in VARIANTS
            },
        },
    )


def _without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with names instead of absolute paths: a bundle does not tell its maker's disk."""
    return {
        key: _without_places(value)
        if isinstance(value, dict)
        else Path(value).name
        if isinstance(value, str) and Path(value).is_absolute()
        else value
        for key, value in recipe.items()
    }


def _network_stage(variant: str) -> str:
    return "train" if variant == "dense" else f"finetune-{variant}"


def _network_folder(job: Job, variant: str) -> Path:
    return job.place(_network_stage(variant)) / "network"


def network_results(job: Job, variant: str) -> dict[str, Any]:
    """What the stage that finished ``variant`` found: accuracy, MACs, parameters."""
    return job.results(_network_stage(variant))


def layer_macs(job: Job, variant: str) -> dict[str, int]:
    """MACs of each layer of ``variant`` for one sample, in the order of execution."""
    network, _ = record.load_network(_network_folder(job, variant))
    shape = bundle.open_bundle(bundle_folder(job)).manifest.input.shape
    return cost.per_layer(network, torch.zeros(1, *(size or 1 for size in shape[1:])))


def _variant(job: Job, variant: str) -> bundle.Variant:
    described = network_results(job, variant)
    return bundle.Variant(
        graph=f"graphs/{variant}.onnx",
        artifacts={
            runtime: f"artifacts/{path}" for runtime, path in built_artifacts(job, variant).items()
        },
        macs=described["macs"],
        params=described["params"],
        accuracy=described["accuracy"],
        reference_outputs={
            path.stem.removeprefix(f"{variant}_"): f"samples/{path.name}"
            for path in sorted(job.place("export").glob(f"{variant}_*.npy"))
        },
    )


def bundle_folder(job: Job) -> Path:
    """The finished bundle."""
    return job.bundle


def measure(work: Work) -> dict[str, Any]:
    """Measure every variant on every runtime, each in a process of its own, without torch."""
    job, settings = work.job, work.job.recipe.bench
    results = bench(
        bundle_folder(job),
        preset=settings.preset,
        meter=settings.meter,
        tdp_watts=settings.tdp_watts,
        threads=job.recipe.threads,
        seed=job.recipe.seed,
    )
    write_results(work.folder / "results.json", results)
    bundle.update_manifest(bundle_folder(job), {"energy_mj": _energy_mj(job, results)})
    return {"preset": settings.preset, "valid": results.verdict.valid}


def _energy_mj(job: Job, results: Results) -> dict[str, dict[str, Any]]:
    """The manifest's measured columns: each variant on the bundle's runtime.

    ``valid`` is the verdict's: whoever reads the joules of a measurement that failed must see it.
    """
    return {
        found.variant: {
            **{key: getattr(found.energy_mj, key) for key in ("value", "low", "high")},
            "provenance": found.energy_mj.provenance,
            "preset": results.preset,
            "valid": results.verdict.valid,
        }
        for found in results.candidates
        if found.runtime == default_runtime(job) and found.energy_mj is not None
    }


def results_of(job: Job) -> Results:
    """What the bench stage measured."""
    return read_results(job.place(f"bench-{job.recipe.compile.target}") / "results.json")


def measured_elsewhere(job: Job, path: Path) -> tuple[Job, Results]:
    """What a device measured of this run's bundle, and the run as of that bundle's target.

    Raises:
        MeasurementError: the file is no results.
        RunError: they are of another bundle, or of one of the same name with other networks.
    """
    results = read_results(path)
    settings = replace(job.recipe.compile, target=results.target)
    found = Job(replace(job.recipe, compile=settings), job.folder)
    if results.bundle != job.recipe.name or not is_current(job.folder, found.bundle_stage):
        raise RunError(
            f"{path}: results of the bundle '{results.bundle}' for '{results.target}'; expected "
            f"those of one of '{job.recipe.name}', made by this run: measure the bundle that "
            f"greenprune-export makes of {job.folder}, or name the run that it was made of"
        )
    if results.networks_sha256 != bundle.open_bundle(found.bundle).networks_sha256:
        raise RunError(
            f"{path}: results of '{results.bundle}' for '{results.target}', of {results.created}, "
            f"but of other networks than those in {found.bundle}: an earlier or another run made "
            "them; measure this bundle"
        )
    return found, results


def account(work: Work) -> dict[str, Any]:
    """The carbon account: what the stages cost, what an inference costs, when it has paid."""
    rows = ledger.read(work.job.folder / LEDGER_FILE)
    made = account_from(work.job, ledger.Content(rows=rows, unreadable=()))
    content: dict[str, Any] = schema.encode(made)
    storage.write_json(work.folder / "account.json", content)
    return {}


def account_from(
    job: Job, entered: ledger.Content, results: Results | None = None, **changes: Any
) -> accounting.Account:
    """The account of these rows by the recipe's settings; ``changes`` are arguments of
    :func:`greenprune.nncec.account.account` that go before them. ``results``: None: the run's own.

    Every finished stage should have a row; one that has none is named, not taken as free.
    """
    settings = job.recipe.account
    rows = ledger.distinct(entered.rows)
    identities = {row.identity for row in rows}
    stages = [(counted_as(stage), stage) for stage in finished_stages(job)]
    terms: dict[str, Any] = {
        "intensity_g_per_kwh": factors.of_recipe(settings.intensity_g_per_kwh),
        "pue": settings.pue,
        "inferences": settings.inferences,
        "runtime": default_runtime(job),
        "unreadable": entered.unreadable,
        "absent": [
            name for name, stage in stages if ledger_identity(stage, name) not in identities
        ],
    }
    return accounting.account(rows, results or results_of(job), **(terms | changes))


def finished_stages(job: Job) -> list[dict[str, Any]]:
    """Every finished stage's description, in the order in which they were run."""
    found = (read_stage(path) for path in job.folder.iterdir() if path.is_dir())
    return sorted((stage for stage in found if stage), key=lambda stage: str(stage["started"]))


def read_account(job: Job) -> dict[str, Any]:
    """The account as plain data."""
    path = job.place(f"account-{job.recipe.compile.target}") / "account.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def account_of(job: Job) -> accounting.Account:
    """The account that the account stage made."""
    return schema.decode(read_account(job), accounting.Account, "account.json", RunError)


def report(work: Work) -> dict[str, Any]:
    """The page for people."""
    from greenprune.summary import report_input

    write_report(work.folder / "report.html", **report_input(work.job, account_of(work.job)))
    return {}
