"""The adapted layer: the paper's formula, its gradients, the notebook's, and the closed-form start."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.dora import Adapter, DoRALinear, fitted, untrained
from passes.hqq import HQQ
from passes.hqq import quantize_weight as hqq
from passes.rtn import RTN
from passes.rtn import quantize_weight as rtn
from passes.weights import CodebookWeight, QuantWeight
from tests.passes.nets import FLOAT32_EPS

OUT, IN, RANK = 24, 64, 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bases() -> dict[str, QuantWeight]:
    weight = torch.randn(OUT, IN, generator=seeded())
    codes = torch.randint(0, 16, (OUT, IN // 8, 2), generator=seeded(1), dtype=torch.uint8)
    codebooks = torch.randn(2, 16, 1, 8, generator=seeded(2))
    return {
        "rtn": rtn(weight, RTN(bits=4, group_size=16)),
        "hqq": hqq(weight, HQQ(bits=3, group_size=32)),
        "hqq, axis 0": hqq(weight, HQQ(bits=3, group_size=8, axis=0)),
        "codebooks": CodebookWeight(codes, codebooks, torch.ones(OUT, 1)),
    }


def adapter_for(base: Tensor, alpha: float = 8.0, *, notebook: bool = False) -> Adapter:
    start = untrained(base, RANK, alpha, seeded(3), notebook=notebook)
    lora_b = torch.randn(OUT, RANK, generator=seeded(4)) / 10
    return dataclasses.replace(start, lora_b=lora_b, magnitude=start.magnitude * 1.1)


def close(actual: Tensor, expected: Tensor) -> bool:
    """Sums of at most IN products in another order, and a norm of as many squares."""
    return float((actual - expected).abs().max()) <= 4 * IN * FLOAT32_EPS * float(expected.abs().max())


@pytest.mark.parametrize("kind", bases())
@pytest.mark.parametrize("bias", [False, True])
def test_the_output_is_that_of_the_papers_weight(kind: str, bias: bool) -> None:
    base = bases()[kind]
    adapter = adapter_for(base.dequantize())
    b = torch.randn(OUT, generator=seeded(5)) if bias else None
    x = torch.randn(3, 7, IN, generator=seeded(6))
    direction = base.dequantize() + 8.0 / RANK * adapter.lora_b @ adapter.lora_a
    weight = adapter.magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    assert close(DoRALinear(base, adapter, b)(x).detach(), F.linear(x, weight, b))
    assert close(adapter.weight(base.dequantize()), weight)


def test_gradients_take_the_norm_as_a_constant() -> None:
    """Section 4.3: d loss / d V = m / |V| d loss / d W', and m gets the projection on V / |V|."""
    base = bases()["rtn"]
    adapter = adapter_for(base.dequantize())
    module = DoRALinear(base, adapter)
    x, upstream = torch.randn(9, IN, generator=seeded(7)), torch.randn(9, OUT, generator=seeded(8))
    (module(x) * upstream).sum().backward()
    of_weight = upstream.T @ x  # [out, in]
    scaling = 8.0 / RANK
    direction = base.dequantize() + scaling * adapter.lora_b @ adapter.lora_a
    norms = direction.norm(dim=1)
    of_direction = (adapter.magnitude / norms)[:, None] * of_weight
    expected = {
        "lora_a": scaling * adapter.lora_b.T @ of_direction,
        "lora_b": scaling * of_direction @ adapter.lora_a.T,
        "magnitude": (of_weight * direction).sum(1) / norms,
    }
    found = dict(module.named_parameters())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert found[name].grad is not None
        assert close(found[name].grad, gradient), name


