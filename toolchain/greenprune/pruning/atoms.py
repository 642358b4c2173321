"""Channel atoms: the bookkeeping that rules write to and groups are read from.

An *atom* is one channel of one tensor, numbered when a layer makes it. Rules say which atoms a
tensor's channels are, which atoms stand or fall together (*unite*), which must stay (*freeze*),
and which axes of parameters, and which plain numbers, run over which atoms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

Atoms = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Channels:
    """The atoms of a tensor: one for each index of dimension ``dim``, int64 [shape[dim]].

    Of a number or a size: all atoms that it may depend on, with ``dim`` -1. Of a tuple or a list:
    likewise, and ``parts`` are the marks of its items.
    """

    dim: int
    atoms: Atoms
    parts: tuple[Mark, ...] = ()


class FreezeError(Exception):
    """Raised by a rule that cannot follow its inputs' atoms, with the reason for the user.

    Never leaves the analysis: the inputs' atoms are frozen, and the output's are unknown.
    """


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Something that has one entry for each of ``atoms``, and loses the entries of removed ones.

    ========= ======================= ======================================================
    kind      owner                   place
    ========= ======================= ======================================================
    parameter parameter's full name   dimension (parameters and buffers)
    output    module's name           "" (the channels that a layer writes)
    input     module's name           "" (the channels that a layer reads)
    attribute module's name           attribute that holds ``len(atoms)``
    constant  graph node's name       path in the node's arguments to an int, ``len(atoms)``
    ========= ======================= ======================================================
    """

    kind: Literal["parameter", "output", "input", "attribute", "constant"]
    owner: str
    place: Any
    atoms: Atoms
    reads: bool = False
    """A parameter's entries weigh the atoms' values: masking zeroes them."""


UNKNOWN = "tied to values that are not followed"
"""Why channels stay that something unknown goes with."""


