"""Host memory for all layers, taken ahead of the layer that is attended.

Locking memory takes the host 60 ms a GiB. The first layer's is waited for; the others' is locked on
a thread meanwhile, so that the device need not wait for each layer's.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from headinfer.device.base import Device
from headinfer.engine.tiles import StoredLayer


class Reservation:
    """Reserves the stores of one cache.

    A store that is being reserved is not touched otherwise: `reserve` comes before its tokens do,
    and `finish` before anything else that changes it.
    """

    def __init__(self, device: Device, layers: Sequence[StoredLayer]) -> None:
        self._layers = layers
        self._on_thread = device.locks_host_memory
        self._pending: dict[int, Future[None]] = {}

    def reserve(self, layer_idx: int, tokens: int) -> None:
        """Have memory for `tokens` tokens of a layer, and begin with the layers after it.

        Raises:
            MemoryPlanError: the host memory cannot be had.
        """
        if (pending := self._pending.pop(layer_idx, None)) is not None:
            pending.result()
        store = self._layers[layer_idx].store
        if store.missing_tokens(tokens) <= 0:
            return
        store.reserve(tokens)
        if not self._on_thread or self._pending:
            return
        pool = ThreadPoolExecutor(1, thread_name_prefix="headinfer-reserve")
        for later in range(layer_idx + 1, len(self._layers)):
            self._pending[later] = pool.submit(self._layers[later].store.reserve, tokens)
        pool.shutdown(wait=False)  # the thread ends with its work

    def finish(self) -> None:
        """Begin with no other layer, and wait for the one in work; it may fail."""
        waiting = [pending for pending in self._pending.values() if not pending.cancel()]
        self._pending.clear()
        for pending in waiting:
            pending.exception()
