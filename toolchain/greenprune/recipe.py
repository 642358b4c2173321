"""What the user asks for: a typed, frozen recipe read from TOML.

Every section is a frozen dataclass; every field has a default, so that an empty file is the
default job. Units are in the names. ``"module:function"`` strings name the user's own code, and
may also be ``"path/to/file.py:function"``, relative to the recipe's folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from greenprune import schema
from greenprune.errors import RecipeError, RunError
from greenprune.pruning import limits

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Fraction = Annotated[float, Meta(gt=0.0, le=1.0)]
Probability = Annotated[float, Meta(gt=0.0, lt=1.0)]
NonNegative = Annotated[float, Meta(ge=0.0)]
Positive = Annotated[float, Meta(gt=0.0)]
Watts = Annotated[float, Meta(gt=0.0, le=10_000.0)]
Count = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]

BUILT_IN = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The network: who builds it, and where its trained weights are."""

    factory: str = "greenprune.models:lenet5"
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    """A ``.safetensors`` file or a checkpoint; without it the network is trained."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The images: where they are, how they are prepared, who may see which."""

    source: str = "digits"
    """``digits``, ``mnist``, ``folder`` (ImageFolder layout) or ``module:function``."""
    path: str | None = None
    size: tuple[AtLeastOne, AtLeastOne] | None = None
    """Height and width that images are resized to; None keeps theirs, which must then agree."""
    channels: Literal[1, 3] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None
    augmentation: Literal["none", "shift", "crop_flip"] = "none"
    development: Count = 97
    """Images taken out of training to choose by."""
    selector: AtLeastOne = 250
    certification: AtLeastOne = 300
    held_out_from: Literal["train", "test"] | None = None
    """Where the selector's and the certificate's images come from: the training images (None), or,
    for weights that were trained on all of these, the test images. Must be said where
    ``model.weights`` is given."""


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The loss that is trained and the metric that is reported."""

    loss: str = "greenprune.training:cross_entropy"
    """``loss(outputs, targets) -> scalar tensor``."""
    metric: str = "greenprune.training:accuracy"
    """``metric(outputs, targets) -> float tensor [N]``, each in [0, 1], higher is better."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """One training: SGD with Nesterov momentum, linear warm-up, cosine to zero."""

    epochs: Count = 10
    batch_size: AtLeastOne = 64
    learning_rate: Positive = 0.05
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.9
    weight_decay: NonNegative = 5e-4
    warmup_epochs: NonNegative = 0.5
    label_smoothing: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the arithmetic in forward and backward; weights and their updates are float32 always."""


@dataclass(frozen=True, kw_only=True)
class SparsitySettings(TrainingSettings):
    """Sparse training before pruning (CBS)."""

    method: Literal["cbs", "cbs_l1", "group", "l1"] = "cbs"
    strength: NonNegative = 1e-4
    zero_share: Annotated[float, Meta(gt=0.0, le=0.8)] | None = None
    """Share of the filters that are to be zero in the end, in place of a strength, which is then
    found in training (``cbs`` and ``group``); a fifth of every layer stays."""


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(TrainingSettings):
    """Fine-tuning of a compact network, taught by the dense one."""

    distillation: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.5
    """Weight of the teacher's loss; 1 minus it is the weight of the labels' loss."""
    temperature: Positive = 4.0
    features: NonNegative = 0.0
    """Weight of how far the stages' outputs are from the teacher's, where their shapes agree."""


@dataclass(frozen=True, kw_only=True)
class VariantSettings:
    """One member of the pair: how much of the network stays."""

    macs: Fraction = 0.5
    """Share of the dense network's MACs that may stay."""
    params: Fraction = 1.0
    """Share of its parameters that may stay."""
    rates: dict[str, Annotated[float, Meta(ge=0.0, lt=1.0)]] = field(default_factory=dict)
    """In place of the two: the share of its channels that each of these groups loses, as papers
    give them."""
    budget: tuple[str, ...] = ()
    """In place of all three: what it may cost at most, several at once, such as ``latency x0.5``,
    ``latency_ms <= 4``, ``energy_mj <= 2``, ``params x0.4``. Latency and energy are what the target
    pays, by a table measured on it."""


