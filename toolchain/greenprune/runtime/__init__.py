"""What an app embeds: a bundle's pair of networks behind one session (device side).

::

    from greenprune.runtime import AdaptiveSession, Policy

    with AdaptiveSession("digits.bundle") as session:
        (logits,) = session.run(None, {"input": session.preprocess(image)})
        session.policy = Policy(max_accuracy_loss=0.01)
"""

from __future__ import annotations

from greenprune.runtime.drift import DriftGuard
from greenprune.runtime.outcome import RunInfo
from greenprune.runtime.policy import Policy
from greenprune.runtime.selector import decide
from greenprune.runtime.session import AdaptiveSession
from greenprune.runtime.statistics import Statistics

__all__ = ["AdaptiveSession", "DriftGuard", "Policy", "RunInfo", "Statistics", "decide"]
