"""How exact a kernel must be, and what its memory must stand."""

import torch


def assert_as_precise(name, want, size, eager, fused, dtype):
    """The fused result's error against float64 is at most twice that of eager in the same dtype.

    `size` is the result with absolute values for inputs. Beyond, one rounding is allowed, for where eager happens to be
    exact: of the result, or of its terms where few results leave it to chance. So do few rows: their long sums oneDNN
    adds up in one chain, in float32 up to three times as inexact as MKL's several (under 16 rows, measured).
    """
    few = want.numel() < 32 or want.numel() < 16 * want.shape[-1]
    rounding = torch.finfo(dtype).eps * (size if few else want).square().mean().sqrt()
    error, allowed = (fused - want).square().mean().sqrt(), 2 * (eager - want).square().mean().sqrt() + rounding
    assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"


def poison(monkeypatch):
    """From now on every buffer that is allocated starts as NaN: none may reach a result."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, plain=plain, **kwargs: plain(*args, **kwargs).fill_(torch.nan))
    plain_new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: plain_new(*args, **kwargs).fill_(torch.nan))
    assert torch.empty(1).isnan() and torch.zeros(1).new_empty(1).isnan()
