"""Files of head patterns, ours and others'."""

import json
import pickle

import pytest
import torch

from headinfer.errors import OptionError
from headinfer.heads.formats import read_pattern, write_pattern
from headinfer.heads.pattern import HeadPattern

OWN = HeadPattern(
    scores=((0.125, 1.0), (), (1e-5, 0.5)),
    sink_tokens=4,
    recent_tokens=64,
    model="tiny",
    made="by hand",
)


@pytest.fixture
def duo(tmp_path):
    """A folder as DuoAttention writes it."""
    folder = tmp_path / "pattern"
    folder.mkdir()
    text = "1.0e+00\t-9.58e-05\n5.0e-01\t1.02e+00\n2.5e-01\t0.0e+00\n"
    (folder / "full_attention_heads.tsv").write_text(text)
    config = {"model_name": "models/tiny", "sink_size": 64, "recent_size": 256, "sparsity": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def wu(folder, scores):
    path = folder / "retrieval.json"
    path.write_text(json.dumps(scores))
    return path


def test_our_own_files_are_read_as_written(tmp_path):
    path = tmp_path / "pattern.json"
    path.write_text("an older one")
    write_pattern(path, OWN)
    assert read_pattern(path) == OWN
    assert read_pattern(str(path), kv_heads=[2, 0, 2]) == OWN
    assert [entry.name for entry in tmp_path.iterdir()] == ["pattern.json"]


@pytest.mark.parametrize("name", ["", "full_attention_heads.tsv"])
def test_duo_attentions_folders_are_read(duo, name):
    assert read_pattern(duo / name) == HeadPattern(
        scores=((1.0, 0.0), (0.5, 1.0), (0.25, 0.0)),
        sink_tokens=64,
        recent_tokens=256,
        model="models/tiny",
        made="DuoAttention",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 2), (1, 3, 2, 1)])
def test_kvzips_tensors_are_read(tmp_path, dtype, shape):
    path = tmp_path / "llama3-8b-scbench_qa_eng-0.pt"
    torch.save(torch.tensor([0.5, 1.0, 0.25, 0.0, 0.75, 0.125], dtype=dtype).view(shape), path)
    found = read_pattern(path, kv_heads=[2, 2, 2])
    assert found.scores == ((0.5, 1.0), (0.25, 0.0), (0.75, 0.125))
    assert (found.sink_tokens, found.recent_tokens) == (None, None)


def test_kvzips_tensor_of_one_head_a_layer_is_read(tmp_path):
    path = tmp_path / "scores.pt"
    torch.save(torch.tensor([0.5, 1.0]), path)
    assert read_pattern(path).scores == ((0.5,), (1.0,))


def test_retrieval_scores_of_a_group_are_its_highest(tmp_path):
    scores = {f"{layer}-{head}": [0, layer + head, 0.5] for layer in range(2) for head in range(4)}
    path = wu(tmp_path, scores)
    assert read_pattern(path, kv_heads=[2, 0]).scores == ((0.5, 3.5 / 3), ())
    assert read_pattern(path, kv_heads=[1, 4]).scores[0] == (3.5 / 3,)
    assert read_pattern(path).kv_heads == (4, 4)


