import csv
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q2t.capability.electronics import catalog, kicad
from q2t.capability.electronics.catalog import Dropped, Part
from q2t.capability.electronics.sexpr import Atom, dump

COMMITTED = Path(__file__).parents[2] / "data" / "catalog"
KICAD = Path("/usr/share/kicad/symbols")


def symbol(name, description, keywords=""):
    return kicad.Symbol(name=name, root=name, description=description, keywords=keywords, footprint="")


def library(path, *symbols):
    """A .kicad_sym file of (name, parent or None, description)."""
    tree = [Atom("kicad_symbol_lib"), [Atom("version"), Atom("20211014")]]
    for name, parent, description in symbols:
        node = [Atom("symbol"), name, *([[Atom("extends"), parent]] if parent else [])]
        node.append([Atom("property"), "ki_description", description, [Atom("id"), Atom("5")]])
        node.append([Atom("property"), "Footprint", "Package_TO_SOT_SMD:SOT-223-3_TabPin2"])
        tree.append(node)
    path.write_text(dump(tree), encoding="utf-8")


def libraries(folder, mosfets=(), regulators=()):
    library(folder / "Transistor_FET.kicad_sym", *mosfets)
    library(folder / "Regulator_Linear.kicad_sym", *regulators)


def part(name="LM7805", **changes):
    base = {
        "root": name,
        "kind": "regulator",
        "polarity": "",
        "voltage": 5.0,
        "current": 1.0,
        "package": "TO-220",
    }
    return Part(name=name, **{**base, **changes})


@pytest.mark.parametrize(
    ("name", "description", "ratings"),
    [
        ("DMG3404L", "5.8A Id, 30V Vds, N-Channel MOSFET, SOT-23", ("N", 30, 5.8)),
        ("BSS138", "50V Vds, 0.22A Id, N-Channel MOSFET, SOT-23", ("N", 50, 0.22)),
        ("AON6411", "P-Channel MOSFET, -85A Id, -20V Vds, DFN-8", ("P", 20, 85)),
        ("IRF7606PBF", "-3.6A Id, -30V Vds, HexFET P-MOS Power MOSFET, Ronon 0.09R, Micro8", ("P", 30, 3.6)),
        ("PSMN5R2-60YL", "100A, 60V Vds, N-Channel MOSFET, 5.2mOhm Ron, LFPAK56", ("N", 60, 100)),
        ("FDMT80060", "300mA Id, 60V Vds, N-Channel Dual Cool PowerTrench MOSFET, MLP", ("N", 60, 0.3)),
    ],
)
def test_mosfet_ratings(name, description, ratings):
    assert kicad.mosfet(symbol(name, description)) == ratings


def test_a_channel_may_stand_in_the_keywords_only():
    si7141 = symbol("Si7141DP", "60A Id, 20V Vds, 1.9 mOhm Ron, PowerPAK-8", "P-Channel MOSFET")
    assert kicad.mosfet(si7141).polarity == "P"


@pytest.mark.parametrize(
    ("name", "description", "reason"),
    [
        ("2N7000", "0.2A Id, 200V Vds, N-Channel MOSFET, TO-92", "conflict: the description says 200 V"),
        ("FQP27P06", "-27A Id, -100V Vds, QFET P-Channel MOSFET", "conflict: the name states another Vds"),
        ("BUK9M34-100EX", "29A Id, 60V Vds, N-Channel MOSFET", "conflict: the name states another Vds"),
        (
            "FQP27P06",
            "27A Id, 60V Vds, QFET N-Channel MOSFET",
            "conflict: the name states the other polarity",
        ),
        ("X1", "-1A Id, 60V Vds, N-Channel MOSFET", "conflict: a negative rating"),
        ("DMG1012T", "20V Vds, 0.63 Id, N-Channel MOSFET, SOT-523", "no rating: Id"),
        ("X1", "1A Id, N-Channel MOSFET", "no rating: Vds"),
        ("X1", "1A Id, 2A Id, 30V Vds, N-Channel MOSFET", "several ratings: Id"),
        ("X1", "1A Id, 30V Vds, MOSFET", "no single polarity"),
        ("FDS6898A", "9.4A Id, 20V Vds, Dual N-Channel MOSFET, SO-8", "more than one transistor or gate"),
        ("BF545A", "5mA Idss, 30V Vgs, N-Channel JFET, SOT-23", "not a MOSFET"),
    ],
)
def test_rejected_mosfets(name, description, reason):
    with pytest.raises(kicad.Rejected, match=reason):
        kicad.mosfet(symbol(name, description))