@dataclass(frozen=True, kw_only=True)
class GateTrainingSettings(TrainingSettings):
    """One-off training with gates; ``epochs`` counts those with gates and those after them."""

    gated_epochs: AtLeastOne = 5
    """The first epochs, with gates; the static sub-network is trained for the others."""
    sparsity: NonNegative = 50.0
    """Weight s of the squared distance from the target."""
    polarization: NonNegative = 5.0
    """Weight p of the disagreement between inputs."""
    blocks: bool = True
    """Whether residual blocks get gates too, and may be removed whole."""


@dataclass(frozen=True, kw_only=True)
class PruneSettings:
    """Which channels go."""

    method: Literal[
        "drp", "drp_rank", "magnitude", "bn_scale", "taylor", "hrank", "fpgm", "random", "gates"
    ] = "drp"
    """A criterion that scores channels, or ``gates``: one-off training (``prune.gates``) that finds
    each of the two networks, blocks removed as well, by its ``macs`` alone."""
    images: AtLeastOne = 1024
    """To score with, at most: they are added until the order of the channels is stable."""
    scope: Literal["global", "uniform"] = "global"
    """The scores decide which layers lose most, or every group loses the same share."""
    width_multiple: AtLeastOne | None = None
    """Every width lands on a multiple of this; 1 switches rounding off. None: what the target's
    kernels are blocked for, and 1 where rates are given."""
    keep_at_least: Fraction = 0.2
    """No group of channels goes below this share of its width."""
    mild: VariantSettings = field(default_factory=lambda: VariantSettings(macs=0.6))
    aggressive: VariantSettings = field(default_factory=lambda: VariantSettings(macs=0.3))
    cost_table: str | None = None
    """For budgets in latency or energy: the table that was carried back from the device; None: this
    machine is the device, and the table is measured here, once."""
    blocks: bool = False
    """Whether a residual block goes whole, where budgets gain more by that than by narrower layers.
    """
    steps: AtLeastOne = 1
    """Budgets are reached in so many steps, each cut by scores of its own, with ``between`` after
    each but the last."""
    between: DistillationSettings = field(default_factory=lambda: DistillationSettings(epochs=1))
    gates: GateTrainingSettings = field(default_factory=GateTrainingSettings)


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Fine-tuning of the mild and of the aggressive network."""

    mild: DistillationSettings = field(default_factory=DistillationSettings)
    aggressive: DistillationSettings = field(default_factory=DistillationSettings)


@dataclass(frozen=True, kw_only=True)
class SelectorSettings:
    """The head that says, for each input, whether the aggressive network's answer will do."""

    hidden: AtLeastOne = 64
    epochs: AtLeastOne = 200
    learning_rate: Positive = 1e-2
    weight_decay: NonNegative = 1e-2


@dataclass(frozen=True, kw_only=True)
class CompileSettings:
    """What the bundle is built for."""

    target: str = "x86"
    runtimes: tuple[str, ...] = ()
    """Runtimes to build for, among which a race decides; empty means all that the target offers
    and this machine has."""
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """The narrowest to build; wider ones that the target offers are built too."""
    calibration_images: AtLeastOne = 100
    int8_max_loss: Probability = 0.005
    """Accuracy, as a fraction, that int8 may cost a network on the development images; above it,
    layers go back to floating point."""


@dataclass(frozen=True, kw_only=True)
class CertifySettings:
    """The guarantee: accuracy lost against the reference, with what confidence."""

    reference: Literal["dense", "mild"] = "dense"
    """The network that the pair is compared with."""
    max_accuracy_loss: tuple[Probability, ...] = (0.01, 0.02, 0.03, 0.05)
    """Losses to certify, as fractions (0.01 is one point); a row of the dial each."""
    operating_loss: Probability = 0.05
    """The row that the bundle starts with."""
    delta: Probability = 0.05
    """1 - delta is the confidence, for all rows jointly."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How the bundle is measured on this machine."""

    preset: Literal["quick", "standard", "report", "mlperf-tiny"] = "quick"
    meter: str = "auto"
    tdp_watts: Watts | None = None
    """Thermal design power of this machine's processors, for the estimate, of the stages too."""
    replay_images: AtLeastOne = 500


