"""The errors greenprune raises on purpose, as one small tree.

::

    GreenpruneError                 every message says what was expected, what came, what to do
    ├── RecipeError                 a recipe's key, type or value
    ├── DataError                   images, labels, folders, a user's data function
    ├── WeightsError                missing, truncated or unfitting weights; a factory that fails
    ├── PruningError                a network that cannot be traced, a budget out of reach
    │   ├── BudgetError             a budget that no choice of widths is within
    │   └── ProofError              a compact network that does not equal its masked one
    ├── TrainingError               a loss that is not finite, an optimiser that is refused
    ├── ExportError                 an ONNX graph or artifact that does not reproduce its network
    ├── BundleError                 a bundle that is damaged, incomplete or of another schema
    ├── TargetError                 an unknown target or runtime, an artifact that does not open
    ├── MeasurementError            a meter that cannot be read, a measurement that is not valid
    ├── RunError                    a run folder that is missing, locked or unfinished
    ├── StorageError                a file that cannot be written: full disk, no permission
    ├── NotAvailableError           'not available yet: …'
    └── MissingPackageError         an optional package, with the command that installs it

Anything else that escapes is a defect. The commands exit with status 2 on a GreenpruneError.
"""

from __future__ import annotations

from collections.abc import Mapping


class GreenpruneError(Exception):
    """Base of every error that greenprune raises on purpose."""


class RecipeError(GreenpruneError):
    """A recipe has an unknown key, a wrong type or an impossible value."""


class DataError(GreenpruneError):
    """The user's data is missing, unreadable or does not fit."""


class WeightsError(GreenpruneError):
    """A network cannot be built, or its weights are missing, truncated or do not fit."""


class PruningError(GreenpruneError):
    """A network cannot be analysed, or a budget cannot be met."""


class BudgetError(PruningError):
    """No choice of widths is within a budget, by its prices.

    ``smallest`` has the least that can be reached of each limited quantity, in the limits' units.
    """

    def __init__(self, message: str, smallest: Mapping[str, float]) -> None:
        super().__init__(message)
        self.smallest = smallest


class ProofError(PruningError):
    """A compact network does not compute what the masked network computes."""


class TrainingError(GreenpruneError):
    """Training went wrong: a loss that is not finite, an optimiser that cannot be used."""


class ExportError(GreenpruneError):
    """A graph or a compiled artifact does not reproduce the network it was made from."""


class BundleError(GreenpruneError):
    """A bundle is damaged, incomplete or of a schema that this version does not read."""


class TargetError(GreenpruneError):
    """A target or runtime is unknown, or refuses an artifact."""


class MeasurementError(GreenpruneError):
    """A meter cannot be read, or a measurement is not valid. Never reported as zero."""


class RunError(GreenpruneError):
    """A run folder is missing, locked or not finished."""


class StorageError(GreenpruneError):
    """A file could not be read or written."""


class NotAvailableError(GreenpruneError):
    """Something that greenprune does not do yet."""

    def __init__(self, what: str) -> None:
        super().__init__(f"not available yet: {what}")


class MissingPackageError(GreenpruneError):
    """A package is not installed; ``extra`` brings it, or None: it is named as it is."""

    def __init__(self, package: str, extra: str | None = None) -> None:
        wanted = package if extra is None else f"'greenprune[{extra}]'"
        super().__init__(
            f"the package '{package}' is needed here and is not installed; "
            f"run: pip install {wanted}"
        )
        self.package = package
        self.extra = extra