class Ledger:
    """All that the rules have said about one network."""

    def __init__(self, *, constants_editable: bool) -> None:
        self.constants_editable = constants_editable
        self.atoms = 0
        self.axes: dict[tuple[str, str, Any], Axis] = {}
        self.unions: list[tuple[Atoms, Atoms]] = []
        self.frozen: list[tuple[Atoms, str]] = []

    def new(self, count: int) -> Atoms:
        """Fresh atoms, int64 [count]."""
        self.atoms += count
        return np.arange(self.atoms - count, self.atoms, dtype=np.int64)

    def unknown(self, count: int, reason: str = UNKNOWN) -> Atoms:
        """Fresh frozen atoms, for channels of which nothing is known."""
        atoms = self.new(count)
        self.freeze(atoms, reason)
        return atoms

    def unite(self, left: Atoms, right: Atoms) -> None:
        """Tie atoms one by one; the arrays broadcast."""
        left, right = np.broadcast_arrays(left, right)
        self.unions.append((left.ravel(), right.ravel()))

    def freeze(self, atoms: Atoms, reason: str) -> None:
        """Keep ``atoms``, and all that is tied to them, for good."""
        self.frozen.append((atoms, reason))

    def add(self, axis: Axis) -> None:
        """Note an axis; where it is known already, from the other mode's graph, tie the two."""
        known = self.axes.setdefault((axis.kind, axis.owner, axis.place), axis)
        if known is not axis:
            self.unite(known.atoms, axis.atoms)

    def components(self) -> Atoms:
        """The connected component of each atom, int64 [atoms]."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        none = np.empty(0, dtype=np.int64)
        left = np.concatenate([none, *(pair[0] for pair in self.unions)])
        right = np.concatenate([none, *(pair[1] for pair in self.unions)])
        shape = (self.atoms, self.atoms)
        ties = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=shape)
        return np.asarray(connected_components(ties, directed=False)[1], dtype=np.int64)


Mark = Channels | None
"""What is known of a value: its atoms, or nothing."""


def together(*parts: Mark) -> Channels:
    """The mark of a tuple or list of tensors whose marks are ``parts``."""
    none = np.empty(0, dtype=np.int64)
    atoms = np.concatenate([none, *(part.atoms for part in parts if part is not None)])
    return Channels(dim=-1, atoms=atoms, parts=parts)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operation of the traced network, as a rule sees it."""

    node: fx.Node
    args: tuple[Any, ...]
    """The arguments with their values filled in."""
    kwargs: dict[str, Any]
    result: Any
    marks: dict[fx.Node, Mark]
    ledger: Ledger
    module: nn.Module | None
    name: str
    """The module's name, or else where in the network the function is called."""
    why: str = ""
    """Why nothing is known of an argument, if anything is."""

    @property
    def operation(self) -> str:
        """What a person calls the operation: ``Conv2d``, ``relu``, ``view``."""
        if self.module is not None:
            return type(self.module).__name__
        target = self.node.target
        return target if isinstance(target, str) else target.__name__

    @property
    def tied(self) -> str:
        """Why channels stay that an unknown argument goes with."""
        known = self.why and not self.why.startswith(UNKNOWN)
        return f"{UNKNOWN}: {self.why}" if known else self.why or UNKNOWN

    def unknown(self, count: int) -> Atoms:
        """Fresh frozen atoms, for the channels of an argument of which nothing is known."""
        return self.ledger.unknown(count, self.tied)

    def path(self, index: int, keyword: str) -> tuple[Any, ...]:
        """Where an argument is: by position, or by keyword."""
        return ("args", index) if index < len(self.args) else ("kwargs", keyword)

    def argument(self, index: int, keyword: str, default: Any = None) -> Any:
        """An argument's value."""
        if index < len(self.args):
            return self.args[index]
        return self.kwargs.get(keyword, default)

    def written(self, *path: Any) -> Any:
        """What the graph has at ``path``: a value written in the code, or an ``fx.Node``."""
        found: Any = getattr(self.node, path[0])
        for step in path[1:]:
            if isinstance(found, fx.Node):  # all of this is computed
                return found
            found = getattr(found, step) if isinstance(found, slice) else found[step]
        return found

    def mark(self, value: Any) -> Mark:
        """The mark of a written argument (an ``fx.Node`` or a plain value)."""
        return self.marks.get(value) if isinstance(value, fx.Node) else None

    @property
    def channels(self) -> Channels | None:
        """The atoms of the first tensor argument, or None where nothing is known of it."""
        return self.mark(next(self.tensors(), (None, None))[0])

    def channels_at(self, dim: int) -> Channels | None:
        """Likewise, where the operation needs them in dimension ``dim`` (negative: from the end).

        Raises:
            FreezeError: they are in another dimension.
        """
        channels = self.channels
        if channels is not None:
            dims = next(self.tensors())[1].dim()
            if channels.dim != dim % dims:
                raise FreezeError(f"'{self.name}' mixes the channels")
        return channels

    def tensors(self) -> Iterator[tuple[fx.Node, Tensor]]:
        """All tensors among the arguments (not those inside lists), with their nodes."""
        pairs = [*zip(self.node.args, self.args, strict=True)]
        pairs += [(self.node.kwargs[key], value) for key, value in self.kwargs.items()]
        for node, value in pairs:
            if isinstance(value, Tensor) and isinstance(node, fx.Node):
                yield node, value

    def parameter(self, name: str, dim: int, atoms: Atoms, *, reads: bool = False) -> None:
        """Dimension ``dim`` of the module's parameter or buffer ``name``, if any, has these atoms.

        Raises:
            FreezeError: it is neither, but computed (weight norm, spectral norm).
        """
        assert self.module is not None
        if getattr(self.module, name, None) is None:
            return
        own = (
            self.module.named_parameters(recurse=False),
            self.module.named_buffers(recurse=False),
        )
        if not any(name == known for entries in own for known, _ in entries):
            raise FreezeError(f"'{name}' of '{self.name}' is computed from other parameters")
        self._add("parameter", f"{self.name}.{name}", dim, atoms, reads)

    def writes(self, atoms: Atoms, attribute: str) -> None:
        """The module makes these channels; their number is in ``attribute``."""
        self._add("output", self.name, "", atoms)
        self.attribute(attribute, atoms)

    def reads(self, atoms: Atoms, attribute: str) -> None:
        """The module's weights read these channels; their number is in ``attribute``."""
        self._add("input", self.name, "", atoms)
        self.attribute(attribute, atoms)

    def attribute(self, attribute: str, atoms: Atoms) -> None:
        """The module's ``attribute`` is the number of these atoms."""
        self._add("attribute", self.name, attribute, atoms)

    def constant(self, path: tuple[Any, ...], atoms: Atoms) -> None:
        """If their number is written at ``path`` of the arguments, it follows these atoms.

        Raises:
            FreezeError: it cannot be edited.
        """
        written = self.written(*path)
        if not isinstance(written, int) or written != len(atoms) or written == 0:
            return
        if not self.ledger.constants_editable:
            raise FreezeError(
                f"the number {written} in '{self.name}' would have to change, and this network's "
                "forward takes another way in training, so its code must stay"
            )
        self._add("constant", self.node.name, path, atoms)

    def _add(self, kind: Any, owner: str, place: Any, atoms: Atoms, reads: bool = False) -> None:
        self.ledger.add(Axis(kind=kind, owner=owner, place=place, atoms=atoms, reads=reads))