@dataclass(frozen=True, kw_only=True)
class AccountSettings:
    """The carbon account."""

    intensity_g_per_kwh: Annotated[float, Meta(gt=0.0, le=2000.0)] = 445.0
    pue: Annotated[float, Meta(ge=1.0, le=5.0)] = 1.0
    inferences: AtLeastOne = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole job."""

    name: str = "lenet5-digits"
    seed: Count = 0
    threads: Count = 0
    """CPU threads for training and measuring; 0 means one for each core."""
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    train: TrainingSettings = field(default_factory=TrainingSettings)
    sparsify: SparsitySettings = field(default_factory=SparsitySettings)
    prune: PruneSettings = field(default_factory=PruneSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    selector: SelectorSettings = field(default_factory=SelectorSettings)
    compile: CompileSettings = field(default_factory=CompileSettings)
    certify: CertifySettings = field(default_factory=CertifySettings)
    bench: BenchSettings = field(default_factory=BenchSettings)
    account: AccountSettings = field(default_factory=AccountSettings)


def built_in_recipes() -> dict[str, str]:
    """Name and first comment line of each built-in recipe."""
    recipes = {}
    for path in sorted(BUILT_IN.glob("*.toml")):
        first = path.read_text().splitlines()[0]
        recipes[path.stem] = first.removeprefix("#").strip()
    return recipes


def load(recipe: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: a TOML file, or the name of a built-in recipe; None means ``lenet5-digits``.
        overrides: ``"section.key=value"`` strings; the value is TOML, or else a plain string.

    Raises:
        RecipeError: the file is missing or not TOML; an unknown key; a wrong type or value.
    """
    path = _find(recipe or "lenet5-digits")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from error
    content.setdefault("name", path.stem)
    for override in overrides:
        _override(content, override)
    loaded = schema.decode(content, Recipe, str(path), RecipeError)
    _check(loaded, str(path))
    return _resolve_paths(loaded, Path.cwd() if path.parent == BUILT_IN else path.parent.resolve())


