"""`headinfer demo`, on short documents."""

import pytest

from headinfer.cli.demo_parts import excerpt


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_all_answers_are_right(cli, device):
    done = cli("demo", "--tokens", "2K", "--device", device)
    assert done.code == 0, done.err
    assert done.out.count("  right") == 8
    for text in ("8 facts", "chunks of", "Which number", "prefill", "8 of 8 right"):
        assert text in done.out


def test_simulated_is_said_to_be_that(cli):
    assert "a simulated device (the CPU" in cli("demo", "-t", "1K", "--device", "simulated").out


def test_wrong_answers_are_marked_and_fail(cli, monkeypatch):
    import dataclasses

    from headinfer import demo

    make_document = demo.make_document

    def wrong_about_one(*args):
        document = make_document(*args)
        first = dataclasses.replace(document.facts[0], answer="none, says nobody.")
        return dataclasses.replace(document, facts=(first, *document.facts[1:]))

    monkeypatch.setattr(demo, "make_document", wrong_about_one)
    done = cli("demo", "--tokens", "1K", "--device", "cpu")
    assert done.code == 1
    assert "WRONG, it is: none, says nobody." in done.out
    assert "7 of 8 right" in done.out


@pytest.mark.parametrize(
    "args",
    [
        ("--tokens", "many"),
        ("--tokens", "100"),
        ("--tile-tokens", "0"),
        ("--tokens", "1K", "--host-memory", "1KiB"),
    ],
)
def test_bad_input_is_one_line(cli, args):
    done = cli("demo", *args)
    assert done.code == 2
    assert len(done.error_lines) == 1
    assert done.error_lines[0].startswith("headinfer: error: ")


def test_ctrl_c_between_questions(cli, monkeypatch):
    from headinfer.cli.interrupt import Interrupt

    checks = []

    def interrupt_the_third(self):
        checks.append(1)
        if len(checks) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Interrupt, "check", interrupt_the_third)
    done = cli("demo", "--tokens", "1K", "--device", "cpu", "--chunk-tokens", "1K")
    assert done.code == 130
    assert done.out.count("  right") == 2
    assert "prefill" in done.out


def test_excerpts_are_cut_between_words():
    text = "one two " * 200 + "the needle " + "three four " * 200
    cut = excerpt(text, "needle")
    assert cut.startswith("... ")
    assert cut.endswith(" ...")
    assert set(cut.split()) == {"...", "one", "two", "the", "needle", "three", "four"}
    assert excerpt("a needle", "needle") == "a needle"
