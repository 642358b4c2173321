"""Networks: the built-in ones, anyone's own by name, and their weights."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from greenprune.errors import GreenpruneError, WeightsError
from greenprune.models.crnn import crnn
from greenprune.models.densenet import densenet40
from greenprune.models.googlenet import googlenet
from greenprune.models.lenet import lenet5
from greenprune.models.resnet import resnet20, resnet32, resnet44, resnet56, resnet110
from greenprune.models.vgg import vgg16

__all__ = [
    "build",
    "crnn",
    "densenet40",
    "googlenet",
    "lenet5",
    "load_weights",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "resolve",
    "vgg16",
]


def resolve(
    spec: str, error: type[GreenpruneError] = WeightsError
) -> tuple[Callable[..., Any], Path]:
    """Find the function that ``"module:function"`` or ``"path/file.py:function"`` names.

    Args:
        spec: where the function is. A file is loaded under a name of its own that follows from
            its content, so that two files called ``model.py`` do not meet.
        error: raised when something is wrong (DataError for data, RecipeError for a loss).

    Returns:
        The function, and the source file that defines it.

    Raises:
        GreenpruneError: (as ``error``) no such module, file or function, or importing it fails.
    """
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name:
        raise error(f"'{spec}': expected 'module:function' or 'path/file.py:function'")
    module = _load_file(Path(place), error) if place.endswith(".py") else _import(place, error)
    function = getattr(module, name, None)
    if not callable(function):
        found = "has no such name" if function is None else f"holds a {type(function).__name__}"
        raise error(f"'{spec}': expected a function '{name}' in '{place}', which {found}")
    return function, _source(function, module, spec, error)


def build(factory: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """Call the factory that ``factory`` names (see :func:`resolve`) with keyword ``arguments``.

    Raises:
        WeightsError: there is no such factory, it does not take these arguments, it fails, or
            what it returns is not a ``torch.nn.Module``.
    """
    function, _ = resolve(factory)
    arguments = dict(arguments or {})
    signature = inspect.signature(function)
    try:
        signature.bind(**arguments)
    except TypeError as problem:
        raise WeightsError(
            f"factory '{factory}' takes {signature}, and was given {arguments}: {problem}; "
            "change model.arguments"
        ) from None
    try:
        model = function(**arguments)
    except Exception as problem:
        raise WeightsError(
            f"factory '{factory}' failed on {arguments}: {type(problem).__name__}: {problem}"
        ) from problem
    if not isinstance(model, nn.Module):
        raise WeightsError(
            f"factory '{factory}' must return a torch.nn.Module, "
            f"and returned a {type(model).__name__}"
        )
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights into ``model``, in place and completely.

    Args:
        model: the network; its parameters and buffers say what is expected.
        path: a ``.safetensors`` file, or a checkpoint of ``torch.save`` holding the state
            dictionary itself or under ``state_dict`` or ``model``. Nothing in a checkpoint is
            executed (``weights_only=True``). A ``module.`` before every key is dropped.

    Raises:
        WeightsError: no such file; not a checkpoint, or a truncated one; keys that are missing
            or left over; a shape that differs; values that are not finite. The model is
            unchanged.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; set model.weights to a checkpoint that exists")
    found = _without_prefix(_read(path))
    expected = model.state_dict()
    # torch counts batches only for BatchNorm without momentum; old checkpoints lack the counter
    missing = [
        key for key in expected if key not in found and not key.endswith(".num_batches_tracked")
    ]
    unexpected = [key for key in found if key not in expected]
    if missing or unexpected:
        raise WeightsError(
            f"{path}: expected the {len(expected)} keys of {type(model).__name__}, found "
            f"{len(found)}; missing: {_some(missing)}; unexpected: {_some(unexpected)}; "
            "use the factory and the arguments that the weights were trained with"
        )
    for key, value in found.items():
        if value.shape != expected[key].shape:
            raise WeightsError(
                f"{path}: key '{key}': expected shape {tuple(expected[key].shape)}, found "
                f"{tuple(value.shape)}; use the factory and the arguments that the weights were "
                "trained with"
            )
        if not torch.isfinite(value).all():
            raise WeightsError(
                f"{path}: key '{key}': expected finite values, found NaN or infinity; "
                "the training diverged or the file is damaged: use another checkpoint"
            )
    model.load_state_dict({**expected, **found})


def _read(path: Path) -> dict[str, Tensor]:
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        first_line = str(problem).strip().split("\n")[0]
        raise WeightsError(
            f"{path}: expected a .safetensors file or a checkpoint of tensors, found something "
            f"else or a truncated file ({type(problem).__name__}: {first_line}); copy it again, "
            "or save it with torch.save(model.state_dict(), path)"
        ) from problem
    for entry in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(
            f"{path}: expected a state dictionary (names to tensors), alone or under 'state_dict' "
            f"or 'model', found {_describe(content)}; save it with "
            "torch.save(model.state_dict(), path)"
        )
    return content


def _describe(content: Any) -> str:
    if isinstance(content, dict):
        return f"a dictionary with {_some([str(key) for key in content])}"
    return f"a {type(content).__name__}"


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the ``module.`` that DataParallel puts before every key."""
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return (f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown) or "none"


def _import(name: str, error: type[GreenpruneError]) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as problem:
        raise error(
            f"module '{name}' cannot be imported: {type(problem).__name__}: {problem}; install it, "
            "or name a file instead: 'path/file.py:function'"
        ) from problem


def _load_file(path: Path, error: type[GreenpruneError]) -> ModuleType:
    if not path.is_file():
        raise error(f"{path}: no such file; expected 'path/file.py:function'")
    source = path.read_bytes()
    digest = hashlib.sha256(str(path.resolve()).encode() + b"\0" + source).hexdigest()
    name = f"_greenprune_{path.stem}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses in the file look their module up
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # its neighbours can be imported, as under 'python file.py'
    try:
        # the very text that was hashed: the loader may take older bytecode of the same second
        exec(compile(source, str(path), "exec"), module.__dict__)
    except Exception as problem:
        del sys.modules[name]
        raise error(
            f"{path} cannot be loaded: {type(problem).__name__}: {problem}; "
            f"'python {path.name}' shows where"
        ) from problem
    return module


def _source(
    function: Callable[..., Any], module: ModuleType, spec: str, error: type[GreenpruneError]
) -> Path:
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # a partial or another object that can be called
        source = module.__file__ if hasattr(module, "__file__") else None
    if source is None:
        raise error(f"'{spec}': expected a function written in Python, found one without source")
    return Path(source).resolve()
