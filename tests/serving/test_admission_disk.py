"""A server above a disk admits what CPU memory and the disk hold together."""

from pathlib import Path
from typing import Any

import pytest
from desk_helpers import PATIENCE_S, Heard, answer, ask, desk_of, stock_text, tokens

from headinfer.disk.mount import Mount
from headinfer.errors import MemoryPlanError
from headinfer.integration import disk_below
from tiny_models import random_tokens, shared_model

MEMORY = {"device": "simulated", "host_memory": "700KiB", "chunk_tokens": 90}
"""Room for 466 dense tokens. A block of 64 takes 96 KiB in all layers."""
PROMPT, OTHER = tokens(640), tokens(600, seed=3)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return MEMORY | {"tile_tokens": 64, "disk_cache": tmp_path_factory.mktemp("disk")}


def test_a_prompt_beyond_cpu_memory_is_admitted_and_answered(disk: dict[str, Any]) -> None:
    without = MEMORY | {"tile_tokens": 64}
    with desk_of("llama3", options=without) as desk, pytest.raises(MemoryPlanError, match="fit"):
        desk.check(ask(PROMPT))
    with desk_of("llama3", options=disk) as desk:
        first, other = answer(desk, ask(PROMPT)), answer(desk, ask(OTHER))
        stats = desk._served.session.stats
        assert stats.bytes_to_disk > 0
        assert stats.bytes_from_disk > 0
    assert first.text == stock_text("llama3", PROMPT)
    assert other.text == stock_text("llama3", OTHER)


def test_requests_at_once_have_room_beside_each_other(disk: dict[str, Any]) -> None:
    prompts = [PROMPT, OTHER, tokens(300, seed=5)]
    heard = [Heard() for _ in prompts]
    with desk_of("llama3", options=disk, running=2) as desk:
        asked = [desk.submit(ask(ids, 3), each) for ids, each in zip(prompts, heard, strict=True)]
        assert [ticket.wait(PATIENCE_S) for ticket in asked] == [each.ended for each in heard]
    texts = [stock_text("llama3", ids, 3) for ids in prompts]
    assert [each.text for each in heard] == texts


def test_what_the_disk_never_holds_is_refused_with_its_room(
    disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(disk_below, "free_bytes", lambda folder: 2**20)
    with desk_of("llama3", options=disk) as desk:
        with pytest.raises(MemoryPlanError, match=r"has room for 1.00 MiB; shorten"):
            desk.check(ask(tokens(1900)))
        desk.check(ask(PROMPT))


def test_too_little_cpu_memory_for_any_block_is_refused(disk: dict[str, Any]) -> None:
    refusal = pytest.raises(MemoryPlanError, match=r"disk below needs .* of CPU memory at least")
    with desk_of("llama3", options=disk | {"host_memory": "256KiB"}) as desk, refusal:
        desk.check(ask(PROMPT))


def test_a_call_that_the_disk_has_no_room_for_is_refused_before_it_begins(
    disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_below, "free_bytes", lambda folder: 2**20)
    with desk_of("llama3", options=disk) as desk:
        session, model = desk._served.session, shared_model("llama3")
        cache = session.new_cache(4000)
        with pytest.raises(MemoryPlanError, match=r"4,000 tokens need .* has room for 1.00 MiB"):
            model(random_tokens(1, 20), past_key_values=cache)
        assert session.stats.prefill_tokens == 0
        model(random_tokens(1, 20), past_key_values=session.new_cache(700))


def test_a_folder_in_memory_is_told(
    disk: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk_below, "mount_of", lambda folder: Mount("/dev/x", "ext4"))
    with desk_of("llama3", options=disk):
        assert "does not count" not in caplog.text
    monkeypatch.setattr(disk_below, "mount_of", lambda folder: Mount("tmpfs", "tmpfs"))
    with desk_of("llama3", options=disk):
        assert "is in memory (tmpfs): what lies there takes CPU memory" in caplog.text
