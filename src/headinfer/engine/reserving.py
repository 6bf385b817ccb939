"""Host memory of a cache, had before its tokens come."""

import itertools

from headinfer.device.base import Device
from headinfer.engine.counted import CountedTokens
from headinfer.kv.ahead import pieces_ahead
from headinfer.kv.ledger import Ledger


class ReservedTokens(CountedTokens):
    """A cache's tokens, and those to come, whose host memory is asked for; see `HeldTokens`."""

    _device: Device

    def expect(self, tokens: int) -> int:
        """State that layers will come to hold `tokens` tokens; memory is reserved when they do.

        Returns:
            The bytes of host memory that this adds to what is held.
        """
        self._expected_tokens = max(self._expected_tokens, tokens)
        return self.missing_bytes(tokens)

    def _reserve(self, ledger: Ledger, new_tokens: int) -> None:
        """Have host memory on its way for all tokens that a layer without a window is to hold.

        Wait for as much of it as is needed when the new tokens are sent home, unless they are kept
        behind residents. These are sent at the end of the pass, which waits then.
        """
        piece_bytes, resident = self._device.host_piece_bytes, ledger.resident
        room = 0 if resident is None or ledger.tail is not None else resident.capacity
        behind = resident is not None and ledger.host_tokens <= resident.tokens <= room - new_tokens
        if behind and piece_bytes is not None and ledger is not self._full[0]:
            return  # the first layer has asked for all
        expected, capacity = self._expected_tokens, ledger.capacity_tokens
        if capacity >= expected or self.plan.disk_block_tokens:
            return  # blocks above a disk are taken as tokens are sent home
        if piece_bytes is None:
            ledger.reserve(expected)
            return
        if capacity + ledger.coming.tokens < expected:
            self._ask_ahead(piece_bytes)
        tokens = ledger.tokens + new_tokens
        if tokens <= room:
            return
        if ledger.tail_tokens + new_tokens >= self.plan.page_tokens:  # else they wait in a page
            ledger.reserve(min(tokens, expected))

    def _ask_ahead(self, piece_bytes: int) -> None:
        """Have the host memory that layers lack got in the background, the oldest tokens' first.

        So each layer has memory for a prompt's first chunk before any has it for the last.
        """
        pieces: dict[tuple[int, int], list[int]] = {}  # of layers alike
        of_all, home, most_tokens = [], None, 0
        for ledger in self._full:
            missing = ledger.missing_tokens(self._expected_tokens)
            if ledger.home is not home:  # most layers have that of the one before
                home = ledger.home
                most_tokens = piece_bytes * home.format.row_tokens // home.num_bytes(1)
            if (missing, most_tokens) not in pieces:
                pieces[missing, most_tokens] = [
                    *pieces_ahead(
                        missing,
                        chunk_tokens=self.plan.chunk_tokens,
                        tile_tokens=self.plan.tile_tokens,
                        most_tokens=most_tokens,
                    )
                ]
            of_all.append(pieces[missing, most_tokens])
        for of_layers in itertools.zip_longest(*of_all, fillvalue=0):
            for ledger, tokens in zip(self._full, of_layers, strict=True):
                if tokens:
                    ledger.coming.ask(ledger.home, tokens)
