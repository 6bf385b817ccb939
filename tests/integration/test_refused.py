"""Attempts at captured steps that fail, alone and while other ranks wait."""

from types import SimpleNamespace

import pytest

from headinfer.device.base import CaptureError
from headinfer.engine.ready import Form
from headinfer.integration.decode_call import DecodeCall
from headinfer.integration.refused import RefusedCalls

CACHE = SimpleNamespace(state=SimpleNamespace(functions=SimpleNamespace(forget_pending=int)))
CALL = SimpleNamespace(
    key=("step", Form.ONE_LAUNCH), kind="step", form=Form.ONE_LAUNCH, new_tokens=1
)


def attempt(refused: RefusedCalls, error: Exception, *, awaited: bool) -> None:
    call: DecodeCall = CALL  # type: ignore[assignment]
    with refused.attempt(CACHE, call, awaited=awaited):  # type: ignore[arg-type]
        raise error


def test_a_step_that_fails_is_refused_and_goes_on() -> None:
    refused = RefusedCalls()
    attempt(refused, RuntimeError("no memory"), awaited=False)
    assert CALL.key in refused.keys


def test_a_rank_that_fails_in_a_step_does_not_go_on_to_what_the_others_wait_with() -> None:
    refused = RefusedCalls()
    with pytest.raises(RuntimeError, match="no memory"):
        attempt(refused, RuntimeError("no memory"), awaited=True)


def test_a_step_that_no_rank_can_capture_is_refused_by_each() -> None:
    refused = RefusedCalls()
    attempt(refused, CaptureError("it reads on the host"), awaited=True)
    assert CALL.key in refused.keys
