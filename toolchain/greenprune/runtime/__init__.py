"""What an app embeds: a bundle's pair of networks behind one session (device side).

::

    from greenprune.runtime import AdaptiveSession

    with AdaptiveSession("digits.bundle") as session:
        (logits,) = session.run(None, {"input": session.preprocess(image)})
"""

from __future__ import annotations

from greenprune.runtime.selector import decide
from greenprune.runtime.session import AdaptiveSession, RunInfo, Statistics

__all__ = ["AdaptiveSession", "RunInfo", "Statistics", "decide"]
