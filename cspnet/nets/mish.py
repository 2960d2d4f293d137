"""Mish, with one implementation for compiled code, one for eager CPU and one for eager GPU."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Above 20, tanh(softplus(x)) rounds to 1 even in float64. Darknet clamps softplus there, too
# (src/activations.c, MISH_THRESHOLD). The clamp also keeps exp(2x) and its square within float32.
SATURATION = 20.0
# Elements per chunk on a CPU: large enough to amortize a dozen torch calls, small enough for four
# buffers (2 MB each) to fit in the last-level cache.
CHUNK = 1 << 19
# Below this number of elements, the calls cost more than chunking saves.
MIN_CHUNKED_ELEMENTS = 1 << 13


class AlgebraicMish(torch.autograd.Function):
    """Mish without tanh and log: with e = exp(min(x, 20)) and w = e(e+2), y = x * w / (w+2).

    dy/dx = w/(w+2) + x * 4e(e+1) / (w+2)^2. Saves only its input. Computes float16 and bfloat16 in
    float32. Meant for a compiler, which fuses the intermediate tensors away.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = widen(x)
        e = wide.clamp(max=SATURATION).exp()
        w = e * (e + 2)
        # Divide first: x * w would overflow for large x.
        return (wide * (w / (w + 2))).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # x is clamped in the product, too: with e clamped, the second term is 7e-17 * x instead of
        # 0, which is wrong for x = 1e20.
        clamped = widen(x).clamp(max=SATURATION)
        e = clamped.exp()
        w = e * (e + 2)
        r = 1 / (w + 2)
        derivative = w * r + clamped * (4 * e * (e + 1) * r * r)
        return (widen(gradient) * derivative).to(x.dtype)


def widen(x: Tensor) -> Tensor:
    """float64 unchanged, any other type as float32."""
    return x if x.dtype == torch.float64 else x.float()


def mish(x: Tensor) -> Tensor:
    """x * tanh(log(1 + exp(x))), out of place; any shape, any floating type. Misra 2019.

    Never NaN for finite x. Autograd saves only the input. There are three implementations:

    - compiled: `AlgebraicMish`. It fuses with its neighbours and needs 23 instructions per element
      forward and 30 backward. torch's form, tanh of log1p of exp, needs 64 and 84, which makes the
      fused kernel compute-bound.
    - eager on a CPU: `ChunkedMish`.
    - eager on other devices, and for small tensors: torch's kernel.

    An exported graph contains the operator `mish`, so that its runtime can choose the kernel.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return AlgebraicMish.apply(x)
    if is_eager(x) and uses_chunks(x):
        return ChunkedMish.apply(x)
    return F.mish(x)


def is_eager(x: Tensor) -> bool:
    """Whether operators run one by one: no compilation, export, tracing or functorch transform."""
    return not (
        torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or not isinstance(x, Tensor)  # a Proxy of torch.fx
        or torch._C._are_functorch_transforms_active()
    )


class ChunkedMish(torch.autograd.Function):
    """Mish for a CPU in eager mode, three times as fast as torch's. Saves only its input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return write_mish(x, torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return mish_backward(gradient, *ctx.saved_tensors)


def write_mish(x: Tensor, out: Tensor) -> Tensor:
    """Write mish(x) into `out` and return it; `out` is dense and may be `x`. No autograd.

    On a CPU: with s = sigmoid(x) and h = s - s^2 / 2, tanh(log(1 + exp(x))) = h / (1-h). This needs
    one exponential instead of the tanh and log1p of torch's kernel, and cannot overflow. float16
    and bfloat16 are computed in float32. Chunking keeps the intermediate results in the cache.
    """
    if not uses_chunks(x):
        return torch.ops.aten.mish.out(x, out=out)
    wide = torch.promote_types(x.dtype, torch.float32)
    s_, h_, x_ = torch.empty(3, min(CHUNK, x.numel()), dtype=wide)
    for chunk, target in zip(_chunks(_with_strides_of(out, x)), _chunks(out), strict=True):
        s, h = s_[: len(chunk)], h_[: len(chunk)]
        if chunk.dtype != wide:
            chunk = x_[: len(chunk)].copy_(chunk)
        _write_product(chunk, target, s, h)
    return out


def affine_mish_(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """mish(scale * x + shift) in place; x [N, C, H, W], scale and shift [C]. No autograd.

    Requires a channels-last x for which `uses_chunks` is true. One pass over memory, computed as in
    `write_mish`, in float32 or wider for every type of x.
    """
    channels = x.shape[1]
    pixels = x.permute(0, 2, 3, 1).view(-1, channels)
    wide = torch.promote_types(x.dtype, torch.float32)
    pixels_per_chunk = min(max(1, CHUNK // channels), len(pixels))
    s_, h_, x_ = torch.empty(3, pixels_per_chunk, channels, dtype=wide)
    for target in pixels.split(pixels_per_chunk):
        s, h = s_[: len(target)], h_[: len(target)]
        chunk = target if target.dtype == wide else x_[: len(target)].copy_(target)
        torch.addcmul(shift, chunk, scale, out=chunk)
        _write_product(chunk, target, s, h)
    return x


def _write_product(x: Tensor, out: Tensor, s: Tensor, h: Tensor) -> None:
    """Write mish(x) into `out`, which may be x; s and h are scratch buffers shaped like x."""
    torch.sigmoid(x, out=s)
    torch.addcmul(s, s, s, value=-0.5, out=h)
    h.div_(torch.sub(1, h, out=s))
    if out.dtype == x.dtype:
        torch.mul(x, h, out=out)
    else:
        out.copy_(h.mul_(x))


def mish_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """`gradient` times the derivative of Mish at `x`. No autograd.

    On a CPU as in `write_mish`: with t = h / (1-h), dy/dx = t + x s (1 - t^2). torch's kernel for
    the backward pass of tanh computes s (1 - t^2).
    """
    if not uses_chunks(x):
        return torch.ops.aten.mish_backward(gradient, x)
    out = torch.empty_like(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    s_, t_, q_, x_ = torch.empty(4, min(CHUNK, x.numel()), dtype=wide)
    for chunk, g, target in zip(
        _chunks(_with_strides_of(out, x)),
        _chunks(_with_strides_of(out, gradient)),
        _chunks(out),
        strict=True,
    ):
        s, t, q = s_[: len(chunk)], t_[: len(chunk)], q_[: len(chunk)]
        if chunk.dtype != wide:
            chunk = x_[: len(chunk)].copy_(chunk)
        torch.sigmoid(chunk, out=s)
        torch.addcmul(s, s, s, value=-0.5, out=t)
        t.div_(torch.sub(1, t, out=q))
        torch.ops.aten.tanh_backward.grad_input(s.mul_(chunk), t, grad_input=s)
        s.add_(t)
        if target.dtype == wide:
            torch.mul(s, g, out=target)
        else:
            target.copy_(s.mul_(q.copy_(g)))
    return out


def uses_chunks(x: Tensor) -> bool:
    """Whether a tensor is processed in chunks: on a CPU, floating-point and not small."""
    return x.device.type == "cpu" and x.is_floating_point() and x.numel() >= MIN_CHUNKED_ELEMENTS


def _with_strides_of(reference: Tensor, x: Tensor) -> Tensor:
    return x if x.stride() == reference.stride() else torch.empty_like(reference).copy_(x)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Flat views of a dense tensor in memory order, `CHUNK` elements each."""
    outer_to_inner = sorted(range(x.ndim), key=x.stride, reverse=True)
    return x.permute(outer_to_inner).view(-1).split(CHUNK)


class Mish(nn.Module):
    """`mish` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return mish(x)
