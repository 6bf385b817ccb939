"""Spreading a model that is still to be loaded over several GPUs, by accelerate's `device_map`."""

from dataclasses import dataclass
from typing import Any

from headinfer.device.launch_queues import deepen_launch_queues
from headinfer.errors import OptionError
from headinfer.plan.host_room import HostRoom
from headinfer.plan.memory import weights_room_bytes
from headinfer.plan.options import Options
from headinfer.units import counted

_MOST = 2**16


@dataclass(frozen=True, slots=True)
class Gpus:
    """A number of GPUs for a model's layers: the first ones.

    Attributes:
        count: how many.
        memory_bytes: the most that each of them gives; None for what is free.
        host_memory_bytes: CPU memory that weights leave to the KV cache.
    """

    count: int
    memory_bytes: tuple[int | None, ...]
    host_memory_bytes: int = 0

    @classmethod
    def of(cls, count: int | None, options: Options) -> "Gpus | None":
        """Return what was asked for; None where nothing was.

        Raises:
            OptionError: there can be no such number, or memory was given for another one.
        """
        if count is None:
            return None
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise OptionError(f"gpus must be a number from 1 on, not {count!r}")
        if count > _MOST:
            raise OptionError(f"gpus must be at most {_MOST:,}, not {count}")
        each = options.device_memory_each
        if each and len(each) != count:
            raise OptionError(
                f"device_memory has {counted(len(each), 'value')}, but gpus is {count}; give one "
                "value, or one for each"
            )
        most = tuple(own.device_memory_bytes for own in options.of_devices(count))
        return cls(count, most, options.host_memory_bytes or 0)

    def prepare(self) -> None:
        """Have one thread be able to feed all of them; to be called before CUDA begins."""
        if self.count > 1:
            deepen_launch_queues()

    def check(self, device: str) -> None:
        """Check that they are there.

        Args:
            device: from `choose_device`.

        Raises:
            OptionError: they are not.
        """
        if device != "cuda":
            raise OptionError(
                f"gpus is {self.count}, but the device is {device!r}, which has none; leave it "
                "out, or run where CUDA is available"
            )
        import torch

        there = torch.cuda.device_count()
        if self.count > there:
            seen = counted(there, "GPU")
            raise OptionError(
                f"gpus is {self.count}, but CUDA shows {seen} here; give at most {there}"
            )

    def keywords(
        self, config: Any, dtype: str, quantization: Any = None, *, trust_remote_code: bool = False
    ) -> dict[str, Any]:
        """Return keywords for `from_pretrained`.

        Layers lie on the GPUs in even numbers where these hold all weights. Otherwise transformers
        fills one GPU after the other, then CPU memory, and the rest stays on the disk.

        Args:
            config: the model's.
            dtype: "auto" or a torch dtype's name.
            quantization: how weights are quantised as they are loaded; None for not at all.
            trust_remote_code: whether code that comes with the model may run.
        """
        from headinfer.integration.even_map import even_map

        limits = self._limits()
        even = even_map(config, dtype, quantization, limits, trust_remote_code=trust_remote_code)
        if even is not None:
            return {"device_map": even}
        most: dict[int | str, int] = dict(enumerate(limits))
        return {"device_map": "auto", "max_memory": {**most, "cpu": self._host_limit()}}

    def _host_limit(self) -> int:
        """Return the most bytes of weights in CPU memory."""
        from headinfer.device.host_memory import all_host_bytes, available_host_bytes

        available = available_host_bytes()
        if not self.host_memory_bytes:
            return available
        room = HostRoom(device="cuda", all_bytes=all_host_bytes(), available_bytes=available)
        return max(room.machine_bytes - self.host_memory_bytes, 0)

    def _limits(self) -> list[int]:
        """Return the most bytes of weights on each GPU."""
        import torch

        limits = []
        for number, asked in enumerate(self.memory_bytes):
            free = torch.cuda.mem_get_info(number)[0]
            limits.append(weights_room_bytes(free if asked is None else min(asked, free)))
        return limits
