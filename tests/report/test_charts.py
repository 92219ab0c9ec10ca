"""Scales, ticks and curves."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q2t.report import charts


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_few_and_inside(low: float, width: float, count: int) -> None:
    high = low + width
    values = charts.ticks(low, high, count)
    slack = 1e-6 * (abs(low) + width)
    assert len(values) <= count + 1
    assert all(low - slack <= value <= high + slack for value in values)
    assert values == sorted(values)


def test_ticks_are_round() -> None:
    assert charts.ticks(0, 1, 4) == [0, 0.25, 0.5, 0.75, 1]
    assert charts.ticks(0, 190, 4) == [0, 50, 100, 150]


@given(st.floats(1e-3, 1e9), st.floats(1.1, 1e4))
def test_log_ticks_are_inside(low: float, factor: float) -> None:
    values = charts.log_ticks(low, low * factor)
    assert values and all(low * 0.999 <= value <= low * factor * 1.001 for value in values)


def test_names_are_escaped() -> None:
    row = {"name": "<b>&", "value": 0.5, "interval": (0.4, 0.6), "kind": "other", "bytes": 10}
    for chart in (charts.bars([row], 'a "title"'), charts.scatter([row], 'a "title"')):
        assert "<b>" not in chart
        assert ElementTree.fromstring(chart).get("aria-label") == 'a "title"'


def test_bar_length_is_the_value() -> None:
    rows = [{"name": str(v), "value": v, "interval": None, "kind": "other"} for v in (0.25, 0.5, None)]
    svg = ElementTree.fromstring(charts.bars(rows, "t"))
    widths = [float(str(bar.get("width"))) for bar in svg.iter("rect")]
    assert len(widths) == 2 and widths[1] == pytest.approx(2 * widths[0])


def test_labels_of_neighbours_do_not_overlap() -> None:
    taken: list[charts.Box] = []
    for x in (100.0, 103.0, 106.0):
        charts._label_spot((x, 100.0), "student", taken, (0, 0, 360, 270))
    assert not any(charts._meet(a, b) for n, a in enumerate(taken) for b in taken[:n])


def test_a_label_without_a_free_place_stays_in_the_frame() -> None:
    frame = (0, 0, 360, 270)
    taken: list[charts.Box] = [(150, 0, 200, 270)]  # in the way of every place on the left; the right has no room
    charts._label_spot((280.0, 200.0), "base, worked examples", taken, frame)
    assert charts._inside(taken[-1], frame)


def test_curve_leaves_out_what_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "specialize.csv"
    path.write_text("step,loss,cross_entropy,kl\n1,2.5,2.5,\n2,nan,nan,\n3,1.5,1.5,\n")
    assert charts.read_curve(path) == {"loss": [(1, 2.5), (3, 1.5)], "cross_entropy": [(1, 2.5), (3, 1.5)]}
    chart = charts.curve(path, "t")
    assert chart is not None and chart.count("<polyline") == 1 and "distillation" not in chart
    path.write_text("step,loss,cross_entropy,kl\n")
    assert charts.curve(path, "t") is None


def test_bins_keep_mean_and_range() -> None:
    points = [(float(step), float(step % 10)) for step in range(1000)]
    rows = charts._bins(points, 100)
    assert len(rows) == 100 and set(rows[3][1:]) == {4.5, 0, 9}


def test_graph_draws_every_node_and_edge_downwards() -> None:
    nodes = [{"name": name, "text": "<1>"} for name in "abc"]
    svg = ElementTree.fromstring(charts.graph(nodes, {("a", "b"), ("a", "c")}, "t"))
    edges = [str(path.get("d")) for path in svg.iter("path") if path.get("class") == "edge"]
    assert [box.get("y") for box in svg.iter("rect")] == ["1", "43", "85"]
    assert edges[0].startswith("M40 29V") and "C" in edges[1]  # to the next one, and around it
    assert [text.text for text in svg.iter("text")] == ["a", "<1>", "b", "<1>", "c", "<1>"]
