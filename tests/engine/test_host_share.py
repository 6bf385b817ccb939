"""How much of the attention the host takes, and that it follows who finishes first."""

import pytest

from headinfer.by_context import ByContext
from headinfer.engine.balance import Balance, Balances, Settled
from headinfer.engine.one_launch_share import StepTimes


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


def shares_of(
    host_idle: float, steps: int, start: float, *, one_launch: bool, longer: float = 1.0
) -> list[float]:
    """Return the share of each step where the host also waits for the device between layers.

    Times are as measured beside an H100 at 100K tokens, in ms of all layers over the share, or so
    many times as long.
    """
    balance, shares = Balance(start, fixed=False), []
    balance.one_launch = one_launch
    for _ in range(steps):
        shares.append(balance.share)
        for _ in range(32):
            host_s = 75 * balance.share
            link_s = 117 * (1 - balance.share)
            late_s = host_s if host_s + host_idle > link_s else host_s + host_idle - link_s
            a_layer = longer * 1e-3 / 32
            balance.note(late_s=late_s * a_layer, host_s=host_s * a_layer)
    return shares


@pytest.mark.parametrize("start", [0.5, 0.63, 0.8])
def test_a_step_on_the_way_to_the_best_share_costs_little(start: float) -> None:
    """The share never passes the best one by more than it was off at first."""
    best = (117 - 9) / (75 + 117)
    shares = shares_of(9, 100, start, one_launch=False)
    assert shares[-1] == pytest.approx(best, rel=0.05)
    assert shares[-1] >= best  # the link is the slower one of both
    assert max(abs(share - best) for share in shares) <= max(abs(start - best), 0.1 * best)


def test_the_host_attends_more_in_one_launch_once_its_share_is_settled() -> None:
    in_pieces, in_one = (shares_of(9, 60, 0.63, one_launch=one) for one in (False, True))
    assert in_one[:3] == in_pieces[:3]
    assert in_one[-1] == pytest.approx(1.08 * in_pieces[-1])


def test_what_one_launch_spares_a_layer_is_little_of_a_long_context() -> None:
    """It spares Python's time between layers, however many tokens these have."""
    in_pieces, in_one = (shares_of(9, 60, 0.63, one_launch=one, longer=8) for one in (False, True))
    assert in_one[-1] == pytest.approx((1 + 0.08 / 8) * in_pieces[-1], rel=0.005)


DEVICE_S = 0.2
"""Seconds of what a device computes between two layers' attentions."""


def in_one_launch(
    balance: Balance, host_s: float, link_s: float, steps: int = 60, *, memory_s: float = 0.0
) -> list[float]:
    """Let a settled balance have steps of one launch; return the share of each.

    Args:
        balance: settled.
        host_s: seconds of the host for a layer, over its share.
        link_s: seconds of the link for a layer, over the rest.
        steps: how many.
        memory_s: seconds that the host takes more for each tenth above a share of a half.
    """
    balance.one_launch = True
    shares = []
    for number in range(steps):
        share = balance.share
        shares.append(share)
        attended_s = share * host_s + max(share - 0.5, 0.0) * 10 * memory_s
        waited_s = max((1 - share) * link_s - attended_s, 0.0)
        noise_s = 5.0 if number % 4 == 0 else 0.0  # a first step behind a capture
        times = StepTimes(attended_s, waited_s + noise_s + DEVICE_S, DEVICE_S)
        balance.note_step(times, 1, 1000)
    return shares


def settled_at(share: float) -> Balance:
    return Balance(Settled(share, 1.0), fixed=False)


def test_steps_of_one_launch_have_the_share_with_which_the_host_waits_for_no_link() -> None:
    balance = settled_at(0.3)
    shares = in_one_launch(balance, 1.0, 1.2)
    assert shares[-1] == pytest.approx(1.2 / 2.2, rel=0.03)
    assert balance.judged
    assert balance.changes == len(set(shares)) - 1 <= 4
    assert shares == sorted(shares)
    balance.one_launch = False
    assert balance.share == 0.3  # in pieces, as before


def test_a_share_that_makes_steps_of_one_launch_slower_is_taken_back() -> None:
    balance = settled_at(0.45)
    shares = in_one_launch(balance, 1.0, 1.5, memory_s=1.0)
    assert max(shares) > 0.5
    assert shares[-1] == shares[0]
    assert (balance.judged, balance.changes) == (True, 2)


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_a_share_with_which_the_host_waits_for_nothing_stays_in_one_launch(share: float) -> None:
    balance = settled_at(share)
    assert in_one_launch(balance, 1.0, 1.01) == pytest.approx([share] * 60, rel=1e-3)
    assert (balance.judged, balance.changes) == (True, 0)


