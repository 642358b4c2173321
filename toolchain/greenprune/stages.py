"""What each stage does: the rooms below, joined by files. Data flows one way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from greenprune import (
    deployment,
    models,
    onnx_export,
    prune_budget,
    prune_stage,
    schema,
    sparsity,
    storage,
    training,
)
from greenprune import stage_parts as parts
from greenprune.adaptive import selector as selecting
from greenprune.cores import session_threads
from greenprune.errors import DataError, NotAvailableError, RecipeError, WeightsError
from greenprune.harness import cost_table
from greenprune.pipeline import Job, Stage, Work
from greenprune.pruning import record
from greenprune.recipe import Recipe
from greenprune.registry import load_target

REFERENCE_IMAGES = 16


def host_stages(recipe: Recipe) -> list[Stage]:
    """From the recipe to the fine-tuned networks."""
    priced = prune_budget.is_asked(recipe)
    return [
        Stage("train", train, depends=_train_depends, trains=True),
        *(
            [Stage(prune_budget.STAGE, prune_budget.price, ("train",), _price_depends, version=2)]
            * priced
        ),
        Stage(
            "sparsify",
            sparsify,
            needs=("train",),
            depends=lambda job: _of(job, "sparsify"),
            trains=True,
        ),
        Stage(
            "prune",
            prune_stage.prune,
            needs=("sparsify", prune_budget.STAGE) if priced else ("sparsify",),
            depends=lambda job: [_of(job, "prune"), prune_budget.width_multiple(job)],
            version=4,
        ),
        *(
            Stage(
                f"finetune-{variant}",
                finetune(variant),
                needs=("train", "prune"),
                depends=_finetune_depends(variant),
                trains=True,
            )
            for variant in parts.PRUNED
        ),
    ]


def _of(job: Job, section: str) -> Any:
    return schema.encode(getattr(job.recipe, section))


def _price_depends(job: Job) -> Any:
    settings, compiled = job.recipe.prune, job.recipe.compile
    table = settings.cost_table
    if table is not None and not Path(table).is_file():
        raise RecipeError(
            f"prune.cost_table = '{table}': no such file; expected the table that "
            "`greenprune-bench --cost-table` wrote on the device"
        )
    return {
        "target": [compiled.target, list(compiled.runtimes), compiled.precision],
        "threads": session_threads(job.recipe.threads),
        "budgets": [list(settings.mild.budget), list(settings.aggressive.budget)],
        "widths": [prune_budget.width_multiple(job), settings.keep_at_least, settings.blocks],
        "table": storage.sha256(Path(table)) if table else _machine(compiled.target),
        "calibration": compiled.calibration_images if compiled.precision == "int8" else None,
    }


def _machine(target: str) -> Any:
    """What a table that is measured here is bound to."""
    device = load_target(target)
    return cost_table.describe_machine(device) if device.is_here() else None


def _finetune_depends(variant: str) -> Any:
    return lambda job: schema.encode(getattr(job.recipe.finetune, variant))


def _train_depends(job: Job) -> Any:
    """Everything that comes from outside: code, weights, data, and how they are used."""
    recipe = job.recipe
    weights = recipe.model.weights
    if weights is not None and not Path(weights).is_file():
        raise WeightsError(
            f"{weights}: no such file; expected the weights that model.weights names"
        )
    return {
        "model": schema.encode(recipe.model),
        "factory": _source_hash(recipe.model.factory, WeightsError),
        "weights": storage.sha256(Path(weights)) if weights else None,
        "task": schema.encode(recipe.task),
        "loss": _source_hash(recipe.task.loss, RecipeError),
        "metric": _source_hash(recipe.task.metric, RecipeError),
        "train": None if weights else schema.encode(recipe.train),
        "data": job.data.fingerprint,
    }


def _source_hash(spec: str, error: Any) -> str:
    """Of the file that the function is in; our own code is covered by the stages' versions."""
    _, source = models.resolve(spec, error)
    return "" if spec.startswith("greenprune.") else storage.sha256(source)


def dense_network(job: Job) -> nn.Module:
    """The dense network that everything is compared with."""
    return parts.load(job, "train")[0]


def pruned_network(job: Job, variant: str) -> nn.Module:
    """The fine-tuned ``mild`` or ``aggressive`` network."""
    return parts.load(job, f"finetune-{variant}")[0]


