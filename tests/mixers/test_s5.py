"""S5 with irregular sampling is the solution of its differential equation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everstate.mixers import build_mixer
from everstate.mixers.lti import as_complex


def test_irregular_sampling_solves_the_differential_equation() -> None:
    """With a constant input, `x' = A x + B u` is solved by the exponential of `[[A, B u], [0, 0]]`."""
    mixer = build_mixer({"type": "s5", "d_state": 6, "glu": False, "activation": "identity"}, 3, dtype=torch.float64)
    nn.init.eye_(mixer.out_proj.weight)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, 9, 3, generator=generator, dtype=torch.float64)
    delta_t = torch.rand(1, 9, generator=generator, dtype=torch.float64) * 3
    y, after = mixer(u, mixer.init_state(1), None, delta_t)
    A, B, C = torch.complex(-mixer.log_A_real.exp(), mixer.A_imag), as_complex(mixer.B), as_complex(mixer.C)
    x = torch.zeros(3, dtype=torch.complex128)
    for t in range(9):
        x = solve(A, B @ u[0, t].to(B.dtype), mixer.log_dt.exp() * delta_t[0, t], x)
        assert torch.allclose(y[0, t], 2 * (C @ x).real + mixer.D * u[0, t], rtol=1e-11)
    assert torch.allclose(torch.view_as_complex(after.ssm)[0], x, rtol=1e-11)


def solve(A: Tensor, Bu: Tensor, time: Tensor, x: Tensor) -> Tensor:
    """Each state on its own clock: `x'(s) = time (A x + Bu)` from s = 0 to 1."""
    matrix = torch.zeros(A.shape[0] + 1, A.shape[0] + 1, dtype=A.dtype)
    matrix[:-1, :-1], matrix[:-1, -1] = torch.diag(A * time), Bu * time
    return (torch.matrix_exp(matrix) @ torch.cat([x, torch.ones(1, dtype=x.dtype)]))[:-1]


def test_blocks_start_with_equal_dynamics() -> None:
    mixer = build_mixer({"type": "s5", "d_state": 16, "blocks": 4}, 3, dtype=torch.float64)
    imag = mixer.A_imag.unflatten(0, (4, 2))
    assert torch.equal(imag, imag[:1].expand(4, 2))
    assert torch.allclose(mixer.log_A_real.exp(), torch.full((8,), 0.5, dtype=torch.float64))
