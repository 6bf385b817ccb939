"""Which bytes of a file are taken. Pure arithmetic."""


class Regions:
    """A file's regions: handed out, taken back, and handed out again.

    Attributes:
        end: the bytes of the file that its regions take; all behind them is nobody's.
    """

    def __init__(self) -> None:
        self.end = 0
        self._free: dict[int, int] = {}  # bytes by offset; no two of them touch

    @property
    def free_bytes(self) -> int:
        """Bytes before `end` that are nobody's."""
        return sum(self._free.values())

    def allocate(self, num_bytes: int) -> int:
        """Return the offset of a region: the first free one that is large enough, or a new one."""
        for offset in sorted(self._free):
            size = self._free[offset]
            if size >= num_bytes:
                del self._free[offset]
                if size > num_bytes:
                    self._free[offset + num_bytes] = size - num_bytes
                return offset
        offset = self.end
        self.end += num_bytes
        return offset

    def free(self, offset: int, num_bytes: int) -> None:
        """Take a region back; `end` moves down where it was the last one."""
        behind = self._free.pop(offset + num_bytes, 0)
        num_bytes += behind
        for before, size in self._free.items():
            if before + size == offset:
                del self._free[before]
                offset, num_bytes = before, size + num_bytes
                break
        if offset + num_bytes == self.end:
            self.end = offset
        else:
            self._free[offset] = num_bytes
