"""The columns of GPTQ (Frantar et al. 2023) as Python tools sweep them on a CPU, at its best: PyTorch, weights transposed so
that a column is contiguous, blocks of 128."""

from collections.abc import Callable

import torch


def sweep(wt: torch.Tensor, h: torch.Tensor, scale: Callable[[int], torch.Tensor], block: int = 128) -> torch.Tensor:
    """wt [K,N] = W' and h [K,K], both overwritten; scale(j) [N] of column j. The dequantized weights, transposed."""
    k = wt.shape[0]
    h.diagonal().add_(0.01 * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.empty_like(wt)
    for i1 in range(0, k, block):
        i2 = min(i1 + block, k)
        w, e, u1 = wt[i1:i2], torch.empty_like(wt[i1:i2]), u[i1:i2, i1:i2]
        for i in range(i2 - i1):
            s = scale(i1 + i)
            q[i1 + i] = (w[i] / s).round_().clamp_(-8, 7).mul_(s)
            e[i] = (w[i] - q[i1 + i]).div_(u1[i, i])
            if i + 1 < i2 - i1:
                w[i + 1 :].addr_(u1[i, i + 1 :], e[i], alpha=-1)
        if i2 < k:
            wt[i2:].addmm_(u[i1:i2, i2:].T, e, alpha=-1)
    return q