def _find(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    named = BUILT_IN / f"{recipe}.toml"
    if named.is_file():
        return named
    raise RecipeError(
        f"recipe '{recipe}': no such file, and no built-in recipe of that name; "
        f"built in are: {', '.join(built_in_recipes())}"
    )


def _override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {override}: expected KEY=VALUE, as in train.epochs=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    place = content
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise RecipeError(f"--set {override}: '{section}' is a value, not a section")
    place[last] = value


def checked(recipe: Recipe) -> Recipe:
    """A recipe that was made in Python, held to what :func:`load` holds a file to.

    Raises:
        RecipeError: a wrong type or value.
    """
    same = schema.decode(schema.encode(recipe), Recipe, "the recipe", RecipeError)
    _check(same, "the recipe")
    return _resolve_paths(same, Path.cwd())


def _refuse_infinite(content: Any, where: str, key: str = "") -> None:
    if isinstance(content, dict):
        for name, value in content.items():
            _refuse_infinite(value, where, f"{key}.{name}".removeprefix("."))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            _refuse_infinite(value, where, f"{key}[{index}]")
    elif isinstance(content, float) and not math.isfinite(content):
        raise RecipeError(f"{where}: key '{key}': expected a finite number, got {content}")


def _check(recipe: Recipe, where: str) -> None:
    _refuse_infinite(schema.encode(recipe), where)
    if recipe.prune.method == "gates" and any(
        own.rates or own.budget or own.params < 1
        for own in (recipe.prune.mild, recipe.prune.aggressive)
    ):
        raise RecipeError(
            f"{where}: prune.method = 'gates' goes by prune.mild.macs and prune.aggressive.macs "
            "alone; leave rates, budget and params out"
        )
    if recipe.prune.gates.gated_epochs > recipe.prune.gates.epochs:
        raise RecipeError(
            f"{where}: prune.gates.gated_epochs = {recipe.prune.gates.gated_epochs} must be at "
            f"most prune.gates.epochs = {recipe.prune.gates.epochs}, of which it is a part"
        )
    mild, aggressive = recipe.prune.mild, recipe.prune.aggressive
    for name, own in (("mild", mild), ("aggressive", aggressive)):
        _check_variant(own, f"{where}: prune.{name}")
    smaller = (aggressive.macs, aggressive.params) < (mild.macs, mild.params)
    _check_budgets(recipe, where)
    by_shares = not any(own.rates or own.budget for own in (mild, aggressive))
    if by_shares and not smaller:
        raise RecipeError(
            f"{where}: prune.aggressive.macs = {aggressive.macs} must be below prune.mild.macs = "
            f"{mild.macs}, or equal to it with fewer params; the aggressive network is the smaller "
            "of the pair"
        )
    if recipe.certify.operating_loss not in recipe.certify.max_accuracy_loss:
        raise RecipeError(
            f"{where}: certify.operating_loss = {recipe.certify.operating_loss} must be one of "
            f"certify.max_accuracy_loss = {list(recipe.certify.max_accuracy_loss)}"
        )
    if recipe.model.weights is not None and recipe.data.held_out_from is None:
        raise RecipeError(
            f"{where}: model.weights is given, so that data.held_out_from must be said too: 'test' "
            "where the weights were trained on all training images (a certificate on images that "
            "a network has seen holds for nothing), 'train' where they have not seen those that "
            "this recipe and seed hold out"
        )
    check_name(recipe.name, where)


def _check_budgets(recipe: Recipe, where: str) -> None:
    """Raises RecipeError: settings of budgets without one, or a pair the wrong way round."""
    prune = recipe.prune
    if not prune.mild.budget and not prune.aggressive.budget:
        given = {"blocks": prune.blocks, "steps": prune.steps > 1, "cost_table": prune.cost_table}
        for name, value in given.items():
            if value:
                raise RecipeError(
                    f"{where}: prune.{name} is for budgets, and there is none; expected one in "
                    f"prune.mild.budget or prune.aggressive.budget: give one, or leave {name} out"
                )
    mild = {limit.quantity: limit for limit in limits.parse_all(prune.mild.budget)}
    for limit in limits.parse_all(prune.aggressive.budget):
        other = mild.get(limit.quantity)
        for own, looser in (
            ((limit.share, other.share), (limit.value, other.value)) if other else ()
        ):
            if own is not None and looser is not None and own > looser:
                raise RecipeError(
                    f"{where}: prune.aggressive.budget '{limit}' must not be above that of "
                    f"prune.mild, '{other}'; the aggressive network is the smaller of the pair"
                )


def _check_variant(own: VariantSettings, where: str) -> None:
    """Raises RecipeError: a budget that cannot be read, or that stands beside rates."""
    try:
        limits.parse_all(own.budget)
    except RecipeError as error:
        raise RecipeError(f"{where}.budget: {error}") from error
    if own.budget and own.rates:
        raise RecipeError(
            f"{where}: budget and rates both say how much goes; expected one of them, got budget = "
            f"{list(own.budget)} and rates for {', '.join(own.rates)}; leave one out"
        )


def check_name(name: str, where: str) -> None:
    """Raises RecipeError: a run's name that is no folder's name."""
    if not name or name in (".", "..") or set(name) & set("/\\\0"):
        raise RecipeError(f"{where}: name '{name}' must be usable as a folder's name")


def _resolve_paths(recipe: Recipe, base: Path) -> Recipe:
    """Paths in a recipe are relative to the recipe's folder (a built-in's: to the current one)."""

    def absolute(value: str | None) -> str | None:
        return value if value is None else str((base / Path(value).expanduser()).resolve())

    def code(value: str) -> str:
        place, separator, function = value.rpartition(":")
        return f"{absolute(place)}:{function}" if separator and place.endswith(".py") else value

    replace = dataclasses.replace
    return replace(
        recipe,
        prune=replace(recipe.prune, cost_table=absolute(recipe.prune.cost_table)),
        model=replace(
            recipe.model,
            factory=code(recipe.model.factory),
            weights=absolute(recipe.model.weights),
        ),
        data=replace(recipe.data, source=code(recipe.data.source), path=absolute(recipe.data.path)),
        task=replace(recipe.task, loss=code(recipe.task.loss), metric=code(recipe.task.metric)),
    )


def read_back(path: Path) -> Recipe:
    """The recipe that a run was made with, from its ``run.json``.

    Raises:
        RunError: the file is damaged or of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunError(f"{path}: not a run's description ({error!r})") from error
    return schema.decode(content, Recipe, str(path), RunError)
