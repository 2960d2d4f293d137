"""Mish in the form that suits where it runs: compiled, eager on a CPU, eager elsewhere."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Beyond 20, tanh(softplus(x)) rounds to 1 even in float64; Darknet cuts its softplus there too
# (src/activations.c, MISH_THRESHOLD). It also keeps exp(2x) and its square inside float32.
SATURATION = 20.0
# Elements that a CPU works on at a time: large enough that a dozen calls into torch cost nothing
# beside the arithmetic, small enough for the last-level cache (four buffers of 2 MB).
CHUNK = 1 << 19
# Of fewer elements than this, those calls cost more than the arithmetic that they save.
MIN_CHUNKED_ELEMENTS = 1 << 13


class AlgebraicMish(torch.autograd.Function):
    """Mish without tanh and log: with e = exp(min(x, 20)) and w = e(e+2), y = x * w / (w+2).

    dy/dx = w/(w+2) + x * 4e(e+1) / (w+2)^2. Saves its input and nothing else. float16 and bfloat16
    are computed in float32. The in-between tensors cost nothing only where a compiler fuses them.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = widen(x)
        e = wide.clamp(max=SATURATION).exp()
        w = e * (e + 2)
        # the quotient first: x * w would overflow for a large x
        return (wide * (w / (w + 2))).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # clamped in the product too: with e held at 20 the second term is 7e-17 * x, not 0, and an
        # x of 1e20 would blow it up
        clamped = widen(x).clamp(max=SATURATION)
        e = clamped.exp()
        w = e * (e + 2)
        r = 1 / (w + 2)
        slope = w * r + clamped * (4 * e * (e + 1) * r * r)
        return (widen(gradient) * slope).to(x.dtype)


def widen(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def mish(x: Tensor) -> Tensor:
    """x * tanh(log(1 + exp(x))), Misra 2019, out of place. Any shape, any floating type.

    Never NaN for a finite x, and autograd keeps the input only. Three forms of one function:

    - compiled: `AlgebraicMish`. A compiler fuses it into its neighbours, and it needs 23
      instructions an element forward and 30 backward, where torch's own form, tanh of log1p of
      exp, needs 64 and 84 and makes the fused kernel wait for arithmetic.
    - eager on a CPU: `PiecewiseMish`.
    - eager elsewhere, and of a few thousand numbers: torch's kernel, one pass each way.

    An exported graph keeps the operator `mish`, for whoever reads it to choose the kernel.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return AlgebraicMish.apply(x)
    if is_eager(x) and uses_chunks(x):
        return ChunkedMish.apply(x)
    return F.mish(x)


def is_eager(x: Tensor) -> bool:
    """Whether operators run one by one: nobody compiles, exports, traces or transforms."""
    return not (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or not isinstance(x, Tensor)  # a Proxy of torch.fx
        or torch._C._are_functorch_transforms_active()
    )


class ChunkedMish(torch.autograd.Function):
    """Mish for a CPU in eager mode, three times as fast as torch's. Saves its input only."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return write_mish(x, torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return mish_backward(gradient, *ctx.saved_tensors)


def write_mish(x: Tensor, out: Tensor) -> Tensor:
    """Writes mish(x) into `out`, which is dense and may be `x`, and returns it. No autograd.

    On a CPU with s = sigmoid(x) and h = s - s^2 / 2, so that tanh(log(1 + exp(x))) = h / (1-h):
    one exponential where torch's kernel spends its time on tanh and log1p, and no overflow. float16
    and bfloat16 are computed in float32. Piece by piece, what lies in between stays in the cache.
    """
    if not uses_chunks(x):
        return torch.ops.aten.mish.out(x, out=out)
    wide = torch.promote_types(x.dtype, torch.float32)
    s_, h_, x_ = torch.empty(3, min(CHUNK, x.numel()), dtype=wide)
    for part, target in zip(_pieces(_laid_out_as(out, x)), _pieces(out), strict=True):
        s, h = s_[: len(part)], h_[: len(part)]
        if part.dtype != wide:
            part = x_[: len(part)].copy_(part)
        _write_product(part, target, s, h)
    return out


def affine_mish_(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """mish(scale * x + shift) in place of x [N, C, H, W], the other two [C]. No autograd.

    For images that go by pieces and are channels-last: in one go through memory, computed as
    `write_mish` does, in float32 or wider whatever the type of x.
    """
    channels = x.shape[1]
    pixels = x.permute(0, 2, 3, 1).view(-1, channels)
    wide = torch.promote_types(x.dtype, torch.float32)
    at_once = min(max(1, CHUNK // channels), len(pixels))
    s_, h_, x_ = torch.empty(3, at_once, channels, dtype=wide)
    for target in pixels.split(at_once):
        s, h = s_[: len(target)], h_[: len(target)]
        part = target if target.dtype == wide else x_[: len(target)].copy_(target)
        torch.addcmul(shift, part, scale, out=part)
        _write_product(part, target, s, h)
    return x


def _write_product(x: Tensor, out: Tensor, s: Tensor, h: Tensor) -> None:
    """Writes mish(x) into `out`, which may be x; the other two are room to work in."""
    torch.sigmoid(x, out=s)
    torch.addcmul(s, s, s, value=-0.5, out=h)
    h.div_(torch.sub(1, h, out=s))
    if out.dtype == x.dtype:
        torch.mul(x, h, out=out)
    else:
        out.copy_(h.mul_(x))


def mish_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """`gradient` times the slope of Mish at `x`. No autograd.

    On a CPU as `write_mish`; with t = h / (1-h), dy/dx = t + x s (1 - t^2), whose last two factors
    torch has in one kernel, the backward of tanh.
    """
    if not uses_chunks(x):
        return torch.ops.aten.mish_backward(gradient, x)
    out = torch.empty_like(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    s_, t_, q_, x_ = torch.empty(4, min(CHUNK, x.numel()), dtype=wide)
    for part, g, target in zip(
        _pieces(_laid_out_as(out, x)),
        _pieces(_laid_out_as(out, gradient)),
        _pieces(out),
        strict=True,
    ):
        s, t, q = s_[: len(part)], t_[: len(part)], q_[: len(part)]
        if part.dtype != wide:
            part = x_[: len(part)].copy_(part)
        torch.sigmoid(part, out=s)
        torch.addcmul(s, s, s, value=-0.5, out=t)
        t.div_(torch.sub(1, t, out=q))
        torch.ops.aten.tanh_backward.grad_input(s.mul_(part), t, grad_input=s)
        s.add_(t)
        if target.dtype == wide:
            torch.mul(s, g, out=target)
        else:
            target.copy_(s.mul_(q.copy_(g)))
    return out


def uses_chunks(x: Tensor) -> bool:
    """Whether it is on a CPU and large enough for that."""
    return x.device.type == "cpu" and x.is_floating_point() and x.numel() >= MIN_CHUNKED_ELEMENTS


def _laid_out_as(model: Tensor, x: Tensor) -> Tensor:
    return x if x.stride() == model.stride() else torch.empty_like(model).copy_(x)


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """The elements of a dense tensor in the order of its memory, PIECE at a time."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    return x.permute(order).view(-1).split(CHUNK)


class Mish(nn.Module):
    """`mish` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return mish(x)
