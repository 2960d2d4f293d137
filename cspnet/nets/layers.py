"""The building blocks of the networks: BatchNorm by group; convolution + norm + activation."""

import copy
from collections.abc import Callable
from math import sqrt
from typing import TypeVar

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

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class GroupBatchNorm2d(nn.BatchNorm2d):
    """Ghost BatchNorm: training statistics are computed per group of images, not per tensor.

    `group` consecutive images (Darknet's batch / subdivisions) share mean and variance; None makes
    the whole tensor one group. The running statistics are updated once per group, in order, so a
    micro-batch of four groups gives the same values as four micro-batches of one group. The running
    variance uses the unbiased variance.

    `num_batches_tracked` exists for timm's state dict only; it is not updated, as `momentum` is
    always a number here.
    """

    # Never None here, unlike in the base class.
    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def __init__(self, channels: int, *, group: int | None, eps: float, momentum: float) -> None:
        super().__init__(channels, eps=eps, momentum=momentum)
        assert group is None or group > 0, group
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]; in training N must be a multiple of the group."""
        if not self.training or self.group is None:
            return self._normalize(x)
        group = self.group_of(x)
        if group == x.shape[0]:
            return self._normalize(x)
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            y, mean, var = GroupedNorm.apply(x, self.weight, self.bias, group, self.eps)
            for group_mean, group_var in zip(mean.unbind(), var.unbind(), strict=True):
                self.running_mean.lerp_(group_mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_(group_var.to(self.running_var), self.momentum)
            return y
        # The backward pass of split is one concatenation; that of slices is a padded sum per group.
        return torch.cat([self._normalize(images) for images in x.split(group)])

    def group_of(self, x: Tensor) -> int:
        """The number of images of x [N, C, H, W] that are normalized together; it divides N."""
        images, _, height, width = x.shape
        if not self.training:
            return images
        group = self.group or images
        assert images % group == 0, f"{images} images are not a multiple of the group of {group}"
        if group * height * width == 1:  # torch's message
            raise ValueError("Expected more than 1 value per channel when training, got 1")
        return group

    def _normalize(self, x: Tensor) -> Tensor:
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
    """BatchNorm by group as a single expression, for torch.compile.

    If groups are split, normalized and concatenated, torch.compile saves both the parts and the
    result for the backward pass (1.5 times the memory), and the graph grows with every group.

    x [G * group, C, H, W], weight and bias [C] -> y, shaped like x; mean and unbiased variance of
    each group, both [G, C] and without gradient. 16-bit inputs are computed in float32.
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
        grad_bias = g.sum((1, 3, 4), keepdim=True)  # [G, 1, C, 1, 1]
        grad_weight = (g * normal).sum((1, 3, 4), keepdim=True)
        grad_x = (g - grad_bias / count - normal * (grad_weight / count)) * (
            scale * weight[:, None, None]
        )
        sums = (grad.sum(0).flatten().to(weight.dtype) for grad in (grad_weight, grad_bias))
        return grad_x.flatten(0, 1).to(x.dtype), *sums, None, None


