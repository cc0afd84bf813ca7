"""The terms of `--budget`: gates between commas, `size` for size_ratio, each a bound to stay within."""

from exporter.errors import InputError
from exporter.gates import SIZE, Gate, parse_gate

FLAG = "--budget"
SIZE_ALIAS = "size"


def parse_budget(text: str) -> tuple[Gate, ...]:
    """Read for example `size<=0.3,metric.accuracy.drop<=0.005`. Raises InputError."""
    gates = []
    for term in text.split(","):
        expr = "".join(term.split())
        if expr.removeprefix(SIZE_ALIAS)[:1] in ("<", ">", "="):
            expr = SIZE + expr.removeprefix(SIZE_ALIAS)
        try:
            gate = parse_gate(expr)
        except InputError as error:
            raise InputError(error.what, where=FLAG, fix=error.fix) from error
        if gate.relation == "==" or (gate.figure == SIZE and gate.relation.startswith(">")):
            raise InputError(f"{term.strip()!r} is no bound to stay within", where=FLAG, fix="write size<=0.3")
        gates.append(gate)
    return tuple(gates)
