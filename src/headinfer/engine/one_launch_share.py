"""The host's share of attention in steps of one launch, corrected by what these take."""

import statistics
from typing import NamedTuple

MOST_SHARE = 0.98
"""With all tokens the host would leave nothing to compare its time with."""

MOST_GROWTH = 0.3
"""Growth of a share at once, at the most, as a share of it."""

_SPARED_S, _MOST_SPARED = 1.1e-4, 0.08
"""How much more the host attends at first than in pieces: for so many seconds a layer.

The second number is the most that is added, as a share of the share.

Python is off the host's cores then, and the device reaches its questions earlier. Both spare a
layer some time, however long its context is. The link rests at the end of such a step, so that it
should not be what bounds the step.

Measured beside an H100, Llama-3-8B at 100K tokens:

- the host's attention: 9% less time in one launch
- a share of 0.57: 48.9 ms a step, and 46.9 in pieces
- a share of 0.63: 45.3 ms a step, and 47.6 in pieces

At 800K tokens, packed, a step took 556 to 581 ms in pieces, and 607 to 688 with 8% more.
"""

_STEPS = 3
"""Steps, behind the first one with a share, by which that is judged."""

_MOST_CHANGES = 4
"""Changes of a share: each needs another capture, which takes as long as some steps."""

_WORSE = 1.01
"""Time of a layer over what it was before, from which on a change of the share is taken back."""

_LEAST_GROWTH = 0.03
"""Growth of a share, as a share of it, that is worth another capture."""


class StepTimes(NamedTuple):
    """A measurement by the host of a step in one launch: means of its layers.

    Attributes:
        host_s: seconds that the host attended.
        waited_s: seconds from one answer to the next question.
        least_s: the least such wait of all layers. What the device computes between two attentions
            takes that, or less where each layer waits for the link.
    """

    host_s: float
    waited_s: float
    least_s: float

    @property
    def took_s(self) -> float:
        """Seconds of a layer."""
        return self.host_s + self.waited_s


class _Judged(NamedTuple):
    """A share, and what steps with it took.

    Attributes:
        share: the host's.
        new_tokens: of each step.
        took_s: seconds of a layer for each token of the context.
    """

    share: float
    new_tokens: int
    took_s: float


class OneLaunchShare:
    """A share of the host's in steps of one launch, which begins near the best one in pieces.

    A step in pieces is late also by the time of Python, which launches it: its best share is too
    small a one. In one launch the device is late where the host waits for some questions longer
    than for others. The share grows by that, as in a step of Newton's. A change that made steps
    slower is taken back.

    Measured beside an H200, Llama-3-8B, passes of 8 tokens behind 200K packed ones:

    - a share of 0.42, with which host and device finish together in pieces: 217 ms a pass
    - a share of 0.48: 192 ms, and the host waits for a fifth of it
    - a share of 0.53: 184 ms, and the host waits as long for each layer
    - a share of 0.58: 198 ms

    Args:
        in_pieces: the share that is best in pieces, or one that was not sought there.
        host_s: seconds that the host takes for a layer's; None where the share was not sought.

    Attributes:
        share: as it is now.
        changes: how often it was changed.
        judged: whether it stays: its last change cost time, or another one would spare little.
    """

    def __init__(self, in_pieces: float, host_s: float | None) -> None:
        more = min(_SPARED_S / host_s, _MOST_SPARED) if host_s is not None else 0.0
        self.share = min(in_pieces * (1 + more), MOST_SHARE)
        self.changes, self.judged = 0, False
        self._steps: list[tuple[float, float]] = []  # with this share: its growth, and `took_s`
        self._new_tokens = 0  # of these steps
        self._before: _Judged | None = None  # with the share before

    def note(self, times: StepTimes, new_tokens: int, tokens: int) -> None:
        """Take in a step with this share, until it is judged.

        Caches whose contexts are about as long share it. So a step is compared with others by its
        time for each token, and only with those of as many new ones.

        Args:
            times: of the step.
            new_tokens: of the step, in each row.
            tokens: of the context.
        """
        if new_tokens != self._new_tokens:
            self._new_tokens, self._steps = new_tokens, []
        late = (times.waited_s - times.least_s) / times.host_s
        growth = min(late * (1 - self.share), MOST_GROWTH)
        self._steps.append((growth, times.took_s / max(tokens, 1)))
        if len(self._steps) > _STEPS:
            steps, self._steps = self._steps[1:], []
            self._judge(*map(statistics.median, zip(*steps, strict=True)))

    def _judge(self, growth: float, took_s: float) -> None:
        """Let the share grow, take its last growth back, or have it stay."""
        before, self._before = self._before, None
        grown = min(self.share * (1 + growth), MOST_SHARE)
        comparable = before is not None and before.new_tokens == self._new_tokens
        if before is not None and comparable and took_s > _WORSE * before.took_s:
            self.share, self.judged = before.share, True
        elif self.changes == _MOST_CHANGES or grown < self.share * (1 + _LEAST_GROWTH):
            self.judged = True
            return
        else:
            self._before = _Judged(self.share, self._new_tokens, took_s)
            self.share = grown
        self.changes += 1