def test_a_pattern_of_another_model_is_refused_with_both_shapes(duo, tmp_path):
    with pytest.raises(OptionError, match=r"3 layers x 2 KV heads.*2 layers x 8 KV heads"):
        read_pattern(duo, kv_heads=[8, 8])
    path = wu(tmp_path, {"0-0": [1], "0-1": [1]})
    with pytest.raises(OptionError, match=r"1 layer x 2 query heads.*1 layer x 4 KV heads"):
        read_pattern(path, kv_heads=[4])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "pattern.json is not JSON"),
        ("[]", "must hold an object, not a list"),
        ('{"format": "headinfer-heads-9"}', "'headinfer-heads-9', but 'headinfer-heads-1' is read"),
        ('{"scores": []}', "format is None"),
        ('{"format": "headinfer-heads-1"}', "must be a list of numbers for each layer"),
        ('{"format": "headinfer-heads-1", "scores": [["1"]]}', "must be a number, not '1'"),
        ('{"format": "headinfer-heads-1", "scores": [[NaN]]}', "in layer 0 is nan"),
        ('{"format": "headinfer-heads-1", "scores": [[1' + "0" * 400 + "]]}", "is too large"),
        (
            '{"format": "headinfer-heads-1", "scores": [[1]], "kv_heads": [2]}',
            "that kv_heads",
        ),
        (
            '{"format": "headinfer-heads-1", "scores": [[1]], "sink_tokens": 1.5}',
            "sink_tokens must be a count of tokens, not '1.5'",
        ),
        ('{"format": "headinfer-heads-1", "scores": [[1]], "model": 3}', "model must be text"),
        ("{}", "no query heads"),
        ('{"a-b": [1]}', "'a-b' names no query head"),
        ('{"0-0": []}', "query head 0-0 must have a list of scores"),
        ('{"0-0": ["x"]}', "must be a number, not 'x'"),
        ('{"0-0": [1], "1-1": [1]}', "2 of 2 x 2 query heads lack"),
    ],
)
def test_malformed_json_is_refused_in_one_line(tmp_path, text, said):
    path = tmp_path / "pattern.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=said) as refused:
        read_pattern(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("full_attention_heads.tsv", "1.0 2.0\n", "numbers between tabs"),
        ("full_attention_heads.tsv", "1.0\t2.0\n1.0\n", "different counts"),
        ("full_attention_heads.tsv", "", "has none"),
        ("full_attention_heads.tsv", None, "no full_attention_heads.tsv"),
        ("config.json", "{}", "must say sink_size and recent_size"),
        ("config.json", '{"sink_size": "64"}', "sink_size must be a count of tokens, not '64'"),
        ("config.json", None, "no config.json with sink_size"),
    ],
)
def test_a_malformed_folder_is_refused_in_one_line(duo, file, text, said):
    (duo / file).unlink()
    if text is not None:
        (duo / file).write_text(text)
    with pytest.raises(OptionError, match=said) as refused:
        read_pattern(duo)
    assert "\n" not in str(refused.value)


class Code:
    def __reduce__(self):
        return print, ("it ran",)


def test_a_tensor_file_runs_no_code(tmp_path, capsys):
    path = tmp_path / "scores.pt"
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(OptionError, match="no tensor that can be loaded") as refused:
        read_pattern(path)
    assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scores": torch.ones(2)}, "must hold a tensor, not a dict"),
        (torch.ones(2, 3, 4), r"not of shape \(2, 3, 4\)"),
        (torch.tensor([[float("inf")]]), "in layer 0 is inf"),
        (torch.ones(2, 2, dtype=torch.complex64), "must be real"),
    ],
)
def test_another_tensor_is_refused(tmp_path, values, said):
    path = tmp_path / "scores.pt"
    torch.save(values, path)
    with pytest.raises(OptionError, match=said):
        read_pattern(path)


@pytest.mark.parametrize("name", ["none.json", "none.pt", "none", "none/at.all"])
def test_a_file_that_is_not_there_is_told(tmp_path, name):
    with pytest.raises(OptionError, match="No such file or directory"):
        read_pattern(tmp_path / name)


def test_a_file_of_another_form_is_told(tmp_path):
    (tmp_path / "scores.csv").write_text("1,2")
    with pytest.raises(OptionError, match="its form is not known; give"):
        read_pattern(tmp_path / "scores.csv")


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(OptionError, match="cannot be written"):
        write_pattern(tmp_path / "none" / "pattern.json", OWN)


def test_reading_a_pattern_needs_no_torch(tmp_path):
    import subprocess
    import sys

    path = tmp_path / "pattern.json"
    write_pattern(path, OWN)
    program = f"""
import sys
from headinfer.heads.formats import read_pattern
assert read_pattern({str(path)!r}).model == "tiny"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