@pytest.mark.parametrize(
    ("name", "description", "voltage", "current"),
    [
        ("LF50_TO220", "500mA Low Dropout Regulator, Fixed Output 5.0V, TO-220", 5.0, 0.5),
        ("uA7805", "Positive 1A 35V Linear Regulator, Fixed Output 5V, TO-220", 5.0, 1.0),
        ("L7885", "Positive 1.5A 35V Linear Regulator, Fixed Output 8.5V, TO-220", 8.5, 1.5),
        ("AZ1084-1.5", "5A 12V Fixed LDO Linear Regulator, 1.5V, TO-220", 1.5, 5.0),
        ("LT1083-5.0", "7.5A 20V LDO Linear Regulator, Fixed Output 5.V, TO-220", 5.0, 7.5),
        ("AP2112K-3.3", "600mA LDO, 3.8V-6V input voltage range, 3.3V fixed positive output", 3.3, 0.6),
        (
            "MCP1703Ax-150xxDB",
            "Low Quiescent Current LDO Regulator, 1.5V, 250mA, Vin<=16V, SOT-223",
            1.5,
            0.25,
        ),
        ("NCP662SQ33", "100-mA, 12V Max. Input, Ultralow-IQ LDO, 3.3V, SC-82AB", 3.3, 0.1),
        ("TPS730285DBV", "Low Noise, 200mA Low Drop 2.85V Regulator, SOT-23-5", 2.85, 0.2),
        ("TPS71533__SC70", "Low-drop Regulator, Io up to 50mA, Fixed Vo 3.3V, Ignd 3.2uA , SC70.", 3.3, 0.05),
        ("SPX3819M5-L-1-2", "500mA Low drop-out regulator, Fixed Output 1.2V, SOT-23-5", 1.2, 0.5),
        ("LT1761-5", "MICROPOWER Low Noise 5V 100mA LDO regulator, TSOT-23-5", 5.0, 0.1),
    ],
)
def test_regulator_ratings(name, description, voltage, current):
    assert kicad.regulator(symbol(name, description)) == ("", voltage, current)


@pytest.mark.parametrize(
    ("name", "description", "reason"),
    [
        (
            "AZ1084-1.8",
            "5A 12V Fixed LDO Linear Regulator, 1.5V, TO-220",
            "conflict: the name states another",
        ),
        (
            "LM7805_TO220",
            "1A 35V Linear Regulator, Fixed Output 8V",
            "conflict: the name states another voltage",
        ),
        ("TPS76329", "Low power 150mA LDO 2.8V fixed output voltage, SOT-23-5", "not confirmed by the name"),
        (
            "TLV713185PDBV",
            "150mA Low Dropout Regulator, Fixed Output 1.8V, SOT-23-5",
            "not confirmed by the name",
        ),
        ("LT3011xDD", "50mA, 3V to 80V Low Dropout Micropower Linear Regulator", "not confirmed by the name"),
        ("LM317L_TO92", "100mA 35V Adjustable Linear Regulator, TO-92", "adjustable output"),
        ("LM7909_TO220", "Negative 1A 35V Linear Regulator, Fixed Output 9V", "negative output"),
        ("LM2990SX-15", "Three terminal 1A regulator, Input -6V to -26V, Out -15V", "negative output"),
        ("TPS70345", "Dual-Output Regulators, 3.3V 1A/1.2V 2A, HTSSOP-24", "more than one output"),
        ("TC1017-xCT", "150mA, Tiny CMOS LDO With Shutdown, SOT-23-5", "no rating: output voltage"),
        ("IFX25401TBV50", "Fixed 5V LDO Linear Voltage Regulator (TO-263-5)", "no rating: current"),
    ],
)
def test_rejected_regulators(name, description, reason):
    with pytest.raises(kicad.Rejected, match=reason):
        kicad.regulator(symbol(name, description))


