"""The page: what it says of records, and that nothing in them can act on it."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import msgspec
import pytest

from pytest_batchinv.report import html
from pytest_batchinv.report.html import view
from pytest_batchinv.report.record import Breakpoints, Counts, Culprit, Finding, OpCoverage, Record, Skipped, Trace, TracedOp
from pytest_batchinv.subjects.base import SubjectInfo

EVIL = "</script><script>alert(1)</script>"
QUOTES = "\"'><img src=x onerror=alert(2)>"


def record(relation="I", verdict="equal", name="m", kind="transformers", **words):
    info = SubjectInfo(name=name, kind=kind, device=words.pop("device", "cpu"), dtype=words.pop("dtype", "fp32"))
    words.setdefault("counts", Counts(examples=20, rows=300, compared_bytes=5_000_000))
    return Record(**{"subject": info, "relation": relation, "verdict": verdict, "mode": "on", **words})


def finding(**words):
    return Finding(
        **{
            "case": '{"rows":[0,1]}',
            "position": 1,
            "n_rows": 2,
            "row": '{"id":1}',
            "output": "the output",
            "sides": ("alone", "in the batch"),
            "kind": "bits",
            "index": (4,),
            "expected": "1.0",
            "actual": "2.0",
            "expected_hex": "0x3f800000",
            "actual_hex": "0x40000000",
            "ulp": 8388608,
            "n_differ": 3,
            "n_total": 64,
            **words,
        }
    )


def op(overload="aten::mm", agreement="equal", index=(0, 0), **words):
    return TracedOp(overload=overload, index=index, agreement=agreement, **words)


def trace(layers=30, per_layer=70):
    """As of a model of 0.6B parameters: in layer 3 one operator differs, and all after it follow."""
    ops = []
    for i in range(layers * per_layer):
        layer = i // per_layer
        agreement = "equal" if i < 3 * per_layer + 5 else "differs" if i == 3 * per_layer + 5 else "follows"
        ops.append(
            op(
                f"aten::op{i % 12}.Tensor",
                agreement,
                (i, i + 2),
                module=f"model.layers.{layer}.mlp.down_proj",
                source=f"models/qwen3/modeling_qwen3.py:{i % 300}",
                line="down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
                shapes=("bf16[5, 1024]", "bf16[35, 1024]"),
                n_differ=0 if agreement == "equal" else 1 + i,
                n_total=5120,
                ulp=0 if agreement == "equal" else 2 ** min(20, i // 100),
                produced_by=(i - 1, i // 2) if i else (),
            )
        )
    culprit = Culprit(op=3 * per_layer + 5, calls=2, inputs=(("bf16[5, 8]",), ("bf16[35, 8]",)), effect="causes")
    return Trace(ops=tuple(ops), culprits=(culprit,))


def page(*records, outcome=None):
    return html.render(records, {}, {"model": "auto"}, outcome or {"exit_status": 0, "passed": 1})


class Elements(HTMLParser):
    """All elements with their attributes, the text of each script, and the text of the page."""

    def __init__(self, text):
        super().__init__()
        self.all, self.scripts, self.words, self._in = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.all.append((tag, dict(attributes)))
        self._in = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1] += data
        elif self._in != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


def hostile():
    """A record in which each text is hostile."""
    ops = (
        op(EVIL, module=EVIL, source=EVIL, line=QUOTES, shapes=(EVIL, QUOTES)),
        op("b", "differs", (1, 1), ulp=4, n_differ=1, n_total=2),
    )
    culprit = Culprit(op=1, calls=1, inputs=((EVIL,), (QUOTES,)), cure=EVIL, kernels=((EVIL,), (QUOTES,)))
    found = finding(
        case=EVIL,
        row=QUOTES,
        output=EVIL,
        sides=(EVIL, QUOTES),
        breakpoints=Breakpoints(((2, 3),), 5, 9),
        trace=Trace(ops=ops, culprits=(culprit,), control_flow=(EVIL,), notes=(QUOTES,)),
        replay=EVIL,
    )
    return record(
        verdict="differs",
        name=EVIL,
        kind=EVIL,
        dtype=EVIL,
        device=QUOTES,
        finding=found,
        error=EVIL,
        ops=OpCoverage(covered={EVIL: 1}, unverified=(QUOTES,)),
        not_run=(Skipped(EVIL, QUOTES),),
        notes=(EVIL,),
        nodeid=EVIL,
        machine={EVIL: QUOTES, "cpu": EVIL},
        fingerprint=EVIL,
        receipt={EVIL: QUOTES},
    )


def test_no_text_of_a_record_becomes_markup_or_reaches_the_script():
    found = Elements(html.render([hostile()], {EVIL: EVIL}, {EVIL: QUOTES}, {EVIL: 3}))
    assert found.scripts == Elements(page(record())).scripts
    assert len(found.scripts) == 1
    assert "img" not in {tag for tag, _ in found.all}
    assert not [attributes for _, attributes in found.all if any(name.startswith("on") for name in attributes)]
    assert found.text.count(EVIL) > 15
    assert found.text.count(QUOTES) > 8


def test_the_policy_of_the_page_lets_its_own_script_run_and_nothing_else():
    found = Elements(page(record()))
    [policy] = [attributes["content"] for tag, attributes in found.all if attributes.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(found.scripts[0].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';" in policy


def test_nothing_outside_the_page_is_asked_for():
    text = page(record("I", "differs", finding=finding(trace=trace(4), breakpoints=Breakpoints(((2, 3),), 5, 9))))
    addresses = {
        value
        for _, attributes in Elements(text).all
        for name, value in attributes.items()
        if name in ("href", "xlink:href", "src", "action", "data", "srcset")
    }
    assert addresses and all(address.startswith("#") for address in addresses)
    assert not re.search(r"@import|url\((?!#)", text)


def test_ids_are_unique_and_links_lead_to_one():
    one, other = (record("I", "differs", name=name, finding=finding(trace=trace(4))) for name in "ab")
    found = Elements(page(one, other))
    ids = [attributes["id"] for _, attributes in found.all if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"][1:] for tag, attributes in found.all if tag == "a"}
    assert links and links <= set(ids)
    drawn = re.findall(r'(?:url\(|xlink:href=")#([^")]+)', page(one, other))
    assert drawn and set(drawn) <= set(ids)


def test_a_link_to_an_operator_that_is_not_there_is_no_link():
    found = Elements(page(record("I", "differs", finding=finding(trace=Trace(ops=(op(produced_by=(7,)),))))))
    assert not [attributes for tag, attributes in found.all if tag == "a" and attributes["href"].endswith("op7")]


def test_the_trace_of_a_model_of_2100_operators_stays_under_five_megabytes():
    text = page(record("I", "differs", finding=finding(trace=trace())))
    found = Elements(text)
    assert sum(tag == "tr" and "-op" in attributes.get("id", "") for tag, attributes in found.all) == 2100
    assert len(text.encode()) < 5_000_000


def test_layers_fold_where_nothing_differs_by_itself():
    layers = view._trace(trace(6), "t", ("alone", "in the batch")).layers
    assert [layer.name for layer in layers] == [f"model.layers.{i}" for i in range(6)]
    assert [layer.name for layer in layers if not layer.shut] == ["model.layers.3"]
    assert layers[3].summary == "1 differs, 64 follows, 5 equal"
    without_culprits = msgspec.structs.replace(trace(6), culprits=())
    shut = [layer.shut for layer in view._trace(without_culprits, "t", ("", "")).layers]
    assert shut == [True, True, True, False, True, True]
    assert not any(layer.shut for layer in view._trace(trace(1, 30), "t", ("", "")).layers)


@pytest.mark.parametrize(
    "module, layer",
    [("model.layers.3.mlp.up_proj", "model.layers.3"), ("lm_head", "lm_head"), ("h.11", "h.11"), ("", ""), ("a.b", "a.b")],
)
def test_a_layer_is_the_path_up_to_its_number(module, layer):
    assert view.layer_of(module) == layer


@pytest.mark.parametrize("ulp, level", [(None, 0), (0, 0), (1, 1), (15, 1), (16, 2), (256, 3), (2**28, 8), (2**63, 8)])
def test_the_intensity_is_of_logarithms(ulp, level):
    assert view.level(ulp) == level


def test_charts_are_drawn_of_what_differs_and_not_of_what_is_equal():
    figures = Elements(page(record("I", "differs", finding=finding(trace=trace(6))))).all
    assert [attributes["aria-label"] for tag, attributes in figures if tag == "svg"] == [
        "ulp and share of differing values at each of 420 positions of the trace",
        "operators by their largest distance: 85 from 4 ulp on, 100 from 8 ulp on, 20 from 16 ulp on",
    ]
    equal = record("I", "differs", finding=finding(trace=Trace(ops=(op(),))))
    assert "svg" not in {tag for tag, _ in Elements(page(equal)).all}


def lines_of(*records):
    return view.page(records, {}, {}, {}).lines


def words_of(line):
    return [cell.word for cell in line.cells]


def test_a_subject_is_one_line_with_its_control_and_what_was_not_asked():
    control = record("I", "caught", mode="stock", control=True, finding=finding())
    [line] = lines_of(record("R"), control, record("I", "not_run", error="out of memory"))
    assert words_of(line) == ["equal", "not run", "caught"]
    [of_a, of_b] = lines_of(record("R", name="a"), record("X", name="b"))
    assert (words_of(of_a), words_of(of_b)) == (["equal", "not asked", "not asked"], ["not asked", "equal", "not asked"])


def test_modes_dtypes_and_machines_are_lines_of_their_own():
    found = lines_of(
        record(), record(mode="off"), record(dtype="bf16"), record(machine={"cpu": "other"}), record(fingerprint="2")
    )
    assert len(found) == 5
    assert [line.cells[0].tone for line in found] == ["good", "plain", "good", "good", "good"]


def test_what_did_not_hold_comes_first():
    found = lines_of(record(name="a"), record(name="b", verdict="differs", finding=finding()), record(name="c"))
    assert [line.name for line in found] == ["b", "a", "c"]


def test_the_worst_of_several_checks_of_one_relation_is_shown():
    [line] = lines_of(record(), record("I", "error", error="ValueError: no"), record())
    assert words_of(line)[0] == "ERROR"


def test_a_relation_of_a_later_version_has_its_column():
    found = view.page([record("Z", "differs", finding=finding())], {}, {}, {})
    assert [letter for letter, _ in found.columns] == ["Z", "N"]
    assert words_of(found.lines[0]) == ["DIFFERS", "not asked"]


@pytest.mark.parametrize(
    "ops, status",
    [
        (OpCoverage(covered={"aten::mm": 3}, row_local=("aten::add",)), "covered"),
        (OpCoverage(covered={"aten::mm": 3}, unverified=("aten::erfinv",)), "unverified"),
        (OpCoverage(covered={"aten::mm": 3}, unverified=("a",), bypassed=("aten::mm",)), "past the table"),
        (OpCoverage(error="not traced"), "unknown"),
        (None, "not recorded"),
    ],
)
def test_the_operators_of_a_subject_have_the_worst_status_of_any(ops, status):
    [line] = lines_of(record(ops=ops))
    assert line.operators.word == status


def test_operators_that_are_unknown_for_one_relation_are_unknown():
    [line] = lines_of(record("R", ops=OpCoverage(covered={"aten::mm": 3})), record("I", ops=OpCoverage(error="not traced")))
    assert (line.operators.word, line.operators.about) == ("unknown", "not traced")


@pytest.mark.parametrize(
    "records, tone, says",
    [
        ([record()], "good", "0 bits differ in I: 1 subject, 20 batches, 5.0 MB"),
        ([record(), record(name="b", verdict="differs", finding=finding())], "bad", "Not proven: 1 DIFFERS"),
        ([record(mode="off")], "unsure", "Nothing was proven: no check was equal in batch-invariant mode"),
        ([], "unsure", "Nothing was proven: no check was equal in batch-invariant mode"),
        (
            [record(), record("I", "inconclusive", mode="stock", control=True)],
            "unsure",
            "0 bits differ in I: 1 subject, 20 batches, 5.0 MB; but 1 control caught nothing",
        ),
    ],
)
def test_the_headline_says_what_the_run_comes_to(records, tone, says):
    found = view.page(records, {}, {}, {})
    assert (found.tone, found.headline) == (tone, says)
    assert says in Elements(page(*records)).text


def test_a_finding_is_told_with_row_difference_sizes_batch_and_replay():
    found = finding(breakpoints=Breakpoints(((2, 16), (33, 33)), 41, 300), replay="pytest --batchinv-shape '{}' t.py::t")
    text = page(record("I", "differs", kind="function", finding=found, nodeid="t.py::t"))
    for words in (
        "1, at position 1 of 2; the output",
        "3 of 64 values; the first at [4]:",
        "1.0 (0x3f800000) alone, 2.0 (0x40000000) in the batch, 8,388,608 ulp apart",
        "bits change at batch sizes 2-16, 33; 41 sizes from 1 to 300 were run",
        '{"rows":[0,1]}',
        "pytest --batchinv-shape '{}' t.py::t",
    ):
        assert words in Elements(text).text
    ranges = [attributes for tag, attributes in Elements(text).all if tag == "rect" and attributes.get("class") == "other"]
    assert [(one["x"], one["width"]) for one in ranges] == [("1", "15"), ("32", "1")]


def test_a_row_of_the_trace_has_both_sides_and_where_it_comes_from():
    ops = (
        op(
            "aten::mm",
            index=(4, 7),
            shapes=("bf16[1, 8]", "bf16[7, 8]"),
            module="model.layers.0",
            source="m.py:3",
            line="x @ w",
        ),
        op("aten::cat", "not compared", (-1, 9), badge="one side", produced_by=(0,)),
    )
    text = page(record("I", "differs", finding=finding(trace=Trace(ops=ops))))
    rows = re.findall(r'<tr id="[^"]*op\d+".*?</tr>', text, re.DOTALL)
    assert [re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", row)).strip() for row in rows] == [
        "0 = equal aten::mm order model.layers.0 m.py:3 x @ w call 4 bf16[1, 8] call 7 bf16[7, 8]",
        "1 ? not compared aten::cat one side not called call 9 0",
    ]


def test_what_is_missing_for_a_page_is_named(monkeypatch):
    assert html.missing() == ""
    monkeypatch.setattr(html, "NEEDS", ("jinja2", "no_such_library", "nor_this"))
    assert html.missing() == (
        "needs no_such_library and nor_this, which are not installed: pip install 'pytest-batchinv[report]'."
    )


@pytest.mark.parametrize(
    "words", [{"ulp": None}, {"ulp": 0}, {"ulp": 2**70}, {"ulp": 1, "n_total": 0}, {"ulp": None, "n_total": 0}], ids=str
)
def test_distances_that_are_unknown_or_far_are_drawn_without_a_warning(words):
    traced = Trace(ops=(op(agreement="differs", **{"n_differ": 1, "n_total": 2, **words}),))
    assert "<svg" in page(record("I", "differs", finding=finding(trace=traced)))
