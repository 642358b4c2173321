"""Rules of operations that join, cut and move channels; see :mod:`.rules`.

Pieces that must stay of one size (chunks, the groups of a shuffle) are united place by place, so
that they are, whatever is removed.
"""

from __future__ import annotations

import operator
from math import prod
from typing import Any, cast

import numpy as np
from torch import Tensor, fx, nn

from greenprune.pruning.atoms import Atoms, Call, Channels, FreezeError, Mark, together


def concatenation(call: Call) -> Mark:
    """Along the channels atoms follow one another; along another dimension they are united."""
    nodes, values = call.written(*call.path(0, "tensors")), call.argument(0, "tensors")
    if not isinstance(nodes, list | tuple):
        raise FreezeError(f"the inputs of '{call.name}' are not followed")
    marks = [call.mark(node) for node in nodes]
    known = [mark for mark in marks if mark is not None]
    if not known:
        return None
    dim = known[0].dim
    if any(mark.dim != dim for mark in known):
        raise FreezeError(f"'{call.name}' joins channels with another dimension")
    parts = [
        mark.atoms if mark else call.unknown(value.shape[dim])
        for mark, value in zip(marks, values, strict=True)
    ]
    along = call.kwargs.get("axis", call.argument(1, "dim", 0))
    if along % values[0].dim() == dim:
        return Channels(dim=dim, atoms=np.concatenate(parts))
    for part in parts[1:]:
        call.ledger.unite(parts[0], part)
    return Channels(dim=dim, atoms=parts[0])


def padding(call: Call) -> Mark:
    """Padded channels are new atoms: constants, which go with what they are added to."""
    channels = call.channels
    if channels is None:
        return None
    amounts = call.argument(1, "pad")
    first = 2 * (next(call.tensors())[1].dim() - 1 - channels.dim)
    before, after = amounts[first : first + 2] if first < len(amounts) else (0, 0)
    if before == after == 0:
        return channels
    path = call.path(1, "pad")
    written = call.written(*path)
    if not isinstance(written, list | tuple) or call.argument(2, "mode", "constant") != "constant":
        raise FreezeError(f"'{call.name}' pads the channels in a way that is not followed")
    parts = []
    for place, amount in ((first, before), (first + 1, after)):
        if not isinstance(written[place], int) or amount < 0:
            raise FreezeError(f"'{call.name}' pads the channels by a computed or negative number")
        parts.append(call.ledger.new(amount))
        call.constant((*path, place), parts[-1])
    return Channels(dim=channels.dim, atoms=np.concatenate([parts[0], channels.atoms, parts[1]]))


def indexing(call: Call) -> Mark:
    """``x[...]`` with slices: a slice of the channels is a sublist of their atoms."""
    channels = call.mark(call.node.args[0])
    if channels is None:
        return None
    if not isinstance(call.args[0], Tensor):
        return _item(call, channels)
    dim = read = 0
    for place, item in _index_items(call):
        if read == channels.dim and item is not None:
            return Channels(dim=dim, atoms=_slice_channels(call, channels.atoms, place, item))
        read += item is not None
        dim += not isinstance(item, int)
    return Channels(dim=dim + channels.dim - read, atoms=channels.atoms)


def _item(call: Call, channels: Channels) -> Mark:
    """An item of a tuple or list, such as a recurrent layer's output."""
    index = call.args[1]
    if not isinstance(index, int) or not channels.parts:
        raise FreezeError(f"'{call.name}' picks from a list in a way that is not followed")
    return channels.parts[index]


def _index_items(call: Call) -> list[tuple[int, int | slice | None]]:
    """What is in the brackets and where it is written, with ``...`` spelled out."""
    value, index = call.args[0], call.args[1]
    items = list(enumerate(index if isinstance(index, tuple) else [index]))
    if not all(item is None or item is ... or isinstance(item, int | slice) for _, item in items):
        raise FreezeError(f"'{call.name}' picks with a tensor or a list")
    ellipsis = next((place for place, item in items if item is ...), None)
    if ellipsis is not None:
        named = sum(item not in (None, ...) for _, item in items)
        items[ellipsis : ellipsis + 1] = [(ellipsis, slice(None))] * (value.dim() - named)
    return items


def _slice_channels(call: Call, atoms: Atoms, place: int, item: int | slice) -> Atoms:
    if item == slice(None):
        return atoms
    if isinstance(item, int) or item.step not in (None, 1):
        raise FreezeError(f"'{call.name}' picks single channels")
    for bound in ("start", "stop"):
        path = ("args", 1, place, bound)
        number = call.written(*path)
        if number is None:
            continue
        if not isinstance(number, int) or number < 0:
            raise FreezeError(f"'{call.name}' slices the channels at a computed or negative place")
        call.constant(path, atoms[:number])
    return atoms[item]


