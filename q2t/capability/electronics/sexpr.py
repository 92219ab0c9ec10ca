"""S-expressions, as KiCad writes them: lists in parentheses, bare atoms, and strings in double quotes.

The grammar is that of KiCad's file formats (dev-docs.kicad.org, "S-Expression Format"): no comments.
"""

import re
from collections.abc import Iterator

_TOKEN = re.compile(r'\s*(?:(?P<bracket>[()])|(?P<string>"(?:[^"\\]|\\.)*")|(?P<atom>[^\s()"]+))', re.DOTALL)
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\"}
_REVERSED = {character: "\\" + code for code, character in _ESCAPES.items()}


class Atom(str):
    """A bare word or number. A quoted string is a plain `str`: the two differ in the file."""

    __slots__ = ()


Node = str | list["Node"]


def parse(text: str) -> list[Node]:
    """The one list that a text consists of.

    Raises:
        ValueError: the text is no single, complete list; says at which offset (in characters).
    """
    top: list[Node] = []
    stack, opened = [top], [0]
    for offset, kind, token in _tokens(text):
        if len(stack) == 1 and (top or token != "("):
            raise ValueError(f"offset {offset}: expected {'the end' if top else 'a list'}, got {token[:20]!r}")
        if kind == "string":
            stack[-1].append(_unquote(token, offset))
        elif kind == "atom":
            stack[-1].append(Atom(token))
        elif token == "(":
            inner: list[Node] = []
            stack[-1].append(inner)
            stack.append(inner)
            opened.append(offset)
        else:
            stack.pop()
            opened.pop()
    if len(stack) > 1:
        raise ValueError(f"offset {opened[-1]}: this list is never closed")
    if not top:
        raise ValueError("offset 0: expected a list, got nothing")
    only = top[0]
    assert isinstance(only, list)
    return only


def dump(node: Node) -> str:
    """The text of a node on one line: `parse(dump(x)) == x`, atoms and strings kept apart."""
    if isinstance(node, list):
        return "(" + " ".join(map(dump, node)) + ")"
    if isinstance(node, Atom):
        return str(node)
    return '"' + "".join(_REVERSED.get(c, c) for c in node) + '"'


def _tokens(text: str) -> Iterator[tuple[int, str, str]]:
    """(offset, kind, token) of every token."""
    at = 0
    end = len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:  # everything but an open string is a token
            opening = text.index('"', at)
            raise ValueError(f"offset {opening}: this string is never closed")
        kind = match.lastgroup
        assert kind is not None
        yield match.start(kind), kind, match[kind]
        at = match.end()


def _unquote(token: str, offset: int) -> str:
    def character(match: re.Match[str]) -> str:
        code = match[1]
        if code not in _ESCAPES:
            raise ValueError(f"offset {offset + match.start() + 1}: unknown escape \\{code}")
        return _ESCAPES[code]

    return re.sub(r"\\(.)", character, token[1:-1], flags=re.DOTALL)