class Notebook(nn.Module):
    """The notebook's forward, written anew with its in-place steps."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, m: Tensor, alpha: float) -> None:
        super().__init__()
        self.weight, self.alpha = weight, alpha
        self.a, self.b, self.m = (nn.Parameter(value.clone()) for value in (a, b, m))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b)
        out /= torch.linalg.vector_norm((self.weight + self.b @ self.a).detach(), dim=1)
        out *= self.m * self.alpha
        return out


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_notebook_reproduces_it(alpha: float) -> None:
    base = bases()["hqq"]
    adapter = adapter_for(base.dequantize(), alpha, notebook=True)
    ours = DoRALinear(base, adapter)
    theirs = Notebook(base.dequantize(), adapter.lora_a, adapter.lora_b, adapter.magnitude, alpha)
    x = torch.randn(9, IN, generator=seeded(7))
    found, expected = ours(x), theirs(x)
    assert close(found.detach(), expected.detach())
    found.sum().backward()
    expected.sum().backward()
    for one, other in ((ours.lora_a, theirs.a), (ours.lora_b, theirs.b), (ours.magnitude, theirs.m)):
        assert one.grad is not None
        assert other.grad is not None
        assert close(one.grad, other.grad)


def test_the_notebooks_start() -> None:
    base = bases()["hqq"].dequantize()
    start = untrained(base, RANK, 3.0, seeded(), notebook=True)
    assert start.magnitude.equal(base.norm(p=2, dim=1))
    assert not start.lora_b.any()
    assert close(start.weight(base), 3.0 * base)  # its alpha multiplies the whole layer
    large = untrained(torch.zeros(4, 10000), 16, 1.0, seeded(), notebook=True)
    # 160,000 normal numbers: their variance is within 2 % of 1 / 16.
    assert float(large.lora_a.var()) == pytest.approx(1 / 16, rel=0.02)


def test_alpha_leaves_the_base_alone() -> None:
    base = bases()["rtn"].dequantize()
    for alpha in (1.0, 7.0):
        assert close(untrained(base, RANK, alpha, seeded()).weight(base), base)


def test_a_row_of_zeros_stays_one() -> None:
    base = bases()["rtn"].dequantize()
    base[3] = 0
    adapter = untrained(base, RANK, 1.0, seeded())
    assert adapter.weight(base)[3].eq(0).all()
    assert adapter.weight(base).isfinite().all()


def error(weight: Tensor, target: Tensor, hessian: Tensor) -> float:
    left = (target - weight).double()
    return float(((left @ hessian.double()) * left).sum())


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """A weight, its rounding to 2 bits, and moments of correlated inputs."""
    weight = torch.randn(OUT, IN, generator=seeded())
    rows = torch.randn(400, IN, generator=seeded(1)) @ torch.randn(IN, IN, generator=seeded(2))
    return weight, rtn(weight, RTN(bits=2, group_size=16)).dequantize(), rows.T @ rows / len(rows)


def test_the_closed_form_is_the_best_of_its_rank() -> None:
    """No damping, magnitudes aside: what is left is the sum of the squared singular values past the rank."""
    weight, base, hessian = problem()
    adapter = fitted(base, weight, hessian, RANK, 1.0, 0.0)
    direction = base + adapter.scaling * adapter.lora_b @ adapter.lora_a
    values = torch.linalg.svdvals((weight - base).double() @ torch.linalg.cholesky(hessian.double()))
    assert error(direction, weight, hessian) == pytest.approx(float(values[RANK:].square().sum()), rel=1e-4)
    # A gain for each row is chosen last, and 1 is among them.
    assert error(adapter.weight(base), weight, hessian) <= error(direction, weight, hessian) * (1 + 1e-6)


def test_outer_moments_weigh_the_outputs() -> None:
    """As before in the norm of both factors; what few outputs feel is spent on them."""
    weight, base, hessian = problem()
    roots = torch.randn(OUT, OUT, generator=seeded(3)) * torch.logspace(0, -2, OUT)
    outer = (roots @ roots.T).double()

    def felt(adapter: Adapter) -> float:
        left = (weight - base - adapter.scaling * adapter.lora_b @ adapter.lora_a).double()
        return float(((outer @ left @ hessian.double()) * left).sum())

    found, plain = (fitted(base, weight, hessian, RANK, 1.0, 0.0, each, 0.0) for each in (outer, None))
    right, left = torch.linalg.cholesky(hessian.double()), torch.linalg.cholesky(outer)
    values = torch.linalg.svdvals(left.T @ (weight - base).double() @ right)
    # The factors are float32: |R^-T| of them is a hundred times larger in the directions that count least.
    assert felt(found) == pytest.approx(float(values[RANK:].square().sum()), rel=1e-3)
    assert felt(found) < 0.9 * felt(plain)


def test_outer_moments_of_nothing_are_the_identity() -> None:
    weight, base, hessian = problem()
    plain = fitted(base, weight, hessian, RANK, 1.0, 0.01).weight(base)
    found = fitted(base, weight, hessian, RANK, 1.0, 0.01, torch.zeros(OUT, OUT)).weight(base)
    assert close(found, plain)


@pytest.mark.parametrize("alpha", [1.0, 16.0])
def test_more_rank_never_hurts_and_full_rank_is_the_target(alpha: float) -> None:
    weight, base, hessian = problem()
    errors = [
        error(fitted(base, weight, hessian, rank, alpha, 1e-6).weight(base), weight, hessian) for rank in (1, 4, 8, 24)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 1e-9 * error(torch.zeros_like(weight), weight, hessian)


def test_ranks_past_the_matrix_and_dead_inputs() -> None:
    weight, base, hessian = problem()
    hessian[:, 5], hessian[5] = 0, 0
    adapter = fitted(base, weight, hessian, OUT + 3, 1.0, 0.01)
    assert adapter.lora_a.shape == (OUT + 3, IN)
    assert adapter.weight(base).isfinite().all()
    nothing = fitted(base, weight, torch.zeros_like(hessian), RANK, 1.0, 0.01)
    assert nothing.weight(base).isfinite().all()
