import pytest
from hypothesis import given
from hypothesis import strategies as st

from q2t.records import Problem, Verdict, content_id, dump_line, operands, read_jsonl, write_jsonl

PROBLEM = Problem(
    id="0" * 16, family="led", domain="target", split="test", inputs={"supply": 9}, question="Q?", check={}
)  # fmt: skip


def test_rows_come_back_and_equal_rows_are_equal_bytes(tmp_path):
    rows = [PROBLEM, PROBLEM.model_copy(update={"question": "Ω\n\u2028?"})]
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_jsonl(tmp_path / "a.jsonl", Problem) == rows
    write_jsonl(tmp_path / "b.jsonl", read_jsonl(tmp_path / "a.jsonl", Problem))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@given(st.text())
def test_any_text_is_one_line(text):
    line = dump_line(PROBLEM.model_copy(update={"question": text}))
    assert "\n" not in line and Problem.model_validate_json(line).question == text


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "the line"),
        (dump_line(PROBLEM).replace('"led"', "7"), "family"),
        (dump_line(PROBLEM).replace('"test"', '"exam"'), "split"),
        (dump_line(PROBLEM)[:-1] + ', "colour": 1}', "colour"),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_field(tmp_path, line, named):
    path = tmp_path / "rows.jsonl"
    path.write_text(dump_line(PROBLEM) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl:2: {named}"):
        read_jsonl(path, Problem)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def rows():
        yield PROBLEM
        raise RuntimeError

    write_jsonl(tmp_path / "a.jsonl", [PROBLEM])
    before = (tmp_path / "a.jsonl").read_bytes()
    with pytest.raises(RuntimeError):
        write_jsonl(tmp_path / "a.jsonl", rows())
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_content_ids_do_not_depend_on_the_order_of_keys():
    assert content_id({"a": 1, "b": 2}) == content_id({"b": 2, "a": 1}) != content_id({"a": 2, "b": 1})


def test_rows_are_closed_and_frozen():
    with pytest.raises(ValueError):
        Verdict(correct=True, rule="ok", comment="nice")
    with pytest.raises(ValueError):
        PROBLEM.family = "rc"


def test_operands_name_the_family():
    assert operands(PROBLEM) != operands(PROBLEM.model_copy(update={"family": "rc"}))
