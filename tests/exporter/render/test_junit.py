"""JUnit XML: a case for each gate and, for gates on layers, for each layer."""

import dataclasses
from xml.etree import ElementTree

from exporter.render.junit import render
from exporter.report import GateResult
from exporter.stages import describe
from tests.exporter.render.reports import BIG, FAULT, HOSTILE, SMALL, layer, report


def suites(text: str) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    return {suite.attrib["name"]: suite for suite in root}


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    child = next(iter(case), None)
    return ("passed", "") if child is None else (child.tag, child.attrib["message"])


def test_a_case_a_gate():
    cases = {case.attrib["name"]: outcome(case) for case in suites(render(SMALL))["qexport gates"]}
    assert cases == {
        "sqnr_db>=40": ("failure", "34.26 in onnxruntime logits, must be sqnr_db>=40"),
        "layer.output_sqnr_db>=20": ("failure", "18 in b, must be layer.output_sqnr_db>=20; " + describe(FAULT)),
        "max_abs<=0.1": ("passed", ""),
        "tensorrt.kl<=1": ("error", "not measured in tensorrt"),
    }


def test_a_case_a_layer():
    found = suites(render(SMALL))
    assert list(found) == ["qexport gates", "layer.output_sqnr_db>=20"]
    cases = {case.attrib["name"]: outcome(case)[0] for case in found["layer.output_sqnr_db>=20"]}
    assert cases == {"a": "passed", "b": "failure", "c.linear": "passed", "float": "passed"}
    names = {case.attrib["classname"] for case in found["layer.output_sqnr_db>=20"]}
    assert names == {"mobilenet.pt2.layer.output_sqnr_db>=20"}


def test_layers_without_the_figure_have_no_case():
    gate = GateResult("layer.weight_sqnr_db>=41", 41.25, True, where="a")
    found = suites(render(dataclasses.replace(SMALL, gates=(gate,))))
    assert [case.attrib["name"] for case in found["layer.weight_sqnr_db>=41"]] == ["a", "b", "c.linear"]


def test_counts():
    text = render(SMALL)
    root = ElementTree.fromstring(text)
    assert {name: root.attrib[name] for name in ("tests", "failures", "errors")} == {
        "tests": "8",
        "failures": "3",
        "errors": "1",
    }
    for suite in root:
        outcomes = [outcome(case)[0] for case in suite]
        assert suite.attrib["tests"] == str(len(outcomes))
        assert suite.attrib["failures"] == str(outcomes.count("failure"))
        assert suite.attrib["errors"] == str(outcomes.count("error"))


def test_there_is_no_time_in_it():
    assert "time" not in "".join(suites(render(SMALL))["qexport gates"][0].attrib)
    assert "timestamp" not in render(SMALL)


def test_any_name_is_well_formed():
    bad = f"{HOSTILE}\x00\x1b[31m\ud800\n"
    entry = dataclasses.replace(report(layer(bad, 10.0)), model={"name": bad})
    (case,) = suites(render(entry))["layer.output_sqnr_db>=20"]
    assert case.attrib["name"] == f"{HOSTILE}\ufffd\ufffd[31m\ufffd\n"
    assert outcome(case)[0] == "failure"


def test_500_layers():
    (suite,) = (value for name, value in suites(render(BIG)).items() if name.startswith("layer."))
    assert len(suite) == 500


def test_without_gates_there_are_no_cases():
    (suite,) = suites(render(dataclasses.replace(SMALL, gates=()))).values()
    assert len(suite) == 0
