"""Jobs of the compiled kernels: the same results as the kernel's own, and the definition's."""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import psutil
import pytest
import torch

from headinfer.attend.native.job import Jobs
from headinfer.attend.native.kernel import NativeKernel, decode_library
from headinfer.attend.partial import Accumulator, Partial
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.work import Work
from kv_tiles import tile_of

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="no jobs without a C compiler"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}
SCALE = 0.2
SPANS = [(1,), (1037,), (700, 1, 63), (17, 2049, 5, 512), (3, 0, 70), (0, 4)]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def helpers() -> Iterator[Callable[[], int]]:
    """Give a function that counts the threads this process has more than now."""
    gc.collect()  # what earlier tests left may have some, too
    process = psutil.Process()
    before = process.num_threads()
    yield lambda: process.num_threads() - before


class Case:
    """Queries, an answer full of garbage, and spans somewhere in larger segments."""

    def __init__(
        self,
        query_shape: tuple[int, ...],
        lengths: tuple[int, ...],
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed + sum(query_shape) + sum(lengths))

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        batch, kv_heads, _, _, dim = query_shape
        self.query = draw(*query_shape)
        self.answer = Partial(
            torch.full(query_shape, torch.nan), torch.full(query_shape[:-1], torch.nan)
        )
        self.tiles = [
            tile_of(
                draw(batch, kv_heads, first + tokens + 2, dim),
                draw(batch, kv_heads, first + tokens + 2, dim),
                first,
                tokens,
            )
            for first, tokens in zip((0, 5, 1, 3), lengths, strict=False)
        ]

    def jobs(self) -> Jobs:
        jobs = NativeKernel().jobs(self.query, self.answer, scale=SCALE)
        assert jobs is not None
        return jobs

    def run(self) -> Partial:
        job = self.jobs().make(self.tiles)
        assert job is not None
        job()
        return self.answer

    def wanted(self, kernel: NativeKernel | ReferenceKernel) -> Partial:
        total = Accumulator()
        kernel.attend(Work(self.query, self.tiles, SCALE, total))
        return total.result()


