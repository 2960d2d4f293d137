"""What the networks are built from: Mish, BatchNorm by group, convolution + norm + activation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Beyond 20, tanh(softplus(x)) rounds to 1 even in float64; Darknet cuts its softplus there too
# (src/activations.c, MISH_THRESHOLD). It also keeps exp(2x) and its square inside float32.
SATURATION = 20.0


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

    Never NaN for a finite x, and autograd keeps the input only. Two formulas for one function:

    - compiled: `AlgebraicMish`. A compiler fuses it into its neighbours, and it needs 23
      instructions an element forward and 30 backward, where torch's own form, tanh of log1p of
      exp, needs 64 and 84 and makes the fused kernel wait for arithmetic.
    - eager: torch's kernel, one pass each way. Out of the same algebra eager makes some ten
      passes: on two CPU cores, [32, 64, 64, 64] float32 forward and backward take 101 ms with
      every operation in place on the temporaries, and 43 ms with torch's kernel.

    An exported graph keeps the operator `mish`, for whoever reads it to choose the kernel.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return AlgebraicMish.apply(x)
    return F.mish(x)


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
        images = x.shape[0]
        group = images if self.group is None else self.group
        if not self.training or images == group:
            return self._normalise(x)
        assert images % group == 0, f"{images} images are not whole groups of {group}"
        # split, not slices: its backward is one concatenation, not a padded sum per group. Eager
        # pays for both concatenations; compiled, they cost next to nothing.
        return torch.cat([self._normalise(part) for part in x.split(group)])

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
        return self.act(self.bn(self.conv(x)))
