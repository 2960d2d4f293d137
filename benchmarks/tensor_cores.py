"""Convolutions in half precision on a processor that has none of its own.

There torch falls back to loops that take ten times as long as fp32, and rounds as those loops do. A
GPU's tensor cores multiply halves exactly, sum in fp32 and round the sum once; the same is had from
a convolution in fp32 of the halves' values, rounded at its end.
"""

import contextlib
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def native(dtype: torch.dtype) -> bool:
    """Whether this processor's convolutions take that type."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or supported[dtype]()


@contextlib.contextmanager
def emulated():
    """nn.Conv2d under autocast computes as above, in eager mode and compiled."""
    with mock.patch.object(nn.Conv2d, "forward", _forward):
        yield


def _forward(module: nn.Conv2d, x: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return module._conv_forward(x, module.weight, module.bias)
    dtype = torch.get_autocast_dtype("cpu")
    (stride, _), (padding, _) = module.stride, module.padding
    return convolution(x.to(dtype), module.weight.to(dtype), stride, padding, module.groups)


def _like_images(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("cspnet::convolution", mutates_args=())
def convolution(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """[N, C, H, W], [D, C / groups, k, k] -> [N, D, H / stride, W / stride], in the type of x."""
    with torch.autocast("cpu", enabled=False):  # which goes on inside an operator
        out = F.conv2d(x.float(), weight.float(), None, stride, padding, 1, groups)
    return _like_images(out.to(x.dtype))


@convolution.register_fake
def _(x, weight, stride, padding, groups):
    return _like_images(F.conv2d(x, weight, None, stride, padding, 1, groups))


@torch.library.custom_op("cspnet::convolution_backward", mutates_args=())
def convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, groups: int, of_x: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x (left at 0 where nobody asks for it) and of the weight."""
    of_input, of_weight, _ = torch.ops.aten.convolution_backward(
        *(tensor.float() for tensor in (gradient, x, weight)),
        *(None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, [of_x, True, False]),
    )
    of_input = _like_images(of_input.to(x.dtype)) if of_x else torch.zeros_like(x)
    return of_input, _like_images(of_weight.to(weight.dtype))


@convolution_backward.register_fake
def _(gradient, x, weight, stride, padding, groups, of_x):
    return _like_images(torch.empty_like(x)), _like_images(torch.empty_like(weight))


def _keep(ctx, inputs, output) -> None:
    x, weight, *ctx.how = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, gradient: Tensor):
    of_x = ctx.needs_input_grad[0]
    grads = convolution_backward(gradient, *ctx.saved_tensors, *ctx.how, of_x)
    return grads[0] if of_x else None, grads[1], None, None, None


convolution.register_autograd(_backward, setup_context=_keep)
