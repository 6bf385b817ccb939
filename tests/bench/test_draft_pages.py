"""The script that says what drafts are worth which attend the pages of the most attention mass."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saved_models import save_llama

ROOT = Path(__file__).parents[2]
TOKENS = 128
REACHES = torch.tensor([97, 103])


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "draft_pages.py"))


@torch.no_grad()
def test_drafts_are_right_that_attend_all_tokens_and_others_are_not(script: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    text = torch.randint(97, (1, TOKENS))
    read = script["Read"](model, text)
    for said in ((), (5, 6, 7)):
        written, masses, own = read.continued(REACHES, said)
        count = written.shape[1] - 1 - script["DRAFTS"]
        for place, reach in enumerate(REACHES.tolist()):
            assert torch.equal(written[place], _greedy(model, text[:, :reach], written[place]))
            all_tokens = [torch.arange(reach).expand(2, -1)] * 2
            few = [torch.tensor([[0, 5, 90], [7, 11, 95]])] * 2
            kept = [[part[place] for part in kv] for kv in own]
            drafts = read.drafted([all_tokens, few], kept, reach, written[place, count], count)
            assert torch.equal(drafts[0], written[place, count + 1 :])
            assert not torch.equal(drafts[1], drafts[0])
        assert masses.shape == (script["ROWS"], 2, 2, 2, TOKENS // 16)
        assert (masses.sum(-1) < 2 + 1e-3).all()  # two query heads weigh what a KV head has
        assert not masses[..., 7:].any()  # no place sees more tokens


def test_pages_of_the_most_mass_are_chosen_beside_the_newest_tokens(
    script: dict[str, Any],
) -> None:
    choice = script["Choice"]
    masses = torch.zeros(8, 2, 32)
    masses[:, 0, 12], masses[:, 1, 20] = 0.5, 0.75
    masses[-1, 0, 9] = 0.75

    def chosen(**given: object) -> list[list[int]]:
        found = choice(share=4, page_tokens=32, pages=0.4, **given).attended(masses, 500, 9, 512)
        return found.tolist()  # 32 sinks, one page of 32 tokens, and 64 of the newest

    sinks, newest = [*range(32)], [*range(445, 500)]
    assert chosen() == [[*sinks, *range(192, 224), *newest], [*sinks, *range(320, 352), *newest]]
    assert chosen(rows=1)[0] == [*sinks, *range(128, 160), *newest]
    assert chosen(by_head=False) == [[*sinks, *range(320, 352), *newest]] * 2


def test_the_documents_table_is_generated(script: dict[str, Any]) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "draft-pages.json").read_text())
    table = script["table"](results["rows"], results["header"]["settings"]["tokens"])
    assert table in (ROOT / "docs" / "drafts.md").read_text()


def test_too_few_tokens_are_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "model": save_llama(tmp_path / "model", positions=128),
        "tokens": 128,
        "texts": "manual",
        "json": tmp_path / "found.json",
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["draft_pages.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "draft_pages.py"), run_name="__main__")
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--tokens 128 leaves no room" in line
    assert line.endswith("give 384")


def _greedy(model: LlamaForCausalLM, text: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """Return what a plain loop writes behind a text where the same is said first."""
    said = 3 if written[:3].tolist() == [5, 6, 7] else 1
    whole = torch.cat((text, written[None, :said]), 1)
    while whole.shape[1] < text.shape[1] + len(written):
        whole = torch.cat((whole, model(whole).logits[:, -1:].argmax(-1)), 1)
    return whole[0, text.shape[1] :]
