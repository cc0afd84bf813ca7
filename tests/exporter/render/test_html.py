"""The page: whole in itself, small, says everything as text, and takes any name for text."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from exporter.metrics import EXACT_DB
from exporter.render.html import render
from exporter.report import LayerSqnr, PassRecordView, Report, SkipView
from exporter.stages import describe
from tests.exporter.render.reports import BIG, FAULT, HOSTILE, LATENCY, SMALL, histograms, layer, report

VOID = {"meta", "input", "link", "img", "br", "hr"}
MAY_LOAD = {"src", "srcset", "data", "action", "poster", "background", "formaction", "ping"}


class Page(HTMLParser):
    """A page as elements: checks that they nest, keeps texts by element and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts[-1] += data
        elif inside == "style":
            self.styles[-1] += data
        elif data.strip():
            self.words.append(" ".join(data.split()))


def test_nothing_is_loaded():
    page = Page(render(SMALL, {}))
    assert "link" not in page.tags
    assert "iframe" not in page.tags
    assert not [entry for entry in page.attributes if entry[1] in MAY_LOAD or entry[1].startswith("on")]
    assert all(value.startswith("#") for _, name, value in page.attributes if name == "href")
    assert not re.search(r"url\(|@import", "".join(page.styles))
    ours = page.scripts[-1]
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket|innerHTML|eval\(", ours)


def test_the_policy_admits_the_scripts_and_nothing_else():
    page = Page(render(SMALL, {}))
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    hashes = re.findall(r"'(sha256-[^']+)'", policy)
    _, *executed = page.scripts  # the first is data
    assert hashes == [
        "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in executed
    ]


def test_the_licence_of_the_library_is_kept():
    text = render(SMALL, {})
    assert "The MIT License" in text
    assert "Leon Sorokin" in text


@pytest.mark.parametrize(
    "words",
    [
        "mobilenet.pt2",
        "2 of 4 gates failed",
        "calibration data is synthetic",
        "0.987 → 0.985",
        "26.0 %",
        "1.04 MB instead of 4 MB",
        "layer.output_sqnr_db>=20",
        "not measured",
        "onnxruntime, unoptimized",
        "2 % of the input's values lie outside its range",
        f"conv, int8, 8.50 bits; alone 23.0 dB, its weight 41.2 dB. Loss: {describe(FAULT)}",
        "Where the accuracy went: first fault: lowering at b, 18.0 dB; layers by stage: lowering 1.",
        "MatMulNBits",
        ": it branches",
        "qexport mobilenet.pt2 --passes cle,gptq:bits=4 --target onnx --seed 0 --gate 'sqnr_db>=40'",
        "2.13.0",
        "digits.npz",
    ],
)
def test_says(words):
    assert words in Page(render(SMALL, {})).words


def test_speed_and_seconds_come_from_the_timings():
    without = Page(render(SMALL, {})).words
    page = Page(render(SMALL, {"latency": LATENCY, "seconds": {"lower to onnx": 1.25}})).words
    assert "not measured: run qexport bench on the output folder" in without
    assert "2.00x to 2.50x" in page
    assert "1 and 32 samples at once, 1 thread" in page
    assert page[page.index("times as fast") + 1 :][:8] == [
        "1",
        "3.000",
        "1.200",
        "2.50",
        "32",
        "8.000",
        "4.000",
        "2.00",
    ]
    assert page[page.index("lower to onnx") + 1] == "1.25"
    on_a_gpu = Page(render(SMALL, {"latency": {**LATENCY, "runtime": "rtx", "threads": None}})).words
    assert "1 and 32 samples at once, TensorRT for RTX, inputs and outputs on the GPU" in on_a_gpu


def test_worst_layers_come_first():
    page = Page(render(SMALL, {}))
    selected = [value for _, name, value in page.attributes if name == "data-select"]
    assert selected == ["1", "2", "3", "0"]  # b, c.linear, float, a


def test_data_of_the_plots():
    broken = layer("broken", 0.0, output_sqnr_db=LayerSqnr(EXACT_DB, -EXACT_DB, -EXACT_DB, 1.0), causes=())
    data = json.loads(Page(render(report(layer("a", 30.0), broken), {})).scripts[0])
    assert data["names"] == ["a", "broken"]
    assert data["network"] == [30.0, -20.0]  # as far down as the chart goes
    assert data["own"] == [35.0, None]  # exact: a gap
    assert data["bits"] == [8.5, 8.5]
    assert data["causes"][1] == []
    low, high, before, after = data["histograms"]["a"]["weight"]
    assert (low, high, len(before), len(after)) == (-1.5, 2.5, 48, 48)


def test_hostile_names_are_text():
    entry = layer(HOSTILE, 10.0, kernel=HOSTILE)
    bad = dataclasses.replace(
        report(entry),
        model={"name": HOSTILE},
        warnings=(HOSTILE,),
        recipe={"calib": HOSTILE, HOSTILE: HOSTILE},
        environment={HOSTILE: HOSTILE},
        passes=(PassRecordView(HOSTILE, {HOSTILE: HOSTILE}, skipped=(SkipView(HOSTILE, HOSTILE),)),),
        histograms=histograms(HOSTILE),
    )
    text = render(bad, {"seconds": {HOSTILE: 1.0}})
    page = Page(text)
    assert HOSTILE not in text
    assert "img" not in page.tags
    assert len(page.scripts) == 3
    assert json.loads(page.scripts[0])["names"] == [HOSTILE]
    assert page.words.count(HOSTILE) >= 8
    assert ("tr", "data-kernel", HOSTILE) in page.attributes


def test_500_layers_are_under_2_mb():
    skipped = tuple(SkipView(entry.name, "its output branches into several nodes") for entry in BIG.layers)
    names = tuple(entry.name for entry in BIG.layers)
    passes = tuple(PassRecordView(name, {}, changed=names, skipped=skipped) for name in ("cle", "smooth", "gptq"))
    text = render(dataclasses.replace(BIG, passes=passes), {})
    assert len(text.encode()) < 2_000_000
    assert len([value for tag, _, value in Page(text).attributes if tag == "tr" and value.startswith("layer-")]) == 500


def test_a_report_of_nothing_is_a_page():
    page = Page(render(Report({}, {}, {}, {}), {}))
    assert "done, no gates set" in page.words
    assert "canvas" not in page.tags
    assert json.loads(page.scripts[0])["names"] == []


def test_the_same_report_gives_the_same_bytes():
    turned = dataclasses.replace(SMALL, histograms=dict(reversed(SMALL.histograms.items())))
    assert render(SMALL, {}) == render(turned, {})
