"""nn.Module -> ONNX, checked against the network it came from."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from greenprune import schema
from greenprune._version import __version__
from greenprune.bundle import Preprocessing
from greenprune.errors import ExportError, MissingPackageError

if TYPE_CHECKING:
    from onnx_ir import Model, Value

OPSET = 20
"""fp16 and int8 Q/DQ check from 19 on; ONNX Runtime's static quantisation stops below 21."""
TOLERANCE = 1e-4
"""Largest difference, relative to the largest output, that float32 reordering explains."""

PREFIX = "greenprune."
"""Of every key that is ours in a graph's ``metadata_props``."""
MEANINGS = {
    "input": "normalised images",
    "logits": "a number for each class, not normalised; the largest is the answer",
    "score": "how far the answer can be trusted; accept it where score >= threshold",
}


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a graph says of itself to whoever has the file alone."""

    variant: str
    """``dense``, ``mild`` or ``aggressive``."""
    class_names: tuple[str, ...]
    """In the order of the logits."""
    preprocessing: Preprocessing | None
    """From a decoded image to ``input``; None: the data came prepared."""


def export_onnx(
    network: nn.Module,
    example: Tensor,
    path: Path,
    output_names: Sequence[str],
    description: Description | None = None,
    opset: int = OPSET,
) -> dict[str, NDArray[np.float32]]:
    """Write ``network`` as an ONNX graph with a free batch and check it with ONNX Runtime.

    Args:
        network: in eval mode; one tensor in, one tensor or a tuple of them out.
        example: float32 [N, C, H, W], N >= 2, normalised images to check with.
        path: the ``.onnx`` file to write; weights are inside it.
        output_names: one for each output.
        description: goes into the graph's ``metadata_props``, beside what is always there: see
            ``docs/targets.md``.
        opset: that the target wants.

    Returns:
        The network's own answers to ``example``, by output name.

    Raises:
        ExportError: the network cannot be exported, or the graph answers something else.
        MissingPackageError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(error.name or "onnx", "host") from error

    network = network.eval()
    with torch.no_grad():
        answers = network(example)
    outputs = answers if isinstance(answers, tuple) else (answers,)
    if len(outputs) != len(output_names) or not all(isinstance(out, Tensor) for out in outputs):
        raise ExportError(
            f"{path.name}: expected {len(output_names)} output tensors "
            f"({', '.join(output_names)}), the network gives {len(outputs)}"
        )
    try:
        with _quiet():
            program = torch.onnx.export(
                network,
                (example[:2],),
                input_names=["input"],
                output_names=list(output_names),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        assert program is not None  # dynamo=True
        written = program.model.opset_imports[""]
        if written != opset:  # the exporter warns, and goes on with another
            raise ValueError(f"in opset {written}, not in {opset}, which the target wants")
        _describe(program.model, description)
        program.save(path, external_data=False)
        onnx.checker.check_model(path, full_check=True)
    except OSError:
        raise
    except Exception as error:
        raise ExportError(
            f"{path.name}: the network cannot be exported to ONNX ({error}); expected a network "
            "that torch.export can trace with a free batch"
        ) from error
    references = {
        name: np.asarray(out.detach().cpu().numpy(), dtype=np.float32)
        for name, out in zip(output_names, outputs, strict=True)
    }
    check(path, example, references)
    return references


def _describe(model: Model, description: Description | None) -> None:
    """Write our metadata, and drop the exporter's: it quotes the source lines that each node came
    from, with their paths on the disk of whoever exports."""
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
    content: dict[str, Any] = {
        "version": __version__,
        "opset": model.opset_imports[""],
        "inputs": {value.name: _tensor(value) for value in model.graph.inputs},
        "outputs": {value.name: _tensor(value) for value in model.graph.outputs},
    }
    if description is not None:
        content |= _described(description)
    for key, value in content.items():
        told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        model.metadata_props[PREFIX + key] = told


def _tensor(value: Value) -> dict[str, Any]:
    """Shape (a name where it is free), type and, of a name that we give, meaning."""
    shape = [size if isinstance(size, int) else str(size) for size in value.shape or ()]
    meaning = {"meaning": MEANINGS[value.name]} if value.name in MEANINGS else {}
    return {"shape": shape, "dtype": "float32", **meaning}


def _described(description: Description) -> dict[str, Any]:
    content: dict[str, Any] = schema.encode(description)
    if content["preprocessing"] is not None:
        content["preprocessing"] |= {
            "image": "uint8 [height, width, channels], RGB or grey",
            "range": [0, 255],
            "formula": "(image / 255 - mean) / std",
        }
    return content


def check(path: Path, example: Tensor, references: dict[str, NDArray[np.float32]]) -> float:
    """Largest relative difference between a graph's answers and ``references``.

    Raises:
        ExportError: it is above :data:`TOLERANCE`, or the batch is not free.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in (len(example), 1):
        names = list(references)
        try:
            answers = session.run(names, {"input": example[:count].numpy()})
        except Exception as error:  # ONNX Runtime's own errors have no public base
            raise ExportError(
                f"{path.name}: the graph does not run on a batch of {count}: {error}; expected "
                "one whose batch is free"
            ) from error
        for name, answer in zip(names, answers, strict=True):
            reference = references[name][:count]
            scale = max(float(np.abs(reference).max()), 1e-12)
            difference = float(np.abs(answer - reference).max()) / scale
            # not max(): it drops a difference that is NaN
            worst = difference if not difference <= worst else worst
    if not worst <= TOLERANCE:
        raise ExportError(
            f"{path.name}: the graph differs from the network by {worst:.2e} of its largest "
            f"output; at most {TOLERANCE:.0e} is expected"
        )
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress and its remarks on its own insides are not for our users."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