def train(work: Work) -> dict[str, Any]:
    """Train the dense network, or load its weights; evaluate it on the test images."""
    job, settings = work.job, work.job.recipe.model
    torch.manual_seed(job.recipe.seed)
    network = models.build(settings.factory, settings.arguments)
    if settings.weights:
        models.load_weights(network, Path(settings.weights))
    preflight(job, network)
    if not settings.weights:
        training.fit(
            network,
            job.data,
            job.recipe.train,
            seed=job.recipe.seed,
            loss=parts.function_of(job.recipe.task.loss),
            checkpoint=work.checkpoint,
            label="train",
        )
    described = record.NetworkRecord.of(
        settings.factory, settings.arguments, tuple(job.data.train.inputs.shape[1:])
    )
    record.save_network(work.folder / parts.NETWORK, network, described)
    results = parts.described(job, network, parts.evaluate(job, network, job.data.test))
    return {
        **results,
        "counted_as": "load" if settings.weights else "train",
        "headline": f"accuracy {results['accuracy']:.2%}",
    }


def preflight(job: Job, network: nn.Module) -> None:
    """Find in seconds what would otherwise be found after hours of training.

    Raises:
        DataError: the network does not take these images or does not fit these classes.
        RecipeError: the loss or the metric fails on one batch.
        PruningError: the network cannot be traced, or a budget is out of reach.
        NotAvailableError: the task is not a classification.
    """
    example, targets = parts.example_of(job.data), job.data.train.targets[:2]
    classes = job.data.class_names
    if len(classes) < 2:
        raise DataError(f"expected two classes or more, found {len(classes)}: {list(classes)}")
    if not len(job.data.development):
        raise DataError(
            "the development split is empty, and choices are made on it; set data.development to a "
            "few hundred images"
        )
    if targets.dim() != 1 or targets.is_floating_point():
        raise NotAvailableError(
            f"tasks other than classification: expected one integer label an image, found "
            f"{targets.dtype} targets of shape {list(targets.shape[1:])}"
        )
    try:
        with torch.no_grad():
            outputs = network.eval()(example)
    except Exception as error:
        raise DataError(
            f"the network does not take images of shape {list(example.shape[1:])}: {error}; change "
            "data.size, data.channels or model.arguments"
        ) from error
    if not isinstance(outputs, Tensor) or outputs.shape != (len(example), len(classes)):
        found = list(outputs.shape[1:]) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise DataError(
            f"the network answers {found} for an image and the data has {len(classes)} classes "
            f"({', '.join(classes[:10])}); expected [{len(classes)}]: set the number of classes in "
            "model.arguments"
        )
    try:
        parts.function_of(job.recipe.task.loss)(outputs, targets)
    except Exception as error:
        raise RecipeError(
            f"task.loss failed on a batch of 2: {error!r}; change the loss"
        ) from error
    parts.scores_of(job, outputs, targets)
    selecting.tap(network)
    prune_stage.reach_budgets(job, network, example, priced=False)


def sparsify(work: Work) -> dict[str, Any]:
    """Train on with CBS, so that filters and their biases reach zero together."""
    job, settings = work.job, work.job.recipe.sparsify
    network, described = parts.load(job, "train")
    # changed since training
    prune_stage.reach_budgets(job, network, parts.example_of(job.data), priced=True)
    if settings.epochs == 0:
        record.save_network(work.folder / parts.NETWORK, network, described)
        return {"headline": "left out: sparsify.epochs = 0"}
    penalty = sparsity.build(
        network, parts.example_of(job.data), settings.method, settings.strength, settings.zero_share
    )
    training.fit(
        network,
        job.data,
        settings,
        seed=job.recipe.seed + 1,
        loss=parts.function_of(job.recipe.task.loss),
        penalty=penalty,
        checkpoint=work.checkpoint,
        label="sparsify",
    )
    record.save_network(work.folder / parts.NETWORK, network, described)
    accuracy = parts.evaluate(job, network, job.data.development)
    share = penalty.zero_share()
    return {
        "development_accuracy": accuracy,
        "zero_share": share,
        "headline": f"{share:.1%} of the filters at zero, development {accuracy:.2%}",
    }


