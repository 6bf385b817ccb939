"""The thread that does jobs for flags: in their order, as often as asked, until its end."""

import shutil
import sys
import threading
import time

import pytest
import torch

from attended import attended, reference
from headinfer.attend.native.kernel import NativeKernel
from headinfer.attend.native.server import AttendTask, FlagServer
from headinfer.attend.partial import Partial
from headinfer.attend.work import tile_in_hand
from headinfer.kv.pair import KV

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="no server without a C compiler"
)
TASKS = 3


def served() -> tuple[FlagServer, list[KV], torch.Tensor, list[Partial]]:
    """Return a server that attends a tile for each flag, and what it reads and writes."""
    query = torch.randn(1, 2, 4, 1, 16)
    server = FlagServer(torch.zeros(2, TASKS, dtype=torch.int64))
    tiles, answers = [], []
    for index in range(TASKS):
        kv = KV(torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16))
        answer = Partial(torch.zeros(1, 2, 4, 1, 16), torch.zeros(1, 2, 4, 1))
        jobs = NativeKernel().jobs(query, answer, scale=0.5)
        assert jobs is not None
        job = jobs.make([tile_in_hand(kv)])
        assert job is not None
        server.set_task(index, AttendTask(job, [], []))
        tiles.append(kv)
        answers.append(answer)
    return server, tiles, query, answers


def wait_for(flag: torch.Tensor) -> bool:
    """Return whether a flag comes up within ten seconds."""
    for _ in range(10_000):
        if flag:
            return True
        time.sleep(0.001)
    return False


def test_each_flag_is_answered_in_turn_and_lowered() -> None:
    server, tiles, query, answers = served()
    server.begin()
    server.begin()  # the thread that is there
    for _round in range(3):
        query.copy_(torch.randn_like(query))
        server.expect()
        for index in range(TASKS):
            server.asks[index] = 1
            assert wait_for(server.answers[index])
            assert not server.asks[index]
            server.answers[index] = 0
            wanted = attended(reference(), query, *tiles[index], scale=0.5)
            torch.testing.assert_close(answers[index].out, wanted.out)
    server.end()


def test_the_end_releases_what_waits_for_an_answer() -> None:
    server, _, _, answers = served()
    server.begin()
    server.expect()  # and nothing asks for the second and the third
    server.asks[0] = 1
    assert wait_for(server.answers[0])
    server.answers[0] = 0
    server.end()
    assert server.answers.tolist() == [1] * TASKS
    assert not answers[1].out.any()


def test_nothing_is_done_before_it_is_asked_nor_before_its_turn() -> None:
    server, _, _, answers = served()
    server.begin()
    server.expect()
    server.asks[1] = 1
    time.sleep(0.05)
    assert not server.answers.any()
    server.asks[0] = 1
    assert wait_for(server.answers[1])
    assert answers[1].out.any()
    server.end()


def test_a_server_without_a_thread_ends_without_one() -> None:
    server, _, _, _ = served()
    server.expect()
    server.end()
    assert not server.answers.any()


def test_others_can_sleep_until_all_that_was_expected_is_answered() -> None:
    server, _, _, _ = served()
    server.begin()
    server.rest()  # nothing is expected
    rested: list[bool] = []

    def rest() -> None:
        server.rest()
        rested.append(bool(server.answers[TASKS - 1]))

    server.expect()
    thread = threading.Thread(target=rest)
    thread.start()
    for index in range(TASKS):
        time.sleep(0.02)
        assert rested == []
        server.asks[index] = 1
    thread.join(10)
    assert rested == [True]
    server.end()