class NormMish(torch.autograd.Function):
    """mish(norm(x)) for a GroupBatchNorm2d; saves only x for the backward pass.

    Plain autograd also saves norm(x), a third of the network's activation memory. Here the backward
    pass recomputes norm(x) from the saved statistics: one kernel, no convolution. Results are
    bit-identical to the two separate modules.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, norm: GroupBatchNorm2d) -> Tensor:
        ctx.group, ctx.training, ctx.eps = norm.group_of(x), norm.training, norm.eps
        running = norm.running_mean, norm.running_var
        out = None
        saved = []
        for number, images in enumerate(x.split(ctx.group)):
            # F.batch_norm calls this operator, which chooses between torch's and cuDNN's kernels.
            normal, mean, scale, reserve, ctx.kernel = torch.ops.aten._batch_norm_impl_index(
                *(images, weight, bias, *running, norm.training, norm.momentum, norm.eps),
                torch.backends.cudnn.enabled,
            )
            if len(images) == len(x):
                out = write_mish(normal, normal)
            else:
                out = torch.empty_like(x) if out is None else out
                write_mish(normal, out[number * ctx.group :][: ctx.group])
            saved += [mean, scale, reserve]  # mean and 1 / standard deviation [C]; cuDNN's reserve
        ctx.save_for_backward(x, weight, bias, *([] if norm.training else running), *saved)
        assert out is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *saved = ctx.saved_tensors
        running = (None, None) if ctx.training else (saved.pop(0), saved.pop(0))
        results = []
        for number, images in enumerate(x.split(ctx.group)):
            mean, scale, reserve = saved[3 * number :][:3]
            used_mean, used_var = (mean, scale**-2) if ctx.training else running
            eps = 0.0 if ctx.training else ctx.eps  # scale**-2 includes it
            normal = F.batch_norm(images, used_mean, used_var, weight, bias, eps=eps)
            g = mish_backward(gradient[number * ctx.group :][: ctx.group], normal)
            results.append(
                torch.ops.aten._batch_norm_impl_index_backward(
                    *(ctx.kernel, images, g, weight, *running, mean, scale, ctx.training, ctx.eps),
                    *(ctx.needs_input_grad[:3], reserve),
                )
            )
        if len(results) == 1:
            return *results[0], None
        grad_x, *grads = (None if g[0] is None else g for g in zip(*results, strict=True))
        sums = (None if g is None else torch.stack(g).sum(0) for g in grads)
        return None if grad_x is None else torch.cat(grad_x), *sums, None


def norm_mish_(x: Tensor, norm: nn.Module) -> Tensor:
    """mish(norm(x)); may overwrite x [N, C, H, W]. No autograd.

    On a CPU, allocating memory for a result costs more than computing it.
    """
    by_pixels = uses_chunks(x) and x.is_contiguous(memory_format=torch.channels_last)
    if by_pixels and isinstance(norm, GroupBatchNorm2d) and not norm.training:
        scale = widen(norm.weight) * (widen(norm.running_var) + norm.eps).rsqrt()
        return affine_mish_(x, scale, widen(norm.bias) - widen(norm.running_mean) * scale)
    normal = norm(x)
    return write_mish(normal, normal)


class ConvNormAct(nn.Module):
    """Convolution without bias, norm, activation; the names `conv` and `bn` are timm's.

    The padding is kernel // 2, like Darknet's `pad=1`. `norm` builds a norm for a channel count;
    `activation` builds a module without parameters, or is None for a linear output.
    """

    bn: GroupBatchNorm2d  # `fold` replaces it with an Identity

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        *,
        norm: Callable[[int], GroupBatchNorm2d],
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
        """Whether norm and activation run as one function, which may overwrite its input.

        Not if a hook expects the modules to be called, or their outputs to remain intact.
        """
        folded = type(self.bn) is nn.Identity and not torch.is_grad_enabled()
        return (
            is_eager(x)
            and isinstance(self.conv, nn.Conv2d)
            and (folded or type(self.bn) is GroupBatchNorm2d)
            and type(self.act) is Mish
            and not any(_is_hooked(module) for module in (self.conv, self.bn, self.act))
        )


def init_parameters(module: nn.Module) -> None:
    """Darknet's initialization: all weights uniform in ±sqrt(2 / fan_in), including the classifier.

    fan_in = k * k * inputs / groups, so the variance is 2 / (3 fan_in). Biases are 0. Norms keep
    torch's defaults: weight 1, bias 0, running mean 0 and variance 1. (Darknet's running variance
    starts at 0, which matters only for an evaluation within the first updates.)
    Source: darknet src/convolutional_layer.c, make_convolutional_layer.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = sqrt(2 / layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def fold(net: AnyModule) -> AnyModule:
    """A copy of a network for inference, every BatchNorm folded into the preceding convolution.

    It computes the same function as the network in evaluation mode, up to rounding, with fewer
    passes over memory. It cannot be trained, and its state dict has other keys.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for layer in net.modules():
        if isinstance(layer, ConvNormAct) and isinstance(layer.bn, GroupBatchNorm2d):
            conv, norm = layer.conv, layer.bn
            # In float64, so that only the result is rounded.
            scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
            bias = norm.bias.double() - norm.running_mean.double() * scale
            weight = conv.weight.double() * scale[:, None, None, None]
            conv.weight.copy_(weight)
            conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
            # Only a folded layer has an Identity here, and it cannot be trained.
            layer.bn = nn.Identity()  # type: ignore[assignment]
    return net


def _is_hooked(module: nn.Module) -> bool:
    return _has_any_global_hook() or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
