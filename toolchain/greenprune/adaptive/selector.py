"""The selector: for each input, will the aggressive network's answer do?

A small head on the aggressive network's pooled features and the shape of its logits, trained on
images that no network was trained on. Its score starts as the maximum softmax probability (MSP)
and is shipped only where it beats MSP (docs/methods.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional as F

from greenprune.bundle import Preprocessing
from greenprune.data import Split, batches
from greenprune.errors import PruningError, WeightsError
from greenprune.recipe import SelectorSettings

HOLD_OUT = 0.4
"""Share of the selector's images that is kept to judge the head by."""
BOOTSTRAPS = 2000
THRESHOLDS = 100
BATCH = 250


class SelectorHead(nn.Module):
    """Score of an answer, in (0, 1): higher is safer to accept.

    ``score = sigmoid(logit(MSP) + correction)``; the correction is zero at the start, so an
    untrained head is MSP exactly.
    """

    def __init__(self, features: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.top = min(3, classes)
        width = features + self.top + 4
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.hidden = nn.Linear(width, hidden)
        self.correction = nn.Linear(hidden, 1)
        nn.init.zeros_(self.correction.weight)
        nn.init.zeros_(self.correction.bias)

    mean: Tensor
    std: Tensor

    def describe(self, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of the head, [N, features + top + 4], and logit(MSP), [N]."""
        ordered = torch.topk(logits, k=logits.shape[1], dim=1).values
        probabilities = torch.softmax(ordered, dim=1)
        log_probabilities = torch.log_softmax(ordered, dim=1)
        # log p - log(1 - p) without forming 1 - p, which rounds to zero for sure answers
        msp_logit = ordered[:, 0] - torch.logsumexp(ordered[:, 1:], dim=1)
        shape = torch.stack(
            [
                probabilities[:, 0],
                probabilities[:, 0] - probabilities[:, 1],
                -(probabilities * log_probabilities).sum(dim=1),
                torch.logsumexp(ordered, dim=1),
            ],
            dim=1,
        )
        return torch.cat([features, ordered[:, : self.top], shape], dim=1), msp_logit

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Score, float32 [N], of features [N, F] and logits [N, classes]."""
        inputs, msp_logit = self.describe(features, logits)
        correction = self.correction(torch.relu(self.hidden((inputs - self.mean) / self.std)))
        return torch.sigmoid(msp_logit + correction.squeeze(1))


class ScoredNetwork(nn.Module):
    """A network and its selector in one graph: images -> (logits, score)."""

    def __init__(self, network: nn.Module, head: SelectorHead) -> None:
        super().__init__()
        self.tapped = tap(network)
        self.head = head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, classes] and score [N]."""
        logits, features = self.tapped(images)
        return logits, self.head(features, logits)


def untrained(network: nn.Module, example_input: Tensor, hidden: int) -> ScoredNetwork:
    """A network and a head that has learned nothing, to measure what the two cost.

    Raises:
        PruningError: as :func:`tap`, or its answers are not [N, classes].
    """
    with torch.no_grad():
        logits, features = tap(network)(example_input)
    if logits.ndim != 2:
        raise PruningError(
            f"the selector reads logits: expected [N, classes], got {list(logits.shape)}"
        )
    return ScoredNetwork(network, SelectorHead(features.shape[1], logits.shape[1], hidden)).eval()


class MspNetwork(nn.Module):
    """A network and its maximum softmax probability: images -> (logits, score).

    What an untrained head answers too, without its cost: on a small network the head's dozen small
    operations take as long as a convolution.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, classes] and score [N]."""
        logits = self.network(images)
        return logits, torch.softmax(logits, dim=1).amax(dim=1)


def tap(network: nn.Module) -> fx.GraphModule:
    """The same network with a second output: the pooled features that its classifier reads.

    The classifier is the linear layer or convolution whose output, at most reshaped, pooled or
    passed through an activation, is the network's. Features are float32 [N, F].

    Raises:
        PruningError: the network cannot be traced, or has no such classifier.
    """
    try:
        traced = fx.symbolic_trace(network)
    except Exception as error:
        raise PruningError(f"the network cannot be traced for its features: {error}") from error
    output = next(node for node in traced.graph.nodes if node.op == "output")
    node = output.args[0]
    while isinstance(node, fx.Node) and not _is_classifier(traced, node):
        sources = node.all_input_nodes
        node = sources[0] if len(sources) == 1 else None
    if not isinstance(node, fx.Node):
        raise PruningError(
            "the selector reads what the network's classifier reads, and none was found: expected "
            "an nn.Linear or nn.Conv2d module whose output, at most reshaped, is the network's"
        )
    read = node.all_input_nodes[0]
    with traced.graph.inserting_before(output):
        features = traced.graph.call_function(_pooled, (read,))
    output.args = ((output.args[0], features),)
    traced.recompile()
    return traced


def _is_classifier(traced: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(
        traced.get_submodule(str(node.target)), nn.Linear | nn.Conv2d
    )


def _pooled(values: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C] by the mean; [N, F] as it is."""
    return values.mean(dim=(2, 3)) if values.dim() == 4 else values.flatten(1)


def observe(
    network: nn.Module, split: Split, preprocessing: Preprocessing | None
) -> tuple[Tensor, Tensor]:
    """Logits, float32 [N, classes], and pooled features, float32 [N, F], of a split."""
    tapped = tap(network.eval())
    with torch.no_grad():
        parts = [tapped(inputs) for inputs, _ in batches(split, preprocessing, BATCH)]
    logits, features = (torch.cat(part) for part in zip(*parts, strict=True))
    return logits, features