def finetune(variant: str) -> Any:
    """The stage function that fine-tunes ``variant``, taught by the dense network."""

    def work_on(work: Work) -> dict[str, Any]:
        job = work.job
        settings = getattr(job.recipe.finetune, variant)
        network, described = parts.load(job, "prune", variant)
        training.fit(
            network,
            job.data,
            settings,
            seed=job.recipe.seed + 10 + parts.PRUNED.index(variant),
            loss=parts.function_of(job.recipe.task.loss),
            teacher=dense_network(job),
            checkpoint=work.checkpoint,
            label=f"fine-tune {variant}",
        )
        record.save_network(work.folder / parts.NETWORK, network, described)
        results = parts.described(job, network, parts.evaluate(job, network, job.data.test))
        return {**results, "headline": f"accuracy {results['accuracy']:.2%}"}

    return work_on


def train_selector(work: Work) -> dict[str, Any]:
    """Train the selector's head on images that no network was trained on."""
    job, split = work.job, work.job.data.selector
    aggressive = pruned_network(job, "aggressive")
    logits, features = selecting.observe(aggressive, split, job.data.preprocessing)
    mild = training.predict(pruned_network(job, "mild"), split, job.data.preprocessing)
    result = selecting.train(
        features,
        logits,
        parts.scores_of(job, mild, split.targets),
        parts.scores_of(job, logits, split.targets),
        job.recipe.selector,
        seed=job.recipe.seed + 20,
    )
    if result.head is not None:
        storage.write_bytes(work.folder / "selector.safetensors", selecting.to_bytes(result.head))
    kind = "msp" if result.head is None else "head"
    storage.write_json(work.folder / "thresholds.json", list(result.thresholds))
    return {
        "kind": kind,
        "reason": result.reason,
        "area_head": result.area_head,
        "area_msp": result.area_msp,
        "features": features.shape[1],
        "images": len(split.targets),
        "headline": f"ships {kind}: {result.reason}",
    }


def scored_network(job: Job) -> nn.Module:
    """The aggressive network and its selector in one module: images -> (logits, score)."""
    if job.results("selector")["kind"] == "msp":
        return selecting.MspNetwork(pruned_network(job, "aggressive")).eval()
    head = selecting.SelectorHead(
        job.results("selector")["features"], len(job.data.class_names), job.recipe.selector.hidden
    )
    selecting.from_bytes(head, (job.place("selector") / "selector.safetensors").read_bytes())
    return selecting.ScoredNetwork(pruned_network(job, "aggressive"), head).eval()


def export_graphs(work: Work) -> dict[str, Any]:
    """Three ONNX graphs, each checked against its network."""
    job = work.job
    example = parts.training_images(job, REFERENCE_IMAGES, seed=job.recipe.seed + 4)
    storage.save_array(work.folder / "reference_input.npy", example.numpy())
    networks = {
        "dense": (dense_network(job), ["logits"]),
        "mild": (pruned_network(job, "mild"), ["logits"]),
        "aggressive": (scored_network(job), ["logits", "score"]),
    }
    sizes, opset = {}, _opset(job)
    for variant, (network, names) in networks.items():
        path = work.folder / f"{variant}.onnx"
        description = onnx_export.Description(
            variant=variant,
            class_names=job.data.class_names,
            preprocessing=job.data.preprocessing,
        )
        answers = onnx_export.export_onnx(network, example, path, names, description, opset)
        for name, answer in answers.items():
            storage.save_array(work.folder / f"{variant}_{name}.npy", answer)
        sizes[variant] = path.stat().st_size
    return {"bytes": sizes, "opset": opset}


def _opset(job: Job) -> int:
    return load_target(job.recipe.compile.target).capabilities.opset


def of(recipe: Recipe) -> list[Stage]:
    """All stages of ``greenprune run`` for this recipe, in order."""
    target = recipe.compile.target
    return [
        *host_stages(recipe),
        Stage(
            "selector",
            train_selector,
            needs=("finetune-mild", "finetune-aggressive"),
            depends=lambda job: _of(job, "selector"),
        ),
        Stage(
            "export",
            export_graphs,
            needs=("train", "selector"),
            depends=_opset,
        ),
        *deployment.stages(target),
    ]