def chunks(call: Call) -> Mark:
    """``chunk`` and ``tensor_split`` into a number of pieces, which must be of one size."""
    channels = call.channels
    if channels is None:
        return None
    dim = call.argument(2, "dim", 0) % _rank(call)
    if dim == channels.dim and call.argument(1, "chunks") != len(call.result):
        raise FreezeError(f"'{call.name}' cuts the channels at places that are not followed")
    return _pieces(call, channels, dim, equal=True)


def split(call: Call) -> Mark:
    """``split`` into pieces of one size, or of sizes in a list."""
    channels = call.channels
    if channels is None:
        return None
    dim = call.argument(2, "dim", 0) % _rank(call)
    path = call.path(1, "split_size")
    equal = isinstance(call.argument(1, "split_size"), int)
    result = _pieces(call, channels, dim, equal=equal)
    if dim != channels.dim:
        return result
    written = call.written(*path)
    if not equal and (isinstance(written, fx.Node) or any(isinstance(n, fx.Node) for n in written)):
        raise FreezeError(f"'{call.name}' cuts the channels at computed places")
    for place, piece in enumerate(result.parts[:1] if equal else result.parts):
        assert piece is not None
        call.constant(path if equal else (*path, place), piece.atoms)
    return result


def _pieces(call: Call, channels: Channels, dim: int, *, equal: bool) -> Channels:
    """The marks of the pieces along ``dim``; ``equal``: the code demands pieces of one size."""
    if dim != channels.dim:
        return together(*[channels] * len(call.result))
    sizes = [piece.shape[dim] for piece in call.result]
    pieces = np.split(channels.atoms, np.cumsum(sizes)[:-1])
    if equal:
        if len(set(sizes)) > 1:
            raise FreezeError(f"'{call.name}' cuts the channels into pieces of unequal size")
        for piece in pieces[1:]:
            call.ledger.unite(pieces[0], piece)
    return together(*(Channels(dim=dim, atoms=piece) for piece in pieces))


def unbinding(call: Call) -> Mark:
    """Along another dimension than the channels'."""
    channels = call.channels
    if channels is None:
        return None
    gone = call.argument(1, "dim", 0) % _rank(call)
    if gone == channels.dim:
        raise FreezeError(f"'{call.name}' picks single channels")
    left = Channels(dim=channels.dim - (gone < channels.dim), atoms=channels.atoms)
    return together(*[left] * len(call.result))


def permutation(call: Call) -> Mark:
    """``permute``: the channels move to another dimension."""
    channels = call.channels
    if channels is None:
        return None
    dims = call.argument(1, "dims")
    order = [dims, *call.args[2:]] if isinstance(dims, int) else dims
    moved = [dim % _rank(call) for dim in order]
    return Channels(dim=moved.index(channels.dim), atoms=channels.atoms)


def transposition(call: Call) -> Mark:
    """``transpose``: two dimensions change places."""
    channels = call.channels
    if channels is None:
        return None
    first, second = (call.argument(1 + i, f"dim{i}") % _rank(call) for i in (0, 1))
    dim = {first: second, second: first}.get(channels.dim, channels.dim)
    return Channels(dim=dim, atoms=channels.atoms)


def expansion(call: Call) -> Mark:
    """``expand``: other dimensions are repeated."""
    channels = call.channels
    if channels is None:
        return None
    dim = channels.dim + call.result.dim() - _rank(call)
    if call.result.shape[dim] != len(channels.atoms):
        raise FreezeError(f"spread over all channels by '{call.name}'")
    _follow_size(call, dim, channels.atoms)
    return Channels(dim=dim, atoms=channels.atoms)


def pixel_shuffle(call: Call) -> Mark:
    """The channels that make one map of the larger image go together."""
    channels = call.channels_at(-3)
    if channels is None:
        return None
    by_map = channels.atoms.reshape(call.result.shape[channels.dim], -1)
    call.ledger.unite(by_map[:, :1], by_map)
    return Channels(dim=channels.dim, atoms=by_map[:, 0])


def pixel_unshuffle(call: Call) -> Mark:
    """Each channel becomes several."""
    channels = call.channels_at(-3)
    if channels is None:
        return None
    times = call.result.shape[channels.dim] // len(channels.atoms)
    return Channels(dim=channels.dim, atoms=np.repeat(channels.atoms, times))


def channel_shuffle(call: Call) -> Mark:
    """Channel i of every group; so they go together."""
    channels = call.channels_at(1)
    if channels is None:
        return None
    layer = cast("nn.ChannelShuffle | None", call.module)
    groups = call.argument(1, "groups") if layer is None else layer.groups
    by_group = channels.atoms.reshape(groups, -1)
    call.ledger.unite(by_group[:1], by_group)
    return Channels(dim=1, atoms=np.repeat(by_group[0], len(by_group)))


def _rank(call: Call) -> int:
    return next(call.tensors())[1].dim()


