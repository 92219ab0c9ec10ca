"""KiCad's symbol libraries: what one line of prose says of a MOSFET or a linear regulator.

A symbol describes itself in `ki_description` ("5.8A Id, 30V Vds, N-Channel MOSFET, SOT-23"). That line is
typed by hand and often copied from a neighbour, so a rating has to agree with the part's name wherever the
name states it.
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from q2t.capability.electronics import sexpr
from q2t.records import Record

ERRATA = {"2N7000": "conflict: the description says 200 V, the makers' data sheets 60 V"}
"""Errors that neither the name nor the rest of the description gives away."""


class Symbol(Record):
    """What a library says of one symbol."""

    name: str
    root: str
    """The symbol at the end of the chain of `extends`, or the symbol itself."""
    description: str
    keywords: str
    footprint: str


class Ratings(NamedTuple):
    """Magnitudes, in V and A."""

    polarity: Literal["N", "P", ""]
    voltage: float
    current: float


class Rejected(Exception):
    """Why a symbol gives no ratings."""


def read_symbols(library: Path) -> list[Symbol]:
    """The symbols of one `.kicad_sym` file, in its order.

    Raises:
        ValueError: the file is no symbol library; names it and the offset.
    """
    try:
        tree = sexpr.parse(library.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{library}: {error}; install the distribution's kicad-symbols again") from None
    if tree[:1] != ["kicad_symbol_lib"]:
        raise ValueError(f"{library}: offset 1: expected kicad_symbol_lib; needs a library of KiCad 6 or later")
    properties: dict[str, dict[str, str]] = {}
    parents: dict[str, str] = {}
    for node in tree:
        match node:
            case ["symbol", str(name), *fields]:
                own = properties[name] = {}
                for field in fields:
                    match field:
                        case ["extends", str(parent)]:
                            parents[name] = parent
                        case ["property", str(key), str(value), *_]:
                            own[key] = value

    def root(name: str) -> str:
        return root(parents[name]) if name in parents else name

    # KiCad lets a variant inherit its parent's properties; a rating of another part would be worse than none.
    return [
        Symbol(
            name=name,
            root=root(name),
            description=own.get("ki_description", ""),
            keywords=own.get("ki_keywords", ""),
            footprint=own.get("Footprint", ""),
        )
        for name, own in properties.items()
    ]


_SUFFIX = re.compile(r"_+(?:TO|T?SOT|SO|SC|SOIC|DIP|HTSSOP|VSSOP|TSSOP|WSON|DFN|VQFN)[-\d_]*(?:_.*)?$")


def part_name(symbol: str) -> str:
    """The symbol's name without KiCad's package suffix: "LM7805_TO220" is the part LM7805."""
    return _SUFFIX.sub("", symbol)


def package(symbol: Symbol) -> str:
    """The footprint without library and dimensions (or, without a footprint, the description's last words).

    "Package_TO_SOT_SMD:SOT-223-3_TabPin2" is a SOT-223-3, "Package_DirectFET:DirectFET_MX" a DirectFET MX.
    """
    if not symbol.footprint:
        return symbol.description.rsplit(",", 1)[-1].strip(" .")
    words = symbol.footprint.split(":")[-1].split("_")
    return words[0] if re.search(r"\d", words[0]) else " ".join(words[:2])


_VDS = re.compile(r"([-+]?\d+(?:\.\d+)?)\s*V Vds")
_ID = re.compile(r"(?<![\w.])([-+]?\d+(?:\.\d+)?)\s*(m?)A\b")
_CHANNEL = re.compile(r"\b([NP])[- ]?(?:Channel|MOS)", re.IGNORECASE)
_NAMED_VDS: list[tuple[re.Pattern[str], int]] = [
    (re.compile(r"\d[NP](\d\d)(?!\d)"), 10),  # BSC026N08NS5, FQP27P06, STB15N80K5
    (re.compile(r"^ZXM[NP](\d+)[A-Z]"), 10),
    (re.compile(r"^C\dM\d{4}(\d{3})"), 10),
    (re.compile(r"^I[GP][A-Z]+(\d\d)R"), 10),
    (re.compile(r"^(?:BUK|PSMN).*-(\d+)"), 1),
]
"""Makers' naming schemes that state Vds, and the scheme's unit in V."""
_NAMED_CHANNEL = re.compile(r"\d([NP])\d\d(?!\d)|^ZXM([NP])")


def mosfet(symbol: Symbol) -> Ratings:
    """Channel, |Vds| and continuous |Id| of a single MOSFET.

    Raises:
        Rejected: the symbol is none, or doesn't say, or contradicts its name.
    """
    name, text = part_name(symbol.name), symbol.description
    if name in ERRATA:
        raise Rejected(ERRATA[name])
    if "JFET" in text or "MOS" not in f"{text} {symbol.keywords}".upper():
        raise Rejected("not a MOSFET")
    if re.search(r"\bdual\b(?! cool)|complementary|common|load switch|[NP]/[NP]-", text, re.IGNORECASE):
        raise Rejected("more than one transistor or gate")
    channels = {c.upper() for c in _CHANNEL.findall(text) or _CHANNEL.findall(symbol.keywords)}
    if len(channels) != 1:
        raise Rejected("no single polarity")
    polarity: Literal["N", "P"] = "N" if channels == {"N"} else "P"
    voltage = _only({float(v) for v in _VDS.findall(text)}, "Vds")
    current = _only(_amperes(_ID, text), "Id")
    if polarity == "N" and min(voltage, current) < 0:
        raise Rejected("conflict: a negative rating of an N-channel transistor")
    for scheme, unit in _NAMED_VDS:
        if (match := scheme.search(name)) and int(match[1]) * unit != abs(voltage):
            raise Rejected("conflict: the name states another Vds")
    if (match := _NAMED_CHANNEL.search(name)) and polarity not in match.groups():
        raise Rejected("conflict: the name states the other polarity")
    return Ratings(polarity, abs(voltage), abs(current))


_V = r"(\d+(?:\.\d*)?)\s*V(?![a-z])"
_OUTPUTS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"fixed(?: positive)?(?: output| vo)?(?: voltage)? {_V}",
        rf"(?<![\w.]){_V} (?:positive )?fixed(?: positive)? output",
        rf"(?<![\w.]){_V} (?:output|preset vout)",
        rf"vout =? ?{_V}",
    )
]
_INPUT = re.compile(
    rf"vin ?(?:<=|up to) ?{_V}|[\d.]+V? ?(?:-|to) ?[\d.]+V input|{_V} (?:max\. )?input|range {_V}",
    re.IGNORECASE,
)
_AMPERE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*-?(m?)A\b")


def regulator(symbol: Symbol) -> Ratings:
    """Output voltage and current of a positive linear regulator with one fixed output.

    Raises:
        Rejected: the symbol is none, or doesn't say, or its name doesn't confirm the voltage.
    """
    name, text = part_name(symbol.name), symbol.description
    if re.search(r"adjust|variable|programmable|\bADJ\b", text, re.IGNORECASE):
        raise Rejected("adjustable output")
    if re.search(r"\bdual\b", text, re.IGNORECASE):
        raise Rejected("more than one output")
    if re.search(rf"negative|(?<![\w.])-{_V}", text, re.IGNORECASE):
        raise Rejected("negative output")
    stated = {float(v) for pattern in _OUTPUTS for v in pattern.findall(text)}
    # "5A 12V Fixed LDO Linear Regulator, 1.5V": where no word tells them apart, the output comes last.
    last = {float(v) for v in re.findall(rf"(?<![\w.]){_V}", _INPUT.sub("", text))[-1:]}
    voltage = _only(stated or last, "output voltage")
    current = _only(_amperes(_AMPERE, text), "current")
    named = voltage_in(name)
    if named is not None and named != voltage:
        raise Rejected("conflict: the name states another voltage")
    if named is None and not confirms(name, voltage):
        raise Rejected("voltage not confirmed by the name")
    return Ratings("", voltage, current)


def voltage_in(name: str) -> float | None:
    """The output that a regulator's name writes out, in V: AZ1084-1.8, LM7805. TPS7133 has only a code."""
    if match := re.search(r"(?<!\d)(\d{1,2})[.V](\d{1,2})(?!\d)", name):
        return float(f"{match[1]}.{match[2]}")
    if match := re.match(r"[A-Za-z]+78[A-Z]{0,2}(\d\d)(?!\d)", name):
        volts = int(match[1])
        return volts if volts <= 24 else volts / 10  # the series ends at 7824; 7833 and 7885 are tenths
    return None


def confirms(name: str, voltage: float) -> bool:
    """Whether a number in the name is a usual code of the voltage: 33, 330, 3-3 or 5, 05, 50, 500."""
    codes = {f"{voltage:.1f}".replace(".", "-"), f"{round(voltage * 100):03d}"}
    if round(voltage * 10) / 10 == voltage:
        codes.add(f"{round(voltage * 10):02d}")
    if voltage == int(voltage):
        codes.add(f"{int(voltage):02d}")
    numbers = re.findall(r"\d+", name) + re.findall(r"\d+-\d(?!\d)", name)
    # The code ends a series number (TPS763|33), or is followed by one digit more (XC6220B33|1MR).
    return f"{voltage:g}" in numbers or any(n.endswith(c) or n[:-1] == c for n in numbers for c in codes)


def _amperes(pattern: re.Pattern[str], text: str) -> set[float]:
    return {float(number) / (1000 if milli else 1) for number, milli in pattern.findall(text)}


def _only(values: set[float], what: str) -> float:
    if not values:
        raise Rejected(f"no rating: {what}")
    if len(values) > 1:
        raise Rejected(f"several ratings: {what}")
    return values.pop()