@dataclass(frozen=True, kw_only=True)
class SelectorResult:
    """The selector that is shipped, and why."""

    head: SelectorHead | None
    """The trained head; None where MSP is shipped."""
    reason: str
    thresholds: tuple[float, ...]
    """Quantiles of the score on the hold-out, strict to loose."""
    area_head: float
    area_msp: float


def train(
    features: Tensor,
    logits: Tensor,
    mild_score: Tensor,
    aggressive_score: Tensor,
    settings: SelectorSettings,
    *,
    seed: int,
) -> SelectorResult:
    """Train the head and choose between it and MSP.

    Args:
        features: the aggressive network's pooled features, float32 [N, F].
        logits: its logits, float32 [N, classes].
        mild_score: the metric of the mild network's answers, [N] in [0, 1].
        aggressive_score: of the aggressive network's, [N].
        settings: width and schedule.
        seed: of the split, the initial weights and the bootstrap.

    An answer does *harm* where mild's is better. The head is fitted with class-weighted binary
    cross-entropy on one part and shipped where its harm-versus-coverage area on the other part is
    below MSP's in 95% of paired bootstraps.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(logits), generator=generator)
    held = max(1, round(HOLD_OUT * len(order)))
    hold_out, fit = order[:held], order[held:]
    harm = (mild_score > aggressive_score).float()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = SelectorHead(features.shape[1], logits.shape[1], settings.hidden)
    harms = int(harm[fit].sum())
    if 0 < harms < len(fit):
        _fit(head, features[fit], logits[fit], harm[fit], settings)

    with torch.no_grad():
        head_scores = head(features[hold_out], logits[hold_out]).double().numpy()
        msp_scores = torch.softmax(logits[hold_out], dim=1).amax(dim=1).double().numpy()
    better, reason, areas = _compare(
        head_scores, msp_scores, harm[hold_out].double().numpy(), harms, seed
    )
    scores = head_scores if better else msp_scores
    quantiles = np.quantile(scores, np.linspace(1.0, 0.0, THRESHOLDS))
    return SelectorResult(
        head=head.eval() if better else None,
        reason=reason,
        thresholds=tuple(float(value) for value in np.unique(quantiles)[::-1]),
        area_head=areas[0],
        area_msp=areas[1],
    )


def _fit(
    head: SelectorHead, features: Tensor, logits: Tensor, harm: Tensor, settings: SelectorSettings
) -> None:
    """Full-batch Adam; the class weight makes harms and non-harms count the same."""
    with torch.no_grad():
        inputs, msp_logit = head.describe(features, logits)
        head.mean.copy_(inputs.mean(dim=0))
        head.std.copy_(inputs.std(dim=0).clamp_min(1e-6))
    safe = 1.0 - harm
    weight = torch.where(harm > 0, 0.5 / harm.mean(), 0.5 / safe.mean())
    optimizer = torch.optim.AdamW(
        [*head.hidden.parameters(), *head.correction.parameters()],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    for _ in range(settings.epochs):
        optimizer.zero_grad()
        hidden = torch.relu(head.hidden((inputs - head.mean) / head.std))
        logit = msp_logit + head.correction(hidden).squeeze(1)
        F.binary_cross_entropy_with_logits(logit, safe, weight=weight).backward()
        optimizer.step()


def harm_coverage_area(scores: NDArray[np.float64], harm: NDArray[np.float64]) -> float:
    """Mean, over all coverages, of the share of inputs that are accepted and harmed; lower is
    better. 0 where no input is harmed."""
    order = np.argsort(-scores, kind="stable")
    return float(np.cumsum(harm[order]).mean() / len(harm))


def _compare(
    head: NDArray[np.float64],
    msp: NDArray[np.float64],
    harm: NDArray[np.float64],
    harms_fitted: int,
    seed: int,
) -> tuple[bool, str, tuple[float, float]]:
    """Whether the head is better for sure, the finding in words, and both areas."""
    areas = (harm_coverage_area(head, harm), harm_coverage_area(msp, harm))
    if not harms_fitted or not harm.any():
        return False, "too few harmed images to train or judge a head", areas
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(harm), size=(BOOTSTRAPS, len(harm)))
    gains = [
        harm_coverage_area(msp[draw], harm[draw]) - harm_coverage_area(head[draw], harm[draw])
        for draw in draws
    ]
    low = float(np.quantile(gains, 0.05))
    verdict = f"harm-versus-coverage area {areas[0]:.5f} against MSP's {areas[1]:.5f}"
    if low > 0:
        return True, f"{verdict}; better in 95% of {BOOTSTRAPS} paired bootstraps", areas
    return False, f"{verdict}; not better in 95% of {BOOTSTRAPS} paired bootstraps", areas


def to_bytes(head: SelectorHead) -> bytes:
    """The head's weights as safetensors."""
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in head.state_dict().items()})


def from_bytes(head: SelectorHead, content: bytes) -> None:
    """Load :func:`to_bytes` into ``head``.

    Raises:
        WeightsError: the bytes are not the weights of such a head.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        head.load_state_dict(load(content))
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(
            f"selector.safetensors does not hold this selector's weights ({error}); "
            "remove the run's selector folder and run again"
        ) from error
