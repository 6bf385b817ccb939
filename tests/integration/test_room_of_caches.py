"""What of host memory is left for caches where a device keeps some for the next ones."""

import pytest

from headinfer.device.cpu import CpuDevice
from headinfer.integration import room
from headinfer.integration.room import RoomOfCaches
from headinfer.ranks.group import ALONE

GIB = 2**30


class Keeping(CpuDevice):
    """A device that says what it was told to keep, and keeps some."""

    spare_host_bytes = 3 * GIB

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, int | None]] = []

    def keep_host_memory(self, spare_bytes: int, most_bytes: int | None) -> None:
        self.told.append((spare_bytes, most_bytes))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "all_host_bytes", lambda: 16 * GIB)
    monkeypatch.setattr(room, "available_host_bytes", lambda: 5 * GIB)


def test_what_is_kept_for_the_next_caches_is_free() -> None:
    devices = [Keeping(), Keeping()]
    assert RoomOfCaches(devices, ALONE, None).left([], 0).available_bytes == 11 * GIB


@pytest.mark.parametrize(
    ("devices", "given", "told"),
    [
        (1, None, (GIB, None)),
        (2, None, (GIB // 2, None)),
        (1, 4 * GIB, (GIB, 4 * GIB)),
        (2, 4 * GIB, (0, 4 * GIB)),  # one does not know what the other holds
    ],
)
def test_a_sixteenth_is_kept_until_it_is_closed(
    devices: int, given: int | None, told: tuple[int, int | None]
) -> None:
    keeping = [Keeping() for _ in range(devices)]
    of_caches = RoomOfCaches(keeping, ALONE, given)
    assert [each.told for each in keeping] == [[told]] * devices
    of_caches.close()
    assert [each.told[-1] for each in keeping] == [(0, None)] * devices
