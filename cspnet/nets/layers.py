"""What the networks are built from: Mish, BatchNorm by group, convolution + norm + activation."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

# Beyond 20, tanh(softplus(x)) rounds to 1 even in float64; Darknet cuts its softplus there too
# (src/activations.c, MISH_THRESHOLD). It also keeps exp(2x) and its square inside float32.
SATURATION = 20.0
# Elements that a CPU works on at a time: large enough that a dozen calls into torch cost nothing
# beside the arithmetic, small enough for the last-level cache (four buffers of 2 MB).
PIECE = 1 << 19
# Of fewer elements than this, those calls cost more than the arithmetic that they save.
SMALL = 1 << 13


class AlgebraicMish(torch.autograd.Function):
    """Mish without tanh and log: with e = exp(min(x, 20)) and w = e(e+2), y = x * w / (w+2).

    dy/dx = w/(w+2) + x * 4e(e+1) / (w+2)^2. Saves its input and nothing else. float16 and bfloat16
    are computed in float32. The in-between tensors cost nothing only where a compiler fuses them.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        wide = _widen(x)
        e = wide.clamp(max=SATURATION).exp()
        w = e * (e + 2)
        # the quotient first: x * w would overflow for a large x
        return (wide * (w / (w + 2))).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # clamped in the product too: with e held at 20 the second term is 7e-17 * x, not 0, and an
        # x of 1e20 would blow it up
        clamped = _widen(x).clamp(max=SATURATION)
        e = clamped.exp()
        w = e * (e + 2)
        r = 1 / (w + 2)
        slope = w * r + clamped * (4 * e * (e + 1) * r * r)
        return (_widen(gradient) * slope).to(x.dtype)


def _widen(x: Tensor) -> Tensor:
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
    if is_eager(x) and _by_pieces(x):
        return PiecewiseMish.apply(x)
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


class PiecewiseMish(torch.autograd.Function):
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
    if not _by_pieces(x):
        return torch.ops.aten.mish.out(x, out=out)
    wide = torch.promote_types(x.dtype, torch.float32)
    s_, h_, x_ = torch.empty(3, min(PIECE, x.numel()), dtype=wide)
    for part, target in zip(_pieces(_laid_out_as(out, x)), _pieces(out), strict=True):
        s, h = s_[: len(part)], h_[: len(part)]
        if part.dtype != wide:
            part = x_[: len(part)].copy_(part)
        torch.sigmoid(part, out=s)
        torch.addcmul(s, s, s, value=-0.5, out=h)
        h.div_(torch.sub(1, h, out=s))
        if target.dtype == wide:
            torch.mul(part, h, out=target)
        else:
            target.copy_(h.mul_(part))
    return out