def check(case: Case, dtype: torch.dtype, rounding: float = 2e-6) -> None:
    ours = case.run()
    for kernel, tolerance in ((NativeKernel(), rounding), (ReferenceKernel(), TOLERANCE[dtype])):
        wanted = case.wanted(kernel)
        for got, want in ((ours.out, wanted.out), (ours.lse, wanted.lse)):
            torch.testing.assert_close(got, want.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.covering
@pytest.mark.parametrize("lengths", SPANS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_spans_are_merged(dtype: torch.dtype, batch: int, lengths: tuple[int, ...]) -> None:
    check(Case((batch, 2, 3, 1, 64), lengths, dtype), dtype)


def test_the_device_new_tensors_have_by_default_does_not_matter() -> None:
    case = Case((1, 2, 3, 1, 64), (700, 63), torch.float32)
    with torch.device("meta"):
        case.run()
    wanted = case.wanted(NativeKernel())
    torch.testing.assert_close(case.answer.out, wanted.out, rtol=2e-6, atol=2e-6)


@pytest.mark.covering
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dims(dtype: torch.dtype, dim: int) -> None:
    check(Case((2, 3, 4, 1, dim), (70, 1037), dtype), dtype)


@pytest.mark.parametrize(
    ("dtype", "groups"),
    [
        (torch.float32, (1,)),
        (torch.bfloat16, (4, 7)),
        (torch.float16, (7,)),
        *(pytest.param(dtype, range(1, 17), marks=pytest.mark.slow) for dtype in DTYPES),
        *(pytest.param(dtype, (1, 4, 7), marks=pytest.mark.slow) for dtype in DTYPES),
    ],
)
def test_groups_and_query_tokens(dtype: torch.dtype, groups: Sequence[int]) -> None:
    for group in groups:
        for q_len in (1, 2, 3, 5, 8):
            assert decode_library(dtype, 32, group * q_len) is not None
            check(Case((1, 2, group, q_len, 32), (33, 600), dtype), dtype)


@pytest.mark.covering
@pytest.mark.parametrize("q_len", [5, 9, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(dtype: torch.dtype, q_len: int) -> None:
    """As where drafted tokens are verified; the library is one for all numbers of rows."""
    for batch, group, dim in ((1, 4, 32), (2, 7, 32), (1, 16, 64)):
        check(Case((batch, 2, group, q_len, dim), (33, 600), dtype), dtype)


@pytest.mark.covering
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_splits_over_threads_are_merged(dtype: torch.dtype, threads: int, kv_heads: int) -> None:
    torch.set_num_threads(threads)
    # A job takes rows of the batch for heads and may split otherwise; on a matrix unit weights are
    # rounded to bfloat16 by the highest of their split.
    rounding = 1e-3 if dtype is torch.bfloat16 and threads > 1 else 2e-6
    check(Case((3, kv_heads, 4, 1, 64), (4099, 513, 7), dtype), dtype, rounding)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_key_is_visible(lengths: tuple[int, ...]) -> None:
    ours = Case((1, 2, 3, 1, 64), lengths, torch.float32).run()
    assert not ours.out.any()
    assert (ours.lse == -torch.inf).all()


def test_scores_that_differ_much_are_merged() -> None:
    case = Case((1, 1, 1, 1, 32), (600, 600), torch.float32)
    case.tiles[0].whole.keys.mul_(0.01)
    case.tiles[1].whole.keys[...] = 100 * case.query[0, :, 0]
    check(case, torch.float32)


@pytest.mark.covering
@pytest.mark.parametrize("tokens", [640, 630])  # whole blocks of nothing, and a part of one
@pytest.mark.parametrize("group", [1, 16])
def test_scores_of_minus_infinity_have_no_weight(group: int, tokens: int) -> None:
    case = Case((1, 1, group, 1, 32), (tokens, 600), torch.float32)
    case.query.abs_()
    case.tiles[0].whole.keys[...] = -torch.inf
    rest = case.tiles.pop()
    nothing = case.run()
    assert nothing.lse.isneginf().all()
    assert not nothing.out.any()
    case.tiles.append(rest)
    ours = case.run()
    del case.tiles[0]
    torch.testing.assert_close(ours.out, case.wanted(NativeKernel()).out)


@pytest.mark.parametrize("part", ["keys", "values"])
def test_not_a_number_is_not_hidden(part: str) -> None:
    case = Case((1, 1, 1, 1, 32), (600, 600), torch.float32)
    getattr(case.tiles[1].whole, part)[0, 0, 7] = torch.nan
    ours = case.run()
    assert ours.out.isnan().all()
    assert ours.lse.isnan().all() == (part == "keys")


def test_what_is_pending_is_not_changed_by_what_is_made_after() -> None:
    cases = [Case((1, 2, 4, 1, 64), lengths, torch.float32) for lengths in ((90,), (4000, 3, 8))]
    jobs = cases[0].jobs()
    pending = [jobs.make(case.tiles) for case in cases]
    for case, job in zip(cases, pending, strict=True):
        assert job is not None
        assert not job.finished
        job()
        assert job.finished
        case.query = cases[0].query
        wanted = case.wanted(NativeKernel())
        torch.testing.assert_close(cases[0].answer.out, wanted.out)
        torch.testing.assert_close(cases[0].answer.lse, wanted.lse)


def test_a_job_is_used_again_once_it_is_released() -> None:
    case = Case((1, 2, 4, 1, 64), (90,), torch.float32)
    jobs = case.jobs()
    first, second = jobs.make(case.tiles), jobs.make(case.tiles)
    assert first is not second
    first()
    first.release()
    assert jobs.make([]) is first
    assert not first.finished


def test_a_job_is_timed_by_our_clock() -> None:
    case = Case((1, 2, 4, 1, 64), (20_000,), torch.float32)
    job = case.jobs().make(case.tiles)
    before_s = time.perf_counter()
    job()
    after_s = time.perf_counter()
    start_s, end_s = job.times
    assert before_s <= start_s < end_s <= after_s


@pytest.mark.parametrize(("threads", "used"), [(1, 1), (4, 4), (5, 4), (16, 15)])
def test_of_many_threads_one_is_left_to_the_caller(threads: int, used: int) -> None:
    torch.set_num_threads(threads)
    with helpers() as count:
        jobs = [Case((1, 2, 4, 1, 64), (90,), torch.float32).jobs() for _ in range(2)]
        made = [each.make([]) for each in jobs]
        assert count() == used - 1  # shared, and the thread that runs a job does its part
        del jobs, made
        assert count() == 0


def test_the_number_of_threads_may_change_between_jobs() -> None:
    case = Case((1, 2, 4, 1, 64), (9000,), torch.float32)
    with helpers() as count:
        jobs, wanted = case.jobs(), case.wanted(NativeKernel())
        for threads in (3, 1, 4):
            torch.set_num_threads(threads)
            job = jobs.make(case.tiles)
            assert job is not None
            job()
            job.release()
            del job
            assert count() == threads - 1
            torch.testing.assert_close(case.answer.out, wanted.out)


def test_jobs_of_several_threads_are_done_in_turn() -> None:
    torch.set_num_threads(4)
    cases = [Case((1, 2, 4, 1, 64), (3000,), torch.float32, seed) for seed in range(4)]
    jobs = [case.jobs() for case in cases]

    def run(position: int) -> None:
        for _ in range(50):
            job = jobs[position].make(cases[position].tiles)
            assert job is not None
            job()
            job.release()

    callers = [threading.Thread(target=run, args=(position,)) for position in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for case in cases:
        torch.testing.assert_close(case.answer.out, case.wanted(NativeKernel()).out)


_IN_A_PROCESS = """
import os, sys
sys.path[:0] = {path!r}
import torch
from test_jobs import Case, NativeKernel, cores_of_threads
torch.set_num_threads(2)
torch.ones(2**20).add_(1)  # OpenMP has bound its threads
case = Case((1, 2, 4, 1, 64), (9000,), torch.float32)
jobs, before = case.jobs(), set(os.listdir("/proc/self/task"))
{then}
"""


def cores_of_threads(threads: set[str]) -> list[set[int]]:
    return [os.sched_getaffinity(int(thread)) for thread in threads]


def in_a_process(then: str, **environment: str) -> None:
    program = _IN_A_PROCESS.format(path=sys.path, then=then)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one core")
def test_threads_run_on_all_cores_where_openmp_binds_its_own() -> None:
    then = """
job = jobs.make(case.tiles)
(cores,) = cores_of_threads(set(os.listdir("/proc/self/task")) - before)
assert len(os.sched_getaffinity(0)) == 1, "the test needs OpenMP to have bound this thread"
assert len(cores) > 1, cores
"""
    in_a_process(then, OMP_PROC_BIND="true", OMP_PLACES="cores")


def test_a_child_process_has_threads_of_its_own() -> None:
    then = """
wanted = case.wanted(NativeKernel()).out
job = jobs.make(case.tiles)
job()
job.release()
child = os.fork()
if not child:
    case.answer.out.fill_(float("nan"))
    job = jobs.make(case.tiles)
    job()
    assert len(os.listdir("/proc/self/task")) == 2
    torch.testing.assert_close(case.answer.out, wanted)
    del job, jobs
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
"""
    in_a_process(then)


def test_what_the_kernels_cannot_read_is_left_to_others() -> None:
    case = Case((2, 2, 4, 1, 64), (90,), torch.float32)
    (tile,) = case.tiles
    (keys, values), first, tokens = tile.whole, tile.first, tile.tokens
    jobs = case.jobs()
    assert jobs.make([tile_of(keys, values.double(), first, tokens)]) is None
    assert jobs.make([tile_of(keys[..., ::2], values, first, tokens)]) is None
    assert jobs.make([tile_of(keys, values.repeat(2, 1, 1, 1)[::2], first, tokens)]) is None


@pytest.mark.parametrize(
    "shape", [(1, 2, 257, 1, 64), (1, 2, 20, 13, 64), (1, 2, 1, 1, 40), (1, 2, 1, 0, 64)]
)
def test_shapes_without_jobs(shape: tuple[int, ...]) -> None:
    query = torch.zeros(shape)
    answer = Partial(torch.zeros(shape), torch.zeros(shape[:-1]))
    assert NativeKernel().jobs(query, answer, scale=SCALE) is None
