import pytest
from hypothesis import given
from hypothesis import strategies as st

from q2t.capability.electronics.sexpr import Atom, dump, parse

atoms = st.from_regex(r'[^\s()"]+', fullmatch=True).map(Atom)
nodes = st.recursive(st.one_of(atoms, st.text()), lambda inner: st.lists(inner, max_size=4), max_leaves=20)
lists = st.lists(nodes, max_size=5)


def typed(node):
    return [typed(n) for n in node] if isinstance(node, list) else (type(node), str(node))


@given(lists)
def test_what_is_dumped_is_parsed_again(tree):
    assert typed(parse(dump(tree))) == typed(tree)


@given(lists, st.data())
def test_every_prefix_is_refused_with_an_offset_inside_it(tree, data):
    text = dump(tree)
    prefix = text[: data.draw(st.integers(0, len(text) - 1))]
    with pytest.raises(ValueError, match=r"^offset \d+: ") as raised:
        parse(prefix)
    assert int(str(raised.value).split()[1].rstrip(":")) <= len(prefix)


@given(st.text(alphabet='()"\\ an\n'))
def test_any_text_parses_or_is_a_value_error(text):
    try:
        tree = parse(text)
    except ValueError as error:
        assert str(error).startswith("offset ")
    else:
        assert typed(parse(dump(tree))) == typed(tree)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "offset 0: expected a list, got nothing"),
        ("  word", "offset 2: expected a list, got 'word'"),
        (")", "offset 0: expected a list, got ')'"),
        ("(a (b)", "offset 0: this list is never closed"),
        ("(a (b", "offset 3: this list is never closed"),
        ("(a) (b)", "offset 4: expected the end, got '('"),
        ('(a "b)', "offset 3: this string is never closed"),
        (r'(a "b\qc")', r"offset 5: unknown escape \q"),
    ],
)
def test_malformed_input_names_its_offset(text, message):
    with pytest.raises(ValueError) as raised:
        parse(text)
    assert str(raised.value) == message


def test_a_quoted_number_is_no_atom():
    bare, quoted = parse('(1 "1")')
    assert isinstance(bare, Atom)
    assert not isinstance(quoted, Atom)


def test_deep_nesting_needs_no_stack():
    assert len(parse("(" * 5000 + ")" * 5000)) == 1