@given(st.integers(8, 240).map(lambda tenths: tenths / 10), st.integers(8, 240).map(lambda tenths: tenths / 10))
def test_a_written_out_voltage_decides(in_name, in_description):
    candidate = symbol(f"AZ1084-{in_name:.1f}", f"5A LDO Linear Regulator, Fixed Output {in_description}V, TO-220")
    if in_name == in_description:
        assert kicad.regulator(candidate).voltage == in_name
    else:
        with pytest.raises(kicad.Rejected, match="conflict"):
            kicad.regulator(candidate)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LM7805_TO220", "LM7805"),
        ("TPS71518__SC70", "TPS71518"),
        ("TLV70012_SOT23_SOT353", "TLV70012"),
        ("LP2951-3.0_WSON", "LP2951-3.0"),
        ("IGT40R070D1_E8220", "IGT40R070D1_E8220"),
        ("AMS1117-3.3", "AMS1117-3.3"),
    ],
)
def test_part_name(name, expected):
    assert kicad.part_name(name) == expected


def test_variants_share_the_root_at_the_end_of_the_chain(tmp_path):
    path = tmp_path / "some.kicad_sym"
    library(path, ("C", "B", "c"), ("A", None, "a"), ("B", "A", "b"))
    assert {s.name: s.root for s in kicad.read_symbols(path)} == {"A": "A", "B": "A", "C": "A"}


def test_a_variant_never_inherits_a_rating(tmp_path):
    path = tmp_path / "some.kicad_sym"
    path.write_text(
        '(kicad_symbol_lib (symbol "A-5.0" (property "ki_description" "1A LDO, Fixed Output 5V"))'
        ' (symbol "B-5.0" (extends "A-5.0")))'
    )
    _, variant = kicad.read_symbols(path)
    with pytest.raises(kicad.Rejected, match="no rating"):
        kicad.regulator(variant)


@pytest.mark.parametrize("text", ["(kicad_symbol_lib", "(kicad_pcb)", "", '(kicad_symbol_lib "a\\x")'])
def test_a_malformed_library_is_named_with_its_offset(tmp_path, text):
    path = tmp_path / "some.kicad_sym"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"some\.kicad_sym: offset \d+: "):
        kicad.read_symbols(path)


def test_build_sorts_counts_and_keeps_one_of_equal_parts(tmp_path):
    libraries(
        tmp_path,
        mosfets=[
            ("BSS138", None, "0.22A Id, 50V Vds, N-Channel MOSFET, SOT-23"),
            ("BF1", None, "N-Channel JFET"),
            ("AF1", None, "N-Channel JFET"),
        ],
        regulators=[
            ("LM7812_TO220", None, "1A Linear Regulator, Fixed Output 12V, TO-220"),
            ("LM7805_TO220", "LM7812_TO220", "1A Linear Regulator, Fixed Output 5V, TO-220"),
            ("LM7805_SOT223", None, "1A Linear Regulator, Fixed Output 5V, SOT-223"),
            ("LF50_TO220", None, "500mA Linear Regulator, Fixed Output 5V, TO-220"),
            ("LF50_TO252", None, "100mA Linear Regulator, Fixed Output 5V, TO-252"),
        ],
    )
    parts, dropped = catalog.build(tmp_path)
    assert [(p.name, p.root) for p in parts] == [
        ("BSS138", "BSS138"),
        ("LM7805", "LM7805_SOT223"),
        ("LM7812", "LM7812_TO220"),
    ]
    assert [(d.name, d.reason) for d in dropped] == [
        ("AF1", "not a MOSFET"),
        ("BF1", "not a MOSFET"),
        ("LF50", "conflict: symbols of one part differ in a rating"),
        ("LF50", "conflict: symbols of one part differ in a rating"),
        ("LM7805", "duplicate"),
    ]


numbers = st.integers(1, 10**5).map(lambda n: n / 1000)
parts_strategy = st.builds(
    lambda name, voltage, current, package, channel: part(
        name,
        voltage=voltage,
        current=current,
        package=package,
        polarity=channel,
        kind="mosfet" if channel else "regulator",
    ),
    st.text(min_size=1, alphabet=st.characters(codec="utf-8", exclude_characters="\r\0")),
    numbers,
    numbers,
    st.text(alphabet='TO-220,"/ \n'),
    st.sampled_from(["N", "P", ""]),
)