def test_a_share_of_caches_with_other_contexts_is_judged_by_the_time_of_a_token() -> None:
    """A longer cache takes longer, and that tells nothing of the share."""
    balance = settled_at(0.3)
    balance.one_launch = True
    for number in range(40):
        tokens, share = (1000, 1200)[number // 4 % 2], balance.share
        host_s, link_s = share * tokens, 1.2 * (1 - share) * tokens
        times = StepTimes(host_s, max(link_s - host_s, 0.0) + DEVICE_S, DEVICE_S)
        balance.note_step(times, 1, tokens)
    assert balance.share == pytest.approx(1.2 / 2.2, rel=0.03)


def test_a_share_is_judged_by_the_whole_wait_where_each_layer_waits_for_the_link() -> None:
    """Less is known to be the link's then than is: the share grows all the same."""
    balance = settled_at(0.3)
    balance.one_launch = True
    shares = []
    for _ in range(40):
        shares.append(balance.share)
        waited_s = max(1.2 * (1 - balance.share) - balance.share, 0.0)
        balance.note_step(StepTimes(balance.share, waited_s, max(waited_s - 0.06, 0.0)), 1, 1000)
    assert shares == sorted(shares)
    assert shares[-1] > 1.2 * shares[0]


def test_steps_of_several_tokens_are_compared_with_their_like() -> None:
    """Passes of 5 and of 8 new tokens have one share, and take the host other times."""
    balance = settled_at(0.3)
    balance.one_launch = True
    for number in range(40):
        new_tokens, share = (5, 8)[number // 4 % 2], balance.share
        times = StepTimes(new_tokens * share, 0.5 * share, 0.0)
        balance.note_step(times, new_tokens, 1000)
    assert balance.changes == 4
    assert balance.share > 0.33


def test_another_search_has_captures_of_its_own() -> None:
    """Those for the shares before are spent."""
    balance = settled_at(0.3)
    in_one_launch(balance, 1.0, 1.2)
    changes = balance.changes
    assert changes > 0
    run(balance, 3.0, 1.0)
    assert balance.changes > changes


def test_steps_in_pieces_leave_the_share_of_one_launch_alone() -> None:
    balance = settled_at(0.3)
    for _ in range(20):
        balance.note_step(StepTimes(1.0, 1.0, 0.0), 1, 1000)
    balance.one_launch = True
    assert balance.share == pytest.approx(0.3, rel=1e-3)
    assert not balance.judged


def test_a_share_stays_while_steps_wait_for_python() -> None:
    """The link fetches ahead meanwhile, so that the host is late with any share."""
    kept: list[Settled] = []
    balance = Balance(0.55, fixed=False, on_settled=kept.append)
    for number in range(400):
        balance.note(late_s=0.9, host_s=1.0, unasked=number % 32 > 2)
    assert (balance.share, balance.settled) == (0.55, True)
    balance.one_launch = True
    assert balance.share == 0.55
    balance.one_launch = False
    # Steps are longer than Python takes by now, and the host is the slower one.
    assert run(balance, 1.0, 3.0) == pytest.approx(0.25, rel=0.05)
    # Another cache that begins with it seeks it as well.
    assert run(Balance(kept[0], fixed=False), 1.0, 3.0) == pytest.approx(0.25, rel=0.05)


def test_steps_that_wait_for_python_now_and_then_have_their_share_sought() -> None:
    balance = Balance(0.55, fixed=False)
    for number in range(300):  # the first layers of a step follow what came between steps
        balance.note(late_s=0.9, host_s=1.0, unasked=number % 32 < 12)
    assert balance.share < 0.5


def test_a_share_with_which_the_host_is_late_now_and_then_stays() -> None:
    balance = Balance(0.55, fixed=False)
    for number in range(400):
        balance.note(late_s=(0.98, 0.1, -0.1)[number % 3], host_s=1.0)
    assert (balance.share, balance.settled) == (0.55, True)


def test_a_settled_share_follows_a_machine_that_changes() -> None:
    balance = Balance(0.5, fixed=False)
    run(balance, 1.0, 1.0)
    assert balance.settled
    assert run(balance, 3.0, 1.0) == pytest.approx(0.75, rel=0.05)  # the device has become late
    assert run(balance, 1.0, 1.0, steps=300) == pytest.approx(0.5, rel=0.05)  # the host has
    assert balance.settled


def test_a_fixed_share_stays() -> None:
    assert run(Balance(0.3, fixed=True), 1.0, 100.0) == 0.3


def test_a_share_of_nothing_stays_nothing() -> None:
    assert run(Balance(0.0, fixed=False), 1.0, 1.0) == 0.0


def test_passes_of_more_new_tokens_have_a_share_of_their_own() -> None:
    """What the host attends at the speed of memory for one token, it computes for sixteen."""
    balances = Balances(lambda tokens: 0.5 / tokens, fixed=False, kept=ByContext(), who=None)
    assert [balances.at(tokens).share for tokens in (1, 2, 9)] == [0.5, 0.25, 0.5 / 9]
    assert balances.at(16) is balances.at(9)
    assert run(balances.at(16), 0.2, 1.0, steps=400) == pytest.approx(0.2 / 1.2, rel=0.05)
    assert run(balances.at(1), 1.0, 1.0, steps=400) == pytest.approx(0.5, rel=0.05)
    assert balances.at(16).share == pytest.approx(0.2 / 1.2, rel=0.05)


def test_a_share_of_another_cache_is_sought_anew_after_as_many_notes_of_both() -> None:
    """However short the answers are: the load of a machine may have changed."""
    kept = ByContext[Settled]()

    def answer(host_rate: float, steps: int) -> float:
        balances = Balances(lambda _: 0.5, fixed=False, kept=kept, who=None)
        return run(balances.at(1), host_rate, 1.0, steps=steps)

    assert answer(1.5, 100) == pytest.approx(0.6, rel=0.05)
    for number in range(40):
        slower = answer(0.5, 6)
        assert number or slower == pytest.approx(0.6, rel=0.05)
    assert answer(0.5, 100) == pytest.approx(1 / 3, rel=0.1)
