"""The script that says what second choices are worth that are verified beside the drafts."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from headinfer.generation.acceptance import Choice
from headinfer.generation.candidates import Lookup

ROOT = Path(__file__).parents[2]
TOKENS = 128
STEPS = 20
REACHES = torch.tensor([97, 103])


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "draft_leaves.py"))


@torch.no_grad()
def test_drafts_and_second_choices_are_those_of_a_model_that_sees_what_drafts_attend(
    script: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    text = torch.randint(97, (1, TOKENS))
    read = script["Read"](model, text)
    written, kv = read.continued(REACHES, STEPS)
    for place, reach in enumerate(REACHES.tolist()):
        whole = torch.cat((text[:, :reach], written[place, None]), 1)
        following = model(whole).logits[0, reach:].topk(2).indices
        assert torch.equal(written[place], torch.cat((text[0, reach, None], following[:-1, 0])))
        own = [[part[place] for part in both] for both in kv]
        drafts = read.drafted(4 * TOKENS, reach, own, written[place])  # it sees all
        assert len(drafts) == STEPS
        for at, draft in enumerate(drafts[: -script["DRAFTS"]]):
            tokens = following[at : at + len(draft)].tolist()
            assert [[node.token, node.second] for node in draft] == tokens
        few = read.drafted(16, reach, own, written[place])
        masked = _scores_of_few(model, whole[:, :-1], reach)
        assert [draft[0].token for draft in few] == masked.argmax(-1).tolist()


def test_a_leaf_counts_where_the_draft_before_it_was_rejected(script: dict[str, Any]) -> None:
    node, verified, choice = script["Node"], script["verified"], script["Choice"]
    right = [*range(12)]
    # Behind each token one draft is right, the next wrong; its second choice is right or wrong.
    drafts = [
        [node(at, 50, (0.9, 0.1)), node(99, at + 1 if at % 3 else 50, (0.5, 0.4))] * 2
        for at in range(len(right))
    ]

    def accepted(**given: Any) -> list[tuple[int, bool]]:
        found: list[tuple[int, bool]] = verified(choice(**given), [70, 71], right, drafts)
        return found

    assert accepted(share=8, drafts=4) == [(1, False)] * 4
    assert accepted(share=8, drafts=4, leaves=4) == [(1, False), (1, True), (1, True)]
    assert accepted(share=8, drafts=4, leaves=1) == [(1, False), (1, True), (1, True)]
    assert script["likeliest"](drafts[0], 2) == [1, 3]
    assert script["counted"](accepted(share=8, drafts=4, leaves=4), 4) == [3, 3, 3, 2]
    assert script["counted"]([(4, False), (0, True)], 4) == [2, 4, 1, 1]
    assert choice(share=8, drafts=7, leaves=7).rows == choice(share=8, drafts=7, branch=True).rows


def test_a_lookup_finds_what_the_library_finds_and_then_another_branch(
    script: dict[str, Any],
) -> None:
    looked_up = script["looked_up"]
    greedy = Choice(processors=LogitsProcessorList(), samples=False)
    torch.manual_seed(1)
    for tokens in (1, 2, 3, 17, 60):
        text = torch.randint(5, (1, tokens))
        own = Lookup(script["NGRAM_TOKENS"]).draft(text, 6, greedy)
        assert looked_up(text[0].tolist(), 6) == own
    text = [1, 2, 3, 4, 2, 3, 5, 1, 2, 3]
    assert looked_up(text, 2) == [4, 2]
    assert looked_up(text, 2, 4) == [5, 1]  # fewer of the newest tokens stand before it
    following = [4, 2, 8, 8, 8, 8]
    branch = script["Choice"](share=0, drafts=2, branch=True)
    assert script["verified"](branch, text, following, None)[0] == (2, False)
    assert script["verified"](branch, text, [5, 1, *following], None)[0] == (2, False)


def test_the_documents_table_is_generated(script: dict[str, Any]) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "draft-leaves.json").read_text())
    assert script["table"](results["rows"]) in (ROOT / "docs" / "drafts.md").read_text()


def _scores_of_few(model: LlamaForCausalLM, text: torch.Tensor, first: int) -> torch.Tensor:
    """Return scores where each query from `first` on sees itself, 4 sinks and 12 newest tokens.

    Tokens before it are attended with keys and values of a plain pass.
    """
    rows = []
    for at in range(first, text.shape[1]):
        seen = torch.ones(at + 1, at + 1, dtype=torch.bool).tril()
        seen[at, 4 : at - 12] = False
        rows.append(model(text[:, : at + 1], attention_mask=seen[None, None]).logits[0, -1])
    return torch.stack(rows)