@given(st.lists(parts_strategy, unique_by=lambda p: (p.kind, p.name)))
def test_what_is_written_is_read_again(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("catalog")
    parts = sorted(parts, key=lambda p: (p.kind, p.name))
    catalog.write(parts, [], folder)
    assert catalog.read_all(folder) == (parts, [])


def test_a_row_without_a_rating_is_left_out_and_named(tmp_path):
    catalog.write([part(), part("LM7812", voltage=12.0)], [], tmp_path)
    table = tmp_path / "regulators.csv"
    table.write_text(table.read_text().replace(",12,", ",,"))
    assert [p.name for p in catalog.read(tmp_path)] == ["LM7805"]
    (dropped,) = catalog.read_all(tmp_path)[1]
    assert dropped == Dropped(name="LM7812", kind="regulator", reason="no rating: voltage", detail=f"{table}:3")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("LM7805,LM7805,regulator,,five,1,TO-220", "2: voltage 'five'"),
        ("LM7805,LM7805,regulator,,-5,1,TO-220", "2: voltage '-5'"),
        ("LM7805,LM7805,regulator,,5,nan,TO-220", "2: current 'nan'"),
        ("LM7805,LM7805,regulator,N,5,1,TO-220", "2: polarity 'N'"),
        ("LM7805,LM7805,regulator,Q,5,1,TO-220", "2: polarity 'Q'"),
        ("LM7805,LM7805,mosfet,N,5,1,TO-220", "2: kind is 'mosfet'"),
        (",LM7805,regulator,,5,1,TO-220", "2: name ''"),
        ("LM7805,LM7805,regulator,,5,1", "2: 6 fields, expected 7: name, root"),
        ('"LM7805,LM7805,regulator,,5,1,TO-220', "2: unexpected end"),
        ("A,A,regulator,,5,1,X\nA,A,regulator,,5,1,X", "3: name 'A' stands here twice"),
    ],
)
def test_a_malformed_row_is_named_by_file_line_and_field(tmp_path, row, message):
    catalog.write([], [], tmp_path)
    with open(tmp_path / "regulators.csv", "a") as table:
        table.write(row + "\n")
    with pytest.raises(ValueError) as raised:
        catalog.read(tmp_path)
    assert f"regulators.csv:{message}" in str(raised.value)


def test_a_foreign_header_is_refused(tmp_path):
    catalog.write([], [], tmp_path)
    (tmp_path / "mosfets.csv").write_text("part,volts\n")
    with pytest.raises(ValueError, match=r"mosfets\.csv:1: the header"):
        catalog.read(tmp_path)


def committed_drops():
    with open(COMMITTED / "dropped.csv", encoding="utf-8", newline="") as rows:
        return [Dropped(**row) for row in csv.DictReader(rows)]


def test_the_committed_tables():
    parts, without_rating = catalog.read_all(COMMITTED)
    assert not without_rating
    assert parts == sorted(parts, key=lambda p: (p.kind, p.name))
    count = Counter(p.kind for p in parts)
    assert count["mosfet"] >= 150
    assert count["regulator"] >= 500
    ratings = {p.name: (p.polarity, p.voltage, p.current) for p in parts}
    assert ratings["LM7805"] == ("", 5.0, 1.0)
    assert ratings["BSS84"] == ("P", 50.0, 0.13)
    assert ratings["DMG3404L"] == ("N", 30.0, 5.8)
    assert "2N7000" not in ratings
    assert [n for n in ratings if n.startswith("AZ1084")] == ["AZ1084-1.2", "AZ1084-1.5"]


def test_the_readme_counts_every_drop():
    readme = (COMMITTED / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (mosfet|regulator) \| (.+) \| (\d+) \|$", readme, re.MULTILINE)
    told = {(kind, reason): int(number) for kind, reason, number in rows}
    assert told == Counter((d.kind, d.reason) for d in committed_drops())


@pytest.mark.skipif(not KICAD.exists(), reason="Debian's kicad-symbols is not installed")
def test_the_committed_files_are_what_the_symbols_give(tmp_path):
    parts, dropped = catalog.build(KICAD)
    catalog.write(parts, dropped, tmp_path)
    for name in ("mosfets.csv", "regulators.csv", "dropped.csv"):
        assert (tmp_path / name).read_bytes() == (COMMITTED / name).read_bytes()
