"""Profiles: overlays on params.yaml that name only what differs.

Maps are merged, anything else is replaced. A key that params.yaml does not have is an error. The maps in
`REPLACED` are replaced whole, since their keys are names: merged, the other run's models would stay.
"""

import difflib
import os
from pathlib import Path
from typing import Any

PROFILES = Path(__file__).parent / "profiles"
REPLACED = ("sources", "teachers", "filter.weights.teacher", "label.beside", "evaluate.models")


def apply(name: str, params: Path = Path("params.yaml"), profiles: Path = PROFILES) -> list[str]:
    """Merge profile `name` into `params`; comments, order and untouched lines stay as they are.

    Returns:
        Dotted paths of what changed.

    Raises:
        ValueError: no such profile, an unknown key, or the result is not valid; `params` is left alone.
    """
    from ruamel.yaml import YAML, YAMLError
    from ruamel.yaml.representer import RoundTripRepresenter
    from ruamel.yaml.util import load_yaml_guess_indent

    from q2t.config import load

    known = sorted(path.stem for path in profiles.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"no profile {name!r}: there are {', '.join(known) or 'none'}")
    if not params.is_file():
        raise ValueError(f"there is no {params} here: change to the repository's root")

    class Representer(RoundTripRepresenter):
        """By default it writes nothing for null, on lines that no profile touches."""

    Representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml = YAML()
    yaml.Representer = Representer
    yaml.preserve_quotes, yaml.width = True, 1000
    try:
        tree, indent, offset = load_yaml_guess_indent(params.read_text(encoding="utf-8"), yaml=yaml)
    except YAMLError as error:
        raise ValueError(f"{params} is no YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{params} is empty: `git checkout {params}` brings it back")
    yaml.indent(sequence=indent, offset=offset)
    changed = merge(tree, yaml.load(profiles / f"{name}.yaml") or {}, profile=name)

    partial = params.with_name(params.name + ".partial")
    try:
        yaml.dump(tree, partial)
        load(partial)
        os.replace(partial, params)
    except ValueError as error:
        raise ValueError(f"profile {name!r} does not fit: {error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return changed


def merge(tree: Any, overlay: Any, profile: str, path: str = "") -> list[str]:
    """Merge `overlay` into the round-trip map `tree`, in place. Returns the dotted paths of what changed."""
    changed = []
    for key, value in overlay.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in tree:
            near = difflib.get_close_matches(str(key), map(str, tree), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(str, tree))}"
            raise ValueError(f"profile {profile!r}: params.yaml has no {where}: {hint}")
        if isinstance(value, dict) and isinstance(tree[key], dict) and where not in REPLACED:
            changed += merge(tree[key], value, profile, where)
        elif tree[key] != value:
            whole = isinstance(tree[key], dict | list) or isinstance(value, dict | list)
            rest = _detach(tree, key) if whole else ""
            tree[key] = value
            if rest:
                _attach(tree, key, rest)
            changed.append(where)
    return changed


# ruamel hangs the comment above a key onto the last leaf before it: replacing a map or a list
# would take the next section's comment with it.


def _detach(parent: Any, key: Any) -> str:
    """Cut off, and return, what follows the end of the line of the last leaf under parent[key]."""
    slots, index = _slot(parent, key)
    token = slots[index] if slots else None
    if token is None:
        return ""
    own, _, rest = token.value.partition("\n")
    token.value = own + "\n"
    return str(rest)


def _attach(parent: Any, key: Any, rest: str) -> None:
    """Let `rest` follow the last leaf under parent[key]."""
    from ruamel.yaml.error import CommentMark
    from ruamel.yaml.tokens import CommentToken

    slots, index = _slot(parent, key, create=True)
    own = slots[index]
    text = own.value.partition("\n")[0] if own else ""
    slots[index] = CommentToken(f"{text}\n{rest}", own.start_mark if own else CommentMark(0))


def _slot(parent: Any, key: Any, create: bool = False) -> tuple[list[Any], int]:
    """Where the comment after the last leaf under parent[key] hangs: ruamel's tokens, and an index."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    node = parent[key]
    while isinstance(node, CommentedMap | CommentedSeq) and node and not node.fa.flow_style():
        parent, key = node, next(reversed(node)) if isinstance(node, dict) else len(node) - 1
        node = parent[key]
    size, index = (4, 2) if isinstance(parent, dict) else (2, 0)
    slots = parent.ca.items.setdefault(key, [None] * size) if create else parent.ca.items.get(key, [])
    return slots, index
