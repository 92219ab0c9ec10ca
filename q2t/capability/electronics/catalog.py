"""The parts catalogue: MOSFETs and fixed positive linear regulators, from KiCad's symbol libraries.

`q2t catalog` builds it once; the tables are committed, so the pipeline needs no KiCad.
"""

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from q2t.capability.electronics import kicad
from q2t.records import Record

Kind = Literal["mosfet", "regulator"]

LIBRARIES: dict[Kind, tuple[str, Callable[[kicad.Symbol], kicad.Ratings]]] = {
    "mosfet": ("Transistor_FET.kicad_sym", kicad.mosfet),
    "regulator": ("Regulator_Linear.kicad_sym", kicad.regulator),
}
TABLES: dict[Kind, str] = {"mosfet": "mosfets.csv", "regulator": "regulators.csv"}


class Part(Record):
    """A part that can be bought, and the two ratings that it is chosen by."""

    name: str = Field(min_length=1)
    root: str = Field(min_length=1)
    """The KiCad symbol that this part is a variant of, or its own. Splits go by root."""
    kind: Kind
    polarity: Literal["N", "P", ""]
    """The channel of a MOSFET; empty for a regulator."""
    voltage: float = Field(gt=0, allow_inf_nan=False)
    """MOSFET: largest |Vds|; regulator: fixed output. In V."""
    current: float = Field(gt=0, allow_inf_nan=False)
    """MOSFET: continuous |Id|; regulator: largest output current. In A."""
    package: str


class Dropped(Record):
    """A symbol, or a row of a table, that became no part."""

    name: str
    kind: Kind
    reason: str
    detail: str
    """What the reason was read from."""


def build(symbols: Path) -> tuple[list[Part], list[Dropped]]:
    """All parts of KiCad's symbol folder, and all symbols that give none; both sorted by kind and name.

    Raises:
        ValueError: a library is malformed; names the file and the offset.
    """
    parts: list[Part] = []
    dropped: list[Dropped] = []
    for kind, (library, ratings) in LIBRARIES.items():
        for symbol in kicad.read_symbols(symbols / library):
            try:
                polarity, voltage, current = ratings(symbol)
            except kicad.Rejected as why:
                detail = symbol.description.strip()
                dropped.append(Dropped(name=symbol.name, kind=kind, reason=str(why), detail=detail))
                continue
            part = Part(
                name=kicad.part_name(symbol.name),
                root=symbol.root,
                kind=kind,
                polarity=polarity,
                voltage=voltage,
                current=current,
                package=kicad.package(symbol),
            )
            parts.append(part)
    parts, copies = _without_duplicates(parts)
    return parts, sorted([*dropped, *copies], key=lambda d: (d.kind, d.name, d.detail))


def write(parts: Sequence[Part], dropped: Iterable[Dropped], folder: Path) -> None:
    """mosfets.csv, regulators.csv and dropped.csv; each appears by rename when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, table in TABLES.items():
        _write(folder / table, Part, [p for p in parts if p.kind == kind])
    _write(folder / "dropped.csv", Dropped, dropped)


def read(folder: Path) -> list[Part]:
    """The parts of both tables. Rows without a rating are left out: `read_all` names them."""
    return read_all(folder)[0]


def read_all(folder: Path) -> tuple[list[Part], list[Dropped]]:
    """The parts of both tables, and the rows that are none because a rating is empty.

    Raises:
        ValueError: a malformed row, or a name twice in a table; names the file, the line and the field.
    """
    parts: list[Part] = []
    dropped: list[Dropped] = []
    fields = list(Part.model_fields)
    for kind, table in TABLES.items():
        path = folder / table
        seen: set[str] = set()
        with open(path, encoding="utf-8", newline="") as text:
            rows = csv.reader(text, strict=True)
            try:
                header = next(rows, [])
                if header != fields:
                    raise ValueError(f"{path}:1: the header is {header}, expected {fields}; run q2t catalog")
                for row in rows:
                    where = f"{path}:{rows.line_num}"
                    if len(row) != len(fields):
                        raise ValueError(f"{where}: {len(row)} fields, expected {len(fields)}: {', '.join(fields)}")
                    values = dict(zip(fields, row, strict=True))
                    if values["kind"] != kind:
                        raise ValueError(f"{where}: kind is {values['kind']!r}, in this table it is {kind!r}")
                    if values["name"] in seen:
                        raise ValueError(f"{where}: name {values['name']!r} stands here twice; keep one")
                    seen.add(values["name"])
                    missing = [f for f in ("voltage", "current") if not values[f].strip()]
                    if missing:
                        reason = f"no rating: {', '.join(missing)}"
                        dropped.append(Dropped(name=values["name"], kind=kind, reason=reason, detail=where))
                    else:
                        parts.append(_part(values, where))
            except csv.Error as error:
                raise ValueError(f"{path}:{rows.line_num}: {error}; correct or delete that line") from None
    return parts, dropped


def _part(values: dict[str, str], where: str) -> Part:
    try:
        part = Part.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        raise ValueError(f"{where}: {field} {values[field]!r}: {first['msg']}; correct or delete that line") from None
    if (part.polarity == "") != (part.kind == "regulator"):
        raise ValueError(f"{where}: polarity {part.polarity!r}: a MOSFET has N or P, a regulator none")
    return part


def _write(path: Path, kind: type[Record], rows: Iterable[Record]) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", newline="") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(kind.model_fields)
        for row in rows:
            values = row.model_dump().values()
            table.writerow(f"{v:g}" if isinstance(v, float) else v for v in values)
    os.replace(partial, path)


def _without_duplicates(parts: Iterable[Part]) -> tuple[list[Part], list[Dropped]]:
    """One part for each name, sorted. Copies go; where they differ in a rating, all of them go."""
    kept: list[Part] = []
    dropped: list[Dropped] = []
    groups: dict[tuple[Kind, str], list[Part]] = {}
    for part in sorted(parts, key=lambda p: (p.kind, p.name, p.root, p.package)):
        groups.setdefault((part.kind, part.name), []).append(part)
    for (kind, name), group in groups.items():
        agree = len({(p.polarity, p.voltage, p.current) for p in group}) == 1
        if agree:
            kept.append(group[0])
        for copy in group[1:] if agree else group:
            reason = "duplicate" if agree else "conflict: symbols of one part differ in a rating"
            detail = f"{copy.package}, root {copy.root}: {copy.voltage:g} V, {copy.current:g} A"
            dropped.append(Dropped(name=name, kind=kind, reason=reason, detail=detail))
    return kept, dropped
