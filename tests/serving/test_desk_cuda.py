"""A model with experts at a desk on CUDA: how they compute while one decodes and another reads."""

import pytest
import torch
from desk_helpers import PATIENCE_S, SETTINGS, Heard, ask, tokens

import headinfer
from headinfer.serving.desk import Desk
from headinfer.serving.events import Event, Piece
from saved_models import make_tokenizer
from tiny_models import VOCAB, tiny_model

pytestmark = pytest.mark.gpu


class Watching(Heard):
    """A client that looks how the experts compute at each piece of its answer."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: set[object] = set()

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if isinstance(event, Piece):
            self.seen.add(self.model.config._experts_implementation)


def test_experts_compute_as_before_while_answers_are_decoded() -> None:
    """The weights of the chosen experts would be copied for each token of others' prompts."""
    model = tiny_model("qwen3-moe").to("cuda", torch.float32)
    before = model.config._experts_implementation
    prompts = [tokens(90, seed=1), tokens(300, seed=2)]
    expected = []
    for ids in prompts:
        prompt = torch.tensor([ids], device="cuda")
        rows = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, **SETTINGS
        )
        expected.append(make_tokenizer(VOCAB).decode(rows[0, len(ids) :], skip_special_tokens=True))
    headinfer.attach(model, device="cuda", chunk_tokens=16)
    desk = Desk(model, make_tokenizer(VOCAB))
    try:
        clients = [Watching(model) for _ in prompts]
        asked = [ask(ids, 20) for ids in prompts]
        tickets = [desk.submit(each, client) for each, client in zip(asked, clients, strict=True)]
        for ticket in tickets:
            ticket.wait(PATIENCE_S)
        assert [client.text for client in clients] == expected
        assert [client.seen for client in clients] == [{before}, {before}]
    finally:
        desk.close(timeout_s=PATIENCE_S)
        headinfer.detach(model)
    assert "_optimize_model_for_decode" not in vars(model)
    assert model.config._experts_implementation == before