def reshape(call: Call) -> Mark:
    """Flatten, squeeze and their kin: the channels are merged with dimensions around them."""
    channels = call.channels
    return _merged(call, channels) if channels is not None else None


def view(call: Call) -> Mark:
    """``view`` and ``reshape`` to sizes that the code may spell out; channels may be split too."""
    channels = call.channels
    if channels is None:
        return None
    try:
        result = _merged(call, channels)
    except FreezeError:
        result = _divided(call, channels)
    _check_neighbours(call, result.dim)
    _follow_size(call, result.dim, result.atoms)
    return result


def _check_neighbours(call: Call, dim: int) -> None:
    """A shuffle with one channel a group looks as if the groups were the channels.

    Raises:
        FreezeError: the size beside the channels is 1, computed, and may be what has to shrink.
    """
    if not isinstance(_written_size(call, dim), int):
        return
    for beside in {dim - 1, dim + 1} & set(range(1, call.result.dim())):
        written = _written_size(call, beside)
        computed = isinstance(written, fx.Node) and written.target is not operator.getitem
        if call.result.shape[beside] == 1 and (computed or written == -1):
            raise FreezeError(f"'{call.name}' splits the channels into parts of one channel")


def _merged(call: Call, channels: Channels) -> Channels:
    """The channels, with dimensions before and after them, as one dimension of the result.

    A dimension of the result that holds ``before`` x channels x ``after`` has each atom ``after``
    times in a row, and all of this ``before`` times. The batch stays a dimension of its own.
    """
    old, new = next(call.tensors())[1].shape, call.result.shape
    outer, inner = prod(old[: channels.dim]), prod(old[channels.dim + 1 :])
    width = len(channels.atoms)
    first = 1 if new[0] % old[0] == 0 else len(new)
    for dim in range(first, len(new)):
        before, outer_rest = divmod(outer, prod(new[:dim]))
        after, inner_rest = divmod(inner, prod(new[dim + 1 :]))
        if not outer_rest and not inner_rest and before * width * after == new[dim]:
            atoms = np.tile(np.repeat(channels.atoms, after), before)
            return Channels(dim=dim, atoms=atoms)
    raise FreezeError(f"'{call.name}' splits the channels or merges them with the batch")


def _divided(call: Call, channels: Channels) -> Channels:
    """The channels as several dimensions of the result, one of which may get smaller.

    The others keep their sizes (the groups of a channel shuffle): atoms that differ in nothing
    else go together, and stand in the dimension that shrinks.
    """
    old, new = next(call.tensors())[1].shape, call.result.shape
    outer, width = prod(old[: channels.dim]), len(channels.atoms)
    spans = [
        (start, stop)
        for start in range(1, len(new))
        for stop in range(start + 2, len(new) + 1)
        if new[0] % old[0] == 0 and prod(new[:start]) == outer and prod(new[start:stop]) == width
    ]
    if not spans:
        raise FreezeError(f"'{call.name}' mixes the channels with other dimensions")
    start, stop = min(spans, key=lambda span: span[1] - span[0])  # dimensions of 1 left out
    dim = _shrinking(call, range(start, stop))
    grid = np.moveaxis(channels.atoms.reshape(new[start:stop]), dim - start, 0)
    by_index = grid.reshape(new[dim], -1)
    call.ledger.unite(by_index[:, :1], by_index)
    return Channels(dim=dim, atoms=by_index[:, 0])


def _shrinking(call: Call, dims: range) -> int:
    """Of the dimensions that channels are split into: the one whose size is computed from theirs.

    Where the code spells all of them out, the largest.
    """
    computed = []
    for dim in dims:
        written = _written_size(call, dim)
        mark = call.mark(written)
        if written in (-1, None) or (mark is not None and len(mark.atoms)):
            computed.append(dim)
    if len(computed) > 1:
        raise FreezeError(f"'{call.name}' splits the channels into computed sizes")
    return computed[0] if computed else max(dims, key=lambda dim: call.result.shape[dim])


def _size_path(call: Call, dim: int) -> tuple[Any, ...] | None:
    """Where the size of the result's dimension ``dim`` is written, if it is by itself."""
    path = call.path(1, "shape")
    if isinstance(call.argument(1, "shape"), int):  # x.view(a, b)
        return ("args", 1 + dim)
    return (*path, dim) if isinstance(call.written(*path), list | tuple) else None  # x.view((a, b))


def _written_size(call: Call, dim: int) -> Any:
    """What the code has there: an int, a node of the graph, or None where it has no place."""
    path = _size_path(call, dim)
    return call.written(*path) if path else None


def _follow_size(call: Call, dim: int, atoms: Atoms) -> None:
    """If the size of the result's dimension ``dim`` is written in the code, it follows these."""
    path = _size_path(call, dim)
    if path is not None:
        call.constant(path, atoms)
