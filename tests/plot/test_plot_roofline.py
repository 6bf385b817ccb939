"""The plot of the roofline: what is drawn where, and labels that can be read."""

import dataclasses
import itertools

import pytest

pytest.importorskip("matplotlib")

from matplotlib.text import Text

from headinfer.estimate.machines import HARDWARE, preset_hardware
from headinfer.estimate.roofline import PAPER_CONTEXTS, roofline_rows
from headinfer.plot.roofline import draw
from headinfer.plot.style import save
from shapes import LLAMA_3_8B, model_shape

GROUP_OF_1 = dataclasses.replace(
    model_shape(kv_heads=32, group=1, key_dim=128, value_dim=128, itemsize=2), name="Group of 1"
)
RTX_4090 = preset_hardware("rtx-4090")
CPU = dataclasses.replace(
    RTX_4090,
    name="cpu",
    matmul_flops_per_s=2e11,
    device_bytes_per_s=3e10,
    link_bytes_per_s=None,
)


def plot(shape, machine, contexts=PAPER_CONTEXTS):
    figure = draw(shape, machine, roofline_rows(shape, machine, contexts))
    figure.canvas.draw()
    return figure


def texts_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    "machine", [RTX_4090, HARDWARE["h200"], CPU], ids=lambda machine: machine.name
)
@pytest.mark.parametrize("shape", [LLAMA_3_8B, GROUP_OF_1], ids=lambda shape: shape.name)
def test_level_labels_overlap_neither_each_other_nor_markers(shape, machine):
    (axes,) = plot(shape, machine).axes
    level = [text for text in axes.texts if text.get_rotation() == 0]
    # Text's own extent: that of an annotation holds the line to its marker too.
    boxes = [Text.get_window_extent(text) for text in level]
    boxes.append(axes.get_legend().get_window_extent())
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    frame = axes.get_window_extent()
    assert all(frame.contains(*corner) for box in boxes for corner in box.corners())
    markers = [line for line in axes.lines if line.get_marker() in ("o", "D")]
    assert len(markers) == (24 if machine.link_bytes_per_s else 12)
    for line in markers:
        at = axes.transData.transform(line.get_xydata()[0])
        assert not any(box.contains(*at) for box in boxes)


def test_roofs_and_points_are_named():
    texts = texts_of(plot(LLAMA_3_8B, RTX_4090))
    for name in (
        "compute: 165 TFLOP/s",
        "device memory: 1.00 TB/s",
        "link: 25.0 GB/s",
        "compute-bound from 6,600 FLOP/byte",
        "prefill 1K",
        "prefill 1K\n102 TFLOP/s",
        "prefill 100K",
        "decode 1K, 10K, 100K\n100 GFLOP/s",
    ):
        assert name in texts


@pytest.mark.slow
def test_points_that_coincide_share_a_label():
    texts = texts_of(plot(LLAMA_3_8B, RTX_4090, [1024, 2048, 4096, 2**20]))
    # Intensities of 3.98 to 4.00 on the device, and of 4 over the link.
    assert "decode 1K to 1M\n3.98 TFLOP/s" in texts
    assert "decode 1K to 1M\n100 GFLOP/s" in texts


def test_without_a_link_there_is_no_word_of_one():
    texts = texts_of(plot(LLAMA_3_8B, CPU))
    assert "memory: 30.0 GB/s" in texts
    assert not any("link" in text for text in texts)


def test_a_png_of_1600_by_1000(tmp_path):
    path = tmp_path / "roofline.png"
    save(draw(LLAMA_3_8B, RTX_4090, roofline_rows(LLAMA_3_8B, RTX_4090)), str(path))
    header = path.read_bytes()[:24]
    assert header[1:4] == b"PNG"
    assert [int.from_bytes(header[start : start + 4], "big") for start in (16, 20)] == [1600, 1000]
