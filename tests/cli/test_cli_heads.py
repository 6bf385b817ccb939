"""`headinfer heads`: patterns written, searches gone on with, and mistakes told in one line."""

import pytest

from headinfer.finding import search
from headinfer.heads.formats import read_pattern
from saved_models import save_tokenizer
from tiny_models import tiny_model

DEMO = ("--model", "demo", "--tokens", "600", "--sink-tokens", "4", "--recent-tokens", "24")


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(" ".join(f"w{n % 83} w{n % 89} w{n % 7} w{n % 51}." for n in range(900)))
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_pattern_of_the_embedded_model_is_written_and_drawn(cli, tmp_path):
    done = cli("heads", *DEMO, "--output", tmp_path / "demo.json", "--plot", tmp_path / "demo.png")
    assert done.code == 0
    assert names(tmp_path) == ["demo.json", "demo.png"]
    pattern = read_pattern(tmp_path / "demo.json", kv_heads=[2, 2])
    assert (pattern.model, pattern.sink_tokens, pattern.recent_tokens) == ("demo", 4, 24)
    assert all(score > 0.2 for row in pattern.scores for score in row)
    first, *rest = done.out.splitlines()
    assert first.startswith(f"{tmp_path / 'demo.json'}: 2 layers x 2 KV heads, largest attention")
    assert rest[-1] == "0 of 4 KV heads score less than a tenth of the highest"
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ((), "largest attention to 2 texts"),
        (("--method", "copy", "--samples", "3"), "copied tokens that are looked at, in 3 texts"),
        (("--optimise", "--steps", "2"), "gates trained in 2 steps"),
    ],
)
def test_each_method_looks_at_a_model_in_a_folder(cli, chat_llama, prose, tmp_path, given, made):
    output = tmp_path / "pattern.json"
    reach = ("--sink-tokens", "2", "--recent-tokens", "16", "--tokens", "200")
    done = cli("heads", "-m", chat_llama, "--text", prose, *reach, *given, "-o", output)
    assert done.code == 0, done.err
    pattern = read_pattern(output, kv_heads=[2, 2])
    assert made in pattern.made
    assert "200 tokens" in pattern.made
    assert str(prose) in pattern.made
    assert any(score > 0 for row in pattern.scores for score in row)


def test_layers_with_a_window_are_left_out(cli, prose, tmp_path):
    folder = tmp_path / "gemma3"
    tiny_model("gemma3").save_pretrained(folder)
    save_tokenizer(folder, chat=False)
    reach = ("--sink-tokens", "2", "--recent-tokens", "16", "--tokens", "200")
    output, plot = tmp_path / "pattern.json", tmp_path / "scores.svg"
    done = cli("heads", "-m", folder, "--text", prose, *reach, "-o", output, "--plot", plot)
    assert done.code == 0, done.err
    pattern = read_pattern(output, kv_heads=[2, 2, 2])
    assert [any(row) for row in pattern.scores] == [False, True, False]
    assert "of 2 KV heads score less" in done.out
    assert "layer 0" not in done.out
    assert "</svg>" in plot.read_text()


def test_a_stopped_search_goes_on(cli, tmp_path, monkeypatch):
    whole, output = tmp_path / "whole.json", tmp_path / "pattern.json"
    assert cli("heads", *DEMO, "-o", whole).code == 0
    score, seeds = search.repetition_scores, []

    def stop_at_the_second(model, texts, tokens, seed, heads):
        seeds.append(seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return score(model, texts, tokens, seed, heads)

    monkeypatch.setattr(search, "repetition_scores", stop_at_the_second)
    stopped = cli("heads", *DEMO, "-o", output)
    assert stopped.code == 130
    assert f"{output}.part holds what is done; the same command goes on" in stopped.err
    assert names(tmp_path) == ["pattern.json.part", "whole.json"]
    other = cli("heads", *DEMO, "-o", output, "--seed", "7")
    assert other.code == 2
    assert "seed 0, not 7; delete it to begin anew" in other.error_lines[-1]
    resumed = cli("heads", *DEMO, "-o", output)
    assert resumed.code == 0
    assert f"going on with {output}.part" in resumed.err
    assert len(seeds) == 3
    assert output.read_text() == whole.read_text()
    assert names(tmp_path) == ["pattern.json", "whole.json"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--optimise", "--method", "copy"), "leave out --method and --samples"),
        (("--optimise", "--samples", "3"), "leave out --method and --samples"),
        (("--steps", "3"), "--steps are those of --optimise"),
        (("--tokens", "many"), "is not a token count"),
        (("--tokens", "200"), "200 tokens has none beyond 64 sinks and 256 recent tokens"),
        (("--tokens", "400"), "take 864 positions, but the model was made for 512"),
        (("--method", "copy", "--tokens", "600"), "take 600 positions"),
        (("--plot", "scores.gif"), "must end in .png, .svg, .pdf"),
        (("--text", "/no/such/file", "--tokens", "150", "--recent-tokens", "9"), "No such file"),
        (("--model", "llama-3-8b"), "is a shape without weights"),
        (("--output", "-"), "a pattern is written to a file"),
        (("--output", "/no/such/folder/pattern.json"), "there is no folder to write it in"),
    ],
)
def test_mistakes_are_told_in_one_line(cli, llama, tmp_path, args, words):
    given = {"--model": str(llama), "--output": str(tmp_path / "pattern.json")}
    for name in ("--model", "--output"):
        if name in args:
            del given[name]
    done = cli("heads", *(part for pair in given.items() for part in pair), *args)
    assert done.code == 2
    assert words in done.error_lines[-1]
    assert len([line for line in done.error_lines if "error" in line]) == 1
    assert names(tmp_path) == []


def test_the_embedded_model_reads_its_own_documents(cli, prose, tmp_path):
    done = cli("heads", *DEMO, "--text", prose, "-o", tmp_path / "pattern.json")
    assert done.code == 2
    assert "the embedded model knows its own documents alone" in done.error_lines[-1]
    done = cli("heads", *DEMO, "--tokens", "500", "-o", tmp_path / "pattern.json")
    assert done.code == 2


def test_texts_that_hide_nothing_beyond_reach_are_told(cli, llama, prose, tmp_path):
    far = ("--sink-tokens", "100", "--recent-tokens", "90", "--tokens", "200", "--method", "copy")
    done = cli("heads", "-m", llama, "--text", prose, *far, "-o", tmp_path / "pattern.json")
    assert done.code == 2
    assert "hides nothing beyond 100 sinks and 90 recent tokens" in done.error_lines[-1]


def test_a_folder_of_the_embedded_model_is_known(cli, tmp_path):
    from headinfer.demo.__main__ import main

    main(["build", "--ungrouped", str(tmp_path / "model")])
    output = tmp_path / "pattern.json"
    done = cli("heads", *DEMO[2:], "-m", tmp_path / "model", "-o", output)
    assert done.code == 0
    pattern = read_pattern(output, kv_heads=[4, 4])
    assert pattern.streaming_heads(0.25, [0, 1]) == ((0, 2), ())
