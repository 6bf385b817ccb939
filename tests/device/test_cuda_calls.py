"""Calls of host functions in stream order: with a driver of our own, and on a GPU."""

import queue
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from headinfer.device import cuda_calls, cuda_driver
from headinfer.device.base import Edge
from headinfer.device.host_calls import NativeFunction

WAIT_S = 20.0


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )


class Stream:
    """Stands for torch's: what is asked of a stream to enqueue a call."""

    cuda_stream = 7
    device = torch.device("cuda:0")
    failed = False

    def query(self) -> bool:
        if self.failed:
            raise RuntimeError("an illegal memory access")
        return False


class Driver:
    """Calls on a thread of its own, one after another, as the driver does."""

    def __init__(self) -> None:
        self.refuse = False
        self.held = threading.Event()
        self.held.set()
        self._calls: queue.SimpleQueue[tuple[Callable[[int], None], int] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def cuLaunchHostFunc(self, stream: int, function: Callable[[int], None], number: int) -> int:
        assert stream == Stream.cuda_stream
        if self.refuse:
            return 700
        self._calls.put((function, number))
        return 0

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self.held.wait(WAIT_S)
            function, number = call
            function(number)

    def finish(self) -> None:
        self.held.set()
        self._calls.put(None)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver()
    monkeypatch.setattr(cuda_driver, "driver", lambda: driver)
    monkeypatch.setattr(cuda_calls, "_devices", set())
    yield driver
    driver.finish()
    assert not cuda_calls._pending
    assert cuda_calls._room._value == cuda_calls.MAX_PENDING_CALLS


def test_many_calls_run_in_order_on_another_thread(driver: Driver) -> None:
    ran: list[tuple[int, int]] = []
    for number in range(300):
        cuda_calls.enqueue_call(
            Stream(), lambda number=number: ran.append((number, threading.get_ident()))
        )
    driver.finish()
    assert [number for number, _ in ran] == list(range(300))
    assert threading.get_ident() not in {thread for _, thread in ran}


def test_the_caller_goes_on_while_a_function_is_held(driver: Driver) -> None:
    driver.held.clear()
    ran: list[int] = []
    for number in range(cuda_calls.MAX_PENDING_CALLS):
        cuda_calls.enqueue_call(Stream(), lambda number=number: ran.append(number))
    assert not ran
    driver.held.set()
    driver.finish()
    assert len(ran) == cuda_calls.MAX_PENDING_CALLS


def test_no_more_calls_are_pending_than_launches_between_them_allow(driver: Driver) -> None:
    driver.held.clear()
    for _ in range(cuda_calls.MAX_PENDING_CALLS):
        cuda_calls.enqueue_call(Stream(), lambda: None)
    caller = threading.Thread(target=cuda_calls.enqueue_call, args=(Stream(), lambda: None))
    caller.start()
    caller.join(0.1)
    assert caller.is_alive()
    driver.held.set()
    caller.join(WAIT_S)
    assert not caller.is_alive()


def test_a_device_that_failed_is_not_waited_for(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_calls, "_POLL_S", 0.05)
    driver.held.clear()
    for _ in range(cuda_calls.MAX_PENDING_CALLS):
        cuda_calls.enqueue_call(Stream(), lambda: None)
    stream = Stream()
    stream.failed = True
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cuda_calls.enqueue_call(stream, lambda: None)


def test_a_driver_that_refuses_is_reported(driver: Driver) -> None:
    driver.refuse = True
    for _ in range(2 * cuda_calls.MAX_PENDING_CALLS):
        with pytest.raises(RuntimeError, match="CUDA error 700"):
            cuda_calls.enqueue_call(Stream(), lambda: None)


def test_machine_code_is_given_to_the_driver_itself_and_in_any_number(driver: Driver) -> None:
    driver.held.clear()
    ran: list[int] = []
    for number in range(3 * cuda_calls.MAX_PENDING_CALLS):
        cuda_calls.enqueue_call(Stream(), NativeFunction(ran.append, number))
    assert not cuda_calls._pending
    assert cuda_calls._devices == {Stream.device}  # which is waited for at the end
    driver.finish()
    assert ran == list(range(3 * cuda_calls.MAX_PENDING_CALLS))


def test_a_driver_that_refuses_machine_code_is_reported(driver: Driver) -> None:
    driver.refuse = True
    with pytest.raises(RuntimeError, match="CUDA error 700"):
        cuda_calls.enqueue_call(Stream(), NativeFunction(lambda _: None, 1))


def test_an_error_does_not_get_into_the_driver(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[BaseException] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: heard.append(error.exc_value))
    ran: list[int] = []

    def fail() -> None:
        raise ArithmeticError("never mind")

    cuda_calls.enqueue_call(Stream(), fail)
    cuda_calls.enqueue_call(Stream(), lambda: ran.append(1))
    driver.finish()
    assert ran == [1]
    assert [str(error) for error in heard] == ["never mind"]


def test_the_interpreter_waits_for_what_is_pending_before_it_ends() -> None:
    """In a process of its own, with a driver that is slower than the program."""
    program = """
        import threading, time, torch
        from headinfer.device import cuda_calls, cuda_driver

        threads = []

        class Driver:
            def cuLaunchHostFunc(self, stream, function, number):
                def work():
                    time.sleep(0.3)
                    function(number)
                threads.append(threading.Thread(target=work, daemon=True))
                threads[-1].start()
                return 0

        class Stream:
            cuda_stream, device = 7, "cuda:0"

        cuda_driver.driver = Driver
        torch.cuda.synchronize = lambda device: [thread.join() for thread in threads]
        cuda_calls.enqueue_call(Stream, lambda: print("ran", flush=True))
        print("the end", flush=True)
    """
    result = run_program(program)
    assert result.stdout.split("\n")[:2] == ["the end", "ran"]
    assert "Error" not in result.stderr


@pytest.mark.gpu
class TestOnCuda:
    """The CUDA stream's `run`."""

    def make(self):
        from headinfer.device.cuda import CudaDevice

        return CudaDevice(torch.device("cuda", torch.cuda.current_device()))

    def test_mapped_memory_is_what_the_host_wrote_and_is_kept(self) -> None:
        device = self.make()
        memory = device.host_empty(8 * 2**20 + 4096).fill_(3)
        view = device.mapped(memory)
        assert view.is_cuda
        assert view.shape == memory.shape
        assert int(view.sum(dtype=torch.int64)) == 3 * memory.numel()
        memory[5] = 7
        assert int(view[5]) == 7
        del memory
        assert int(view[4:6].sum()) == 10

    def test_calls_are_ordered_between_a_copy_and_a_kernel(self) -> None:
        device = self.make()
        sent, memory = (device.host_empty(4096) for _ in range(2))
        sent, answer = sent.view(torch.float32), memory.view(torch.float32)
        answered = device.mapped(memory).view(torch.float32)
        for value in range(500):
            query = torch.full((1024,), float(value), device="cuda")
            torch.cuda._sleep(100_000)
            query += 1
            device.host_work.wait(device.compute.record(), Edge.QUERY_READY)
            device.host_work.copy(sent, query)
            device.host_work.run(lambda: answer.copy_(sent * 2))
            device.compute.wait(device.host_work.record(), Edge.ANSWERED)
            assert (answered == 2.0 * (value + 1)).all()

    def test_jobs_are_ordered_between_a_copy_and_a_kernel(self) -> None:
        from attended import attended, native
        from headinfer.attend.native.kernel import NativeKernel
        from headinfer.attend.partial import Partial
        from kv_tiles import tile_of

        device, shape = self.make(), (1, 2, 4, 1, 64)
        memory = device.host_empty(2048)
        answered, out = (part.view(torch.float32) for part in (device.mapped(memory), memory))
        sent, lse = (device.host_empty(bytes_).view(torch.float32) for bytes_ in (2048, 32))
        jobs = NativeKernel().jobs(
            sent.view(shape), Partial(out.view(shape), lse.view(shape[:-1])), scale=1.0
        )
        if jobs is None:
            pytest.skip("no C compiler")
        values = torch.randn(1, 2, 1000, 64)
        queries, answers, pending = torch.randn(100, 512), [], []
        for row in range(100):
            query = queries[row].cuda()
            device.host_work.wait(device.compute.record(), Edge.QUERY_READY)
            device.host_work.copy(sent, query)
            pending.append(jobs.make([tile_of(values, values, 9, 900 + row // 2)]))
            device.host_work.run(pending[-1])
            device.compute.wait(device.host_work.record(), Edge.ANSWERED)
            answers.append(answered.clone())
        device.synchronize()
        assert all(job.finished for job in pending)
        for row, answer in enumerate(answers):
            part = values[:, :, 9 : 909 + row // 2]
            wanted = attended(native(), queries[row].view(shape), part, part, scale=1.0)
            torch.testing.assert_close(answer.cpu().view(shape), wanted.out)

    def test_the_caller_does_not_wait(self) -> None:
        device, held = self.make(), threading.Event()
        torch.ones(10, device="cuda").add(1)  # a kernel that is loaded later waits for the device
        device.host_work.run(lambda: held.wait(WAIT_S))
        device.compute.wait(device.host_work.record(), Edge.ANSWERED)
        result = torch.ones(10, device="cuda") + 1
        done = device.compute.record()
        assert not done.reached
        held.set()
        done.synchronize(Edge.HOST_SETTLED)
        assert (result == 2).all()

    def test_thousands_of_launches_behind_a_call_do_not_hang(self) -> None:
        """In a process of its own: whoever waits for the device with Python's lock hangs."""
        result = run_program("""
            import time, torch
            from headinfer.device.base import Edge
            from headinfer.device.cuda import CudaDevice

            device = CudaDevice(torch.device("cuda", 0))
            number = torch.zeros(1, device="cuda")
            for _ in range(20):
                device.host_work.wait(device.compute.record(), Edge.QUERY_READY)
                device.host_work.run(lambda: time.sleep(0.02))
                device.compute.wait(device.host_work.record(), Edge.ANSWERED)
                for _ in range(500):
                    number += 1
                    device.compute.record()
            device.synchronize()
            print(int(number))
        """)
        assert result.stdout.strip() == str(20 * 500)

    def test_a_process_ends_while_calls_are_pending(self) -> None:
        result = run_program("""
            import time, torch
            from headinfer.device.cuda import CudaDevice

            device = CudaDevice(torch.device("cuda", 0))
            for number in range(3):
                device.host_work.run(lambda number=number: (time.sleep(0.2), print(number)))
        """)
        assert result.stdout.split() == ["0", "1", "2"]

    def test_timed_events_tell_their_order(self) -> None:
        device = self.make()
        for _ in range(20):
            device.host_work.run(lambda: time.sleep(0.005))
            answered = device.host_work.record(timed=True)
            done = device.compute.record(timed=True)
            device.synchronize()
            assert done.seconds_to(answered) > 0
            assert answered.seconds_to(done) < 0
