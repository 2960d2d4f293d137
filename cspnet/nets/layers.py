"""What the networks are built from: BatchNorm by group, convolution + norm + activation."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from cspnet.nets.mish import (
    Mish,
    affine_mish_,
    is_eager,
    mish_backward,
    uses_chunks,
    widen,
    write_mish,
)


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
        wide = widen(x).unflatten(0, (-1, group))  # [G, group, C, H, W]
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
        wide = widen(x).unflatten(0, (-1, ctx.group))
        g = widen(gradient).unflatten(0, (-1, ctx.group))
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


def norm_mish_(x: Tensor, norm: nn.Module) -> Tensor:
    """mish(norm(x)), x [N, C, H, W] lost or not. No autograd.

    Fresh memory for a result costs a CPU more than the arithmetic of either.
    """
    by_pixels = uses_chunks(x) and x.is_contiguous(memory_format=torch.channels_last)
    if by_pixels and isinstance(norm, GroupBatchNorm2d) and not norm.training:
        scale = widen(norm.weight) * (widen(norm.running_var) + norm.eps).rsqrt()
        return affine_mish_(x, scale, widen(norm.bias) - widen(norm.running_mean) * scale)
    normal = norm(x)
    return write_mish(normal, normal)


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
        if not self._fuses(x):
            return self.act(self.bn(x))
        if torch.is_grad_enabled():
            return NormMish.apply(x, self.bn.weight, self.bn.bias, self.bn)
        return norm_mish_(x, self.bn)

    def _fuses(self, x: Tensor) -> bool:
        """Whether norm and activation are one function, which may take the convolution's output.

        Not where a hook wants to see the modules called, or their outputs as they are.
        """
        folded = type(self.bn) is nn.Identity and not torch.is_grad_enabled()
        return (
            is_eager(x)
            and isinstance(self.conv, nn.Conv2d)
            and (folded or type(self.bn) is GroupBatchNorm2d)
            and type(self.act) is Mish
            and not any(_is_hooked(module) for module in (self.conv, self.bn, self.act))
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
