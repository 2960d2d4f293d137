"""Convolutions in 16 bits on a CPU without instructions for them.

There torch falls back to loops that take ten times as long as fp32 and round differently. The
tensor cores of a GPU multiply 16-bit values exactly, sum in fp32 and round the sum once. A
convolution in fp32 of the 16-bit values, whose result is rounded, computes the same.
"""

import contextlib
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_native(dtype: torch.dtype) -> bool:
    """Whether torch has convolutions of this type for the CPU."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype not in supported or supported[dtype]()


@contextlib.contextmanager
def emulated():
    """Let nn.Conv2d under autocast compute like tensor cores, in eager mode and compiled."""
    with mock.patch.object(nn.Conv2d, "forward", _forward):
        yield


def _forward(module: nn.Conv2d, x: Tensor) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return module._conv_forward(x, module.weight, module.bias)
    dtype = torch.get_autocast_dtype("cpu")
    (stride, _), (padding, _) = module.stride, module.padding
    return convolution(x.to(dtype), module.weight.to(dtype), stride, padding, module.groups)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("cspnet::convolution", mutates_args=())
def convolution(x: Tensor, weight: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    """[N, C, H, W], [D, C / groups, k, k] -> [N, D, H / stride, W / stride], in the dtype of x."""
    with torch.autocast("cpu", enabled=False):  # it would apply inside a custom operator, too
        out = F.conv2d(x.float(), weight.float(), None, stride, padding, 1, groups)
    return _channels_last(out.to(x.dtype))


@convolution.register_fake
def _(x, weight, stride, padding, groups):
    return _channels_last(F.conv2d(x, weight, None, stride, padding, 1, groups))


@torch.library.custom_op("cspnet::convolution_backward", mutates_args=())
def convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    groups: int,
    needs_x: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (zeros unless `needs_x`) and of the weight."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        *(tensor.float() for tensor in (gradient, x, weight)),
        *(None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups, [needs_x, True, False]),
    )
    grad_x = _channels_last(grad_x.to(x.dtype)) if needs_x else torch.zeros_like(x)
    return grad_x, _channels_last(grad_weight.to(weight.dtype))


@convolution_backward.register_fake
def _(gradient, x, weight, stride, padding, groups, needs_x):
    return _channels_last(torch.empty_like(x)), _channels_last(torch.empty_like(weight))


def _save_inputs(ctx, inputs, output) -> None:
    x, weight, *ctx.arguments = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, gradient: Tensor):
    needs_x = ctx.needs_input_grad[0]
    grads = convolution_backward(gradient, *ctx.saved_tensors, *ctx.arguments, needs_x)
    return grads[0] if needs_x else None, grads[1], None, None, None


convolution.register_autograd(_backward, setup_context=_save_inputs)
