"""A report as JUnit XML, which every pipeline shows: a case for each gate, and for each layer that a gate speaks of.

    <testsuite name="qexport gates">                  a case a gate
    <testsuite name="layer.output_sqnr_db&gt;=15">    a case a layer, for a gate on layers

A gate that failed is a failure, which says of a layer where its loss came from; one whose figure was not measured is an
error. There is no time in it: equal reports give equal bytes.
"""

import re
from collections.abc import Collection
from xml.etree import ElementTree

from exporter.gates import judge_layers, parse_gate
from exporter.render.text import metric
from exporter.report import GateResult, Report
from exporter.stages import describe

GATES = "qexport gates"
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped."""


def render(report: Report) -> str:
    """The XML text."""
    suites = {GATES: {gate.expr: gate for gate in report.gates}}
    for gate in report.gates:
        layers = judge_layers(parse_gate(gate.expr), report)
        if layers:
            suites[gate.expr] = layers
    name = str(report.model.get("name", "model"))
    stages = {layer.name: describe(layer.stage) for layer in report.layers if layer.stage is not None}
    every = [verdict for cases in suites.values() for verdict in cases.values()]
    root = ElementTree.Element("testsuites", {"name": _text(name), **_counts(every)})
    for suite, cases in suites.items():
        element = ElementTree.SubElement(root, "testsuite", {"name": _text(suite), **_counts(cases.values())})
        for case, verdict in cases.items():
            _add_case(element, f"{name}.{suite}", case, verdict, stages.get(verdict.where, ""))
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text.decode() + "\n"


def _add_case(suite: ElementTree.Element, group: str, name: str, verdict: GateResult, stage: str) -> None:
    case = ElementTree.SubElement(suite, "testcase", {"classname": _text(group), "name": _text(name)})
    if not verdict.measured:
        where = f" in {verdict.where}" if verdict.where else ""
        ElementTree.SubElement(case, "error", {"message": _text(f"not measured{where}"), "type": "not measured"})
    elif not verdict.passed:
        message = f"{metric(verdict.value)} in {verdict.where}, must be {verdict.expr}" + (
            f"; {stage}" if stage else ""
        )
        ElementTree.SubElement(case, "failure", {"message": _text(message), "type": "gate"})


def _counts(verdicts: Collection[GateResult]) -> dict[str, str]:
    errors = sum(not verdict.measured for verdict in verdicts)
    failures = sum(verdict.measured and not verdict.passed for verdict in verdicts)
    return {"tests": str(len(verdicts)), "failures": str(failures), "errors": str(errors)}


def _text(value: str) -> str:
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", value)
