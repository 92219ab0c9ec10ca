"""What a person reads: the summary, the page, the cards of the model and of its data, and the README's table.

Here are the few number formats that all of them share, and how a text file is published.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

NOTHING = "–"
TEXT_LIMIT = 1500
"""Characters of an answer that are shown."""


def percent(share: float | None) -> str:
    """0.714 as "71.4%"."""
    return NOTHING if share is None else f"{100 * share:.1f}%"


def span(interval: Sequence[float] | None) -> str:
    """(0.63, 0.79) as "63.0–79.0%"."""
    return NOTHING if interval is None else f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}%"


def size(count: float | None) -> str:
    """160,000,000 bytes as "160 MB", in powers of ten."""
    if count is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def millions(count: int | None) -> str:
    """80,123,456 parameters as "80.1M"."""
    return NOTHING if count is None else f"{count / 1e6:.1f}M" if count < 1e9 else f"{count / 1e9:.2f}B"


def figure(value: Any) -> str:
    """Any value of a metric file: integers with thousands separators, four digits of a fraction."""
    match value:
        case None:
            return NOTHING
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case list() | tuple():
            return ", ".join(map(figure, value))
    return str(value)


def quantity(value: Any, unit: str) -> str:
    """An expected or measured value: 440000.0 in ohm as "440 kohm"; as `figure` without a unit."""
    from quantiphy import Quantity

    return Quantity(value, unit).render() if unit and isinstance(value, int | float) else figure(value)


def excerpt(text: str, limit: int = TEXT_LIMIT) -> str:
    """The text, cut with a note of how much is left out."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested maps as one map with dotted keys; empty values are left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def template(name: str) -> "jinja2.Template":
    """A template of this folder, with the number formats as filters. HTML is escaped, Markdown is not."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html.j2"),  # select_autoescape() would not recognise it
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {each.__name__: each for each in (percent, span, size, millions, figure, quantity, excerpt)}
    return environment.get_template(name)


def publish(path: Path, text: str) -> None:
    """Write a text file; it appears by rename when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
