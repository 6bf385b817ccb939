"""The embedded model, whose answers need every token: a document is read once for all questions."""

from pathlib import Path

from desk_helpers import PATIENCE_S, Heard

import headinfer
from headinfer.demo import build_model, make_document
from headinfer.serving.ask import Ask
from headinfer.serving.desk import Desk


def test_questions_about_a_document_are_answered_and_it_is_read_once(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    document = make_document(6000, seed=3, num_facts=4)
    with headinfer.attach(model, device="cpu", chunk_tokens=1024):
        desk = Desk(model, tokenizer, running=3, session_folder=tmp_path / "kept")
        asked = {}
        for fact in document.facts:
            messages = [{"role": "user", "content": document.message(fact.question)}]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
            heard = Heard()
            ask = Ask(ids=ids, given={"max_new_tokens": 24, "do_sample": False})
            ended = desk.submit(ask, heard).wait(PATIENCE_S)
            assert ended is not None
            assert ended.error is None
            asked[fact] = messages, heard
        ours = {fact: heard.text for fact, (_, heard) in asked.items()}
        spared = [heard.ended.usage.cached_tokens for _, heard in asked.values()]
        for fact, (messages, _) in asked.items():
            records = headinfer.generate(
                model, messages, tokenizer=tokenizer, max_new_tokens=24, do_sample=False
            )
            assert ours[fact] == "".join(record.text for record in records)
            assert fact.number in ours[fact]
        desk.close(timeout_s=PATIENCE_S)
    assert spared[0] == 0
    assert all(tokens > 0.9 * document.num_tokens for tokens in spared[1:])
