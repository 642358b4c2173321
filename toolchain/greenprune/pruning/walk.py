"""Walking through a traced network: what the rules say of each operation goes into a ledger."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from greenprune.errors import PruningError
from greenprune.pruning import rules
from greenprune.pruning.atoms import Axis, Call, Channels, FreezeError, Ledger, Mark


def trace(model: nn.Module, *, training: bool) -> tuple[nn.Module, fx.Graph]:
    """A copy of ``model`` in eval mode and its graph, with branches taken as in the mode asked for.

    Raises:
        PruningError: torch.fx cannot trace it.
    """
    try:
        traced = copy.deepcopy(model).train(training)
        graph = fx.Tracer().trace(traced)
    except Exception as error:
        raise PruningError(
            f"{type(model).__name__} cannot be traced: {error}; expected a forward without "
            "branches or loops that depend on the input's values"
        ) from error
    return traced.eval(), graph


class Walk(fx.Interpreter):
    """Runs a graph node by node, and applies each operation's rule beside it.

    Afterwards ``unfollowed`` has the layers whose rules could not follow, with the reason.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, ledger: Ledger) -> None:
        super().__init__(model, graph=graph)
        self.model = model
        self.ledger = ledger
        self.marks: dict[fx.Node, Mark] = {}
        self.called: set[str] = set()
        self.shared = _modules_that_share_parameters(model)
        self.unfollowed: list[tuple[str, str]] = []
        self.why: dict[fx.Node, str] = {}
        self.alone: set[str] = set()
        """Parameters that the code reads by themselves."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """As ever; then what belongs to a parameter that is read by itself as well stays."""
        result = super().run(*args, **kwargs)
        for axis in self.ledger.axes.values():
            if axis.kind == "parameter" and axis.owner in self.alone:
                self.ledger.freeze(axis.atoms, f"'{axis.owner}' is read by itself as well")
        return result

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = super().run_node(n)
        if n.op == "placeholder":
            self.marks[n] = self._input(result)
        elif n.op == "output":
            self._freeze_inputs(n, "an output of the network")
        elif n.op == "get_attr":
            self.why[n] = f"'{n.target}' is a parameter by itself"
            self.alone.add(str(n.target))
        else:
            self.marks[n] = (
                self._call(n, args, kwargs, result) if _holds_tensor(result) else self._number(n)
            )
        return result

    def _number(self, node: fx.Node) -> Mark:
        """Sizes, and what is computed from them, may depend on all atoms that went in."""
        marks = [self.marks.get(source) for source in node.all_input_nodes]
        atoms = [mark.atoms for mark in marks if mark is not None]
        return Channels(dim=-1, atoms=np.concatenate(atoms)) if atoms else None

    def _input(self, value: Any) -> Mark:
        if not isinstance(value, Tensor) or value.dim() < 2:
            return None
        atoms = self.ledger.new(value.shape[1])
        self.ledger.freeze(atoms, "tied to the network's input")
        return Channels(dim=1, atoms=atoms)

    def _call(self, node: fx.Node, args: Any, kwargs: Any, result: Any) -> Mark:
        module = self.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        name = str(node.target) if module is not None else _place(node)
        unknown = (source for source in node.all_input_nodes if self.marks.get(source) is None)
        why = next((self.why[source] for source in unknown if source in self.why), "")
        call = Call(
            node=node,
            args=args,
            kwargs=kwargs,
            result=result,
            marks=self.marks,
            ledger=self.ledger,
            module=module,
            name=name,
            why=why,
        )
        try:
            if module is not None:
                self._check_unshared(name, module)
            mark = rules.apply(call)
        except (FreezeError, KeyError, TypeError, IndexError) as error:
            mark, why = None, str(error)
            if not isinstance(error, FreezeError):  # keywords that the rule does not know
                why = f"'{name}' is called in a way that is not followed"
            self._freeze_inputs(node, why)
            if module is not None and any(True for _ in module.parameters()):
                self.unfollowed.append((name, why.replace(f"'{name}'", "it")))
        if mark is None and why:
            self.why[node] = why
        return mark

    def _check_unshared(self, name: str, module: nn.Module) -> None:
        if module in self.shared:
            raise FreezeError(f"'{name}' shares a parameter with another layer")
        again = name in self.called
        self.called.add(name)
        own = [axis for axis in self.ledger.axes.values() if _belongs(axis, name)] if again else []
        if own:
            reason = f"'{name}' is called more than once"
            for axis in own:
                self.ledger.freeze(axis.atoms, reason)
            raise FreezeError(reason)

    def _freeze_inputs(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            mark = self.marks.get(source)
            if mark is not None:
                self.ledger.freeze(mark.atoms, reason)


def _place(node: fx.Node) -> str:
    """Where a function is called, for people: the innermost module and the node's own name."""
    modules = list(node.meta.get("nn_module_stack", {}))
    return f"{modules[-1]}.{node.name}" if modules else node.name


def _belongs(axis: Axis, module: str) -> bool:
    owner = axis.owner.rpartition(".")[0] if axis.kind == "parameter" else axis.owner
    return axis.kind != "constant" and owner == module


def _modules_that_share_parameters(model: nn.Module) -> set[nn.Module]:
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return {module for sharing in owners.values() if len(sharing) > 1 for module in sharing}


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_holds_tensor(item) for item in value)
    if isinstance(value, dict):
        return any(_holds_tensor(item) for item in value.values())
    return isinstance(value, Tensor)