def mish_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """`gradient` times the slope of Mish at `x`. No autograd.

    On a CPU as `write_mish`; with t = h / (1-h), dy/dx = t + x s (1 - t^2), whose last two factors
    torch has in one kernel, the backward of tanh.
    """
    if not _by_pieces(x):
        return torch.ops.aten.mish_backward(gradient, x)
    out = torch.empty_like(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    s_, t_, q_, x_ = torch.empty(4, min(PIECE, x.numel()), dtype=wide)
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


def _by_pieces(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.is_floating_point() and x.numel() >= SMALL


def _laid_out_as(model: Tensor, x: Tensor) -> Tensor:
    return x if x.stride() == model.stride() else torch.empty_like(model).copy_(x)


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """The elements of a dense tensor in the order of its memory, PIECE at a time."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    return x.permute(order).view(-1).split(PIECE)


class Mish(nn.Module):
    """`mish` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return mish(x)


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose training statistics belong to a group of images, not to the whole tensor.

    `group` consecutive images of dimension 0 share their mean and variance, as one of Darknet's
    micro-batches does (batch / subdivisions); None makes the tensor one group. The running
    statistics move once per group, in order, so that one pass of four groups leaves the same
    numbers as four passes of one group. The running variance takes the unbiased variance.

    `num_batches_tracked` is there for timm's key and is not counted: `momentum` is a number here.
    """

    def __init__(self, channels: int, *, group: int | None, eps: float, momentum: float) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        assert group is None or group > 0, group
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same; in training N is a multiple of the group."""
        if not self.training or self.group is None:
            return self._normalise(x)
        group = self.group_of(x)
        if group == x.shape[0]:
            return self._normalise(x)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            y, mean, var = GroupedNorm.apply(x, self.weight, self.bias, group, self.eps)
            for one_mean, one_var in zip(mean.unbind(), var.unbind(), strict=True):
                self.running_mean.lerp_(one_mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_(one_var.to(self.running_var), self.momentum)
            return y
        # split, not slices: its backward is one concatenation, not a padded sum per group
        return torch.cat([self._normalise(part) for part in x.split(group)])

    def group_of(self, x: Tensor) -> int:
        """How many of the images [N, C, H, W] are normalised together: N or a divisor of it."""
        images, _, height, width = x.shape
        if not self.training:
            return images
        group = self.group or images
        assert images % group == 0, f"{images} images are not whole groups of {group}"
        if group * height * width == 1:  # in torch's words
            raise ValueError("Expected more than 1 value per channel when training, got 1")
        return group

    def _normalise(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group={self.group}"


class GroupedNorm(torch.autograd.Function):
    """BatchNorm by group in one expression, for compilers.

    Of groups that are split, normalised and concatenated, torch.compile keeps the parts and the
    whole for the backward pass: half as much again, and a graph that grows with every group.

    x [G * group, C, H, W], weight and bias [C] -> y as x; of each group the mean and the unbiased
    variance, [G, C], which have no gradient. 16-bit numbers are computed in float32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, group: int, eps: float):
        wide = _widen(x).unflatten(0, (-1, group))  # [G, group, C, H, W]
        var, mean = torch.var_mean(wide, (1, 3, 4), correction=0, keepdim=True)
        scale = (var + eps).rsqrt()
        count = wide[0, :, 0].numel()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.group = group
        y = (wide - mean) * scale * weight[:, None, None] + bias[:, None, None]
        unbiased = var * (count / (count - 1))
        outputs = y.flatten(0, 1).to(x.dtype), mean.flatten(1), unbiased.flatten(1)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, gradient: Tensor, *_) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        wide = _widen(x).unflatten(0, (-1, ctx.group))
        g = _widen(gradient).unflatten(0, (-1, ctx.group))
        count = wide[0, :, 0].numel()
        normal = (wide - mean) * scale
        of_bias = g.sum((1, 3, 4), keepdim=True)  # [G, 1, C, 1, 1]
        of_weight = (g * normal).sum((1, 3, 4), keepdim=True)
        of_x = (g - of_bias / count - normal * (of_weight / count)) * (
            scale * weight[:, None, None]
        )
        sums = (of.sum(0).flatten().to(weight.dtype) for of in (of_weight, of_bias))
        return of_x.flatten(0, 1).to(x.dtype), *sums, None, None


class NormMish(torch.autograd.Function):
    """mish(norm(x)) of a GroupBatchNorm2d, of which autograd keeps x alone.

    Autograd by itself keeps what lies in between too: a third of all that the net saves. Here the
    backward pass normalises once more, with the statistics of the forward pass, which is one
    kernel and no convolution. The numbers are those of the two modules.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, norm: GroupBatchNorm2d) -> Tensor:
        ctx.group, ctx.training, ctx.eps = norm.group_of(x), norm.training, norm.eps
        running = norm.running_mean, norm.running_var
        out = None
        saved = []
        for number, part in enumerate(x.split(ctx.group)):
            # what F.batch_norm calls, and with it the choice between torch's kernels and cuDNN's
            normal, mean, scale, notes, ctx.kernel = torch.ops.aten._batch_norm_impl_index(
                *(part, weight, bias, *running, norm.training, norm.momentum, norm.eps),
                torch.backends.cudnn.enabled,
            )
            if len(part) == len(x):
                out = write_mish(normal, normal)
            else:
                out = torch.empty_like(x) if out is None else out
                write_mish(normal, out[number * ctx.group :][: ctx.group])
            saved += [mean, scale, notes]  # [C] each; scale is 1 / standard deviation
        ctx.save_for_backward(x, weight, bias, *([] if norm.training else running), *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *saved = ctx.saved_tensors
        running = (None, None) if ctx.training else (saved.pop(0), saved.pop(0))
        results = []
        for number, part in enumerate(x.split(ctx.group)):
            mean, scale, notes = saved[3 * number :][:3]
            used = (mean, scale**-2, 0.0) if ctx.training else (*running, ctx.eps)
            g = gradient[number * ctx.group :][: ctx.group]
            g = mish_backward(g, F.batch_norm(part, *used[:2], weight, bias, eps=used[2]))
            results.append(
                torch.ops.aten._batch_norm_impl_index_backward(
                    *(ctx.kernel, part, g, weight, *running, mean, scale, ctx.training, ctx.eps),
                    *(ctx.needs_input_grad[:3], notes),
                )
            )
        if len(results) == 1:
            return *results[0], None
        of_x, *of_affine = (None if g[0] is None else g for g in zip(*results, strict=True))
        sums = (None if g is None else torch.stack(g).sum(0) for g in of_affine)
        return None if of_x is None else torch.cat(of_x), *sums, None


class ConvNormAct(nn.Module):
    """Convolution without bias, norm, activation; the names `conv` and `bn` are timm's.

    The padding is kernel // 2, as Darknet's `pad=1`. `norm` builds the norm for a channel count,
    `activation` builds a module without parameters; None leaves the output linear.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        norm: Callable[[int], nn.Module],
        activation: Callable[[], nn.Module] | None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.bn = norm(outputs)
        self.act = nn.Identity() if activation is None else activation()

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]"""
        x = self.conv(x)
        if self._fuses(x):
            return NormMish.apply(x, self.bn.weight, self.bn.bias, self.bn)
        return self.act(self.bn(x))

    def _fuses(self, x: Tensor) -> bool:
        """Whether norm and activation are one function: for autograd's sake, where it works alone.

        Without gradients nothing is kept anyway; a hook wants to see the two modules called.
        """
        return (
            is_eager(x)
            and torch.is_grad_enabled()
            and type(self.bn) is GroupBatchNorm2d
            and type(self.act) is Mish
            and not (_is_hooked(self.bn) or _is_hooked(self.act))
        )


def fold(net: nn.Module) -> nn.Module:
    """A copy of a net for inference: every BatchNorm folded into the convolution before it.

    The same function as the net in evaluation mode, to rounding, with fewer passes over memory. It
    cannot be trained, and its tensors have other names.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for layer in net.modules():
        if isinstance(layer, ConvNormAct) and isinstance(layer.bn, nn.BatchNorm2d):
            conv, norm = layer.conv, layer.bn
            # in float64: the rounding of the product is then the only one
            scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
            bias = norm.bias.double() - norm.running_mean.double() * scale
            weight = conv.weight.double() * scale[:, None, None, None]
            conv.weight.copy_(weight)
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
            layer.bn = nn.Identity()
    return net


def _is_hooked(module: nn.Module) -> bool:
    return _has_any_global_hook() or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
