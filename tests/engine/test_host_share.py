"""How much of the attention the host takes, and that it follows who finishes first."""

import pytest

from headinfer.engine.balance import Balance


def run(balance: Balance, host_rate: float, device_rate: float, steps: int = 60) -> float:
    """Let both attend their shares of 32 layers, step by step; return the share at the end."""
    for _ in range(steps):
        for _ in range(32):
            host_s, device_s = balance.share / host_rate, (1 - balance.share) / device_rate
            late_s = host_s - device_s
            if late_s > 0:  # the device had its tiles before the host began
                late_s = host_s
            balance.note(late_s=late_s, host_s=host_s)
    return balance.share


@pytest.mark.parametrize("start", [0.05, 0.5, 0.95])
@pytest.mark.parametrize(("host_rate", "device_rate"), [(1.0, 1.0), (3.0, 1.0), (1.0, 4.0)])
def test_the_share_goes_where_both_finish_together(
    start: float, host_rate: float, device_rate: float
) -> None:
    share = run(Balance(start, fixed=False), host_rate, device_rate, steps=400)
    assert share == pytest.approx(host_rate / (host_rate + device_rate), rel=0.05)


def test_a_share_far_off_is_mended_within_32_tokens() -> None:
    assert run(Balance(0.5, fixed=False), 1.0, 3.0, steps=32) == pytest.approx(0.25, rel=0.1)


def test_a_fixed_share_stays() -> None:
    assert run(Balance(0.3, fixed=True), 1.0, 100.0) == 0.3


def test_a_share_of_nothing_stays_nothing() -> None:
    assert run(Balance(0.0, fixed=False), 1.0, 1.0) == 0.0
