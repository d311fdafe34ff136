"""Linear layers on a CPU: products through oneDNN, and LoRA's update in the same step.

PyTorch multiplies fp32 matrices with MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN, which comes
with PyTorch too, uses AVX-512 wherever there is any (measured on an AMD EPYC: 200 against 430 GFLOP/s). And where peft
makes two passes over each layer's whole output to scale LoRA's update and to add it, here it is added in place.
Results are those of the plain layers within the rounding of float32.
"""

import platform
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit as LoraLinear4bit
from torch import nn


def use_onednn(model: nn.Module) -> None:
    """Let a model's linear layers compute through oneDNN, where that is the same and faster: fp32 (or NF4) on a CPU.

    The modules stay what they are, their forward changes: weights, adapters, saving and merging are untouched. What is
    not a linear layer, bare (then it may learn, too) or frozen under plain LoRA, goes on as before.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        # To change the class of a module is how peft itself (FSDP, too) gives layers another forward in place.
        if type(module) in _FASTER:
            module.__class__ = _FASTER[type(module)]


class _Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _fits(self, x):
            return super().forward(x)
        return _product(x, self) if _frozen(self) else _learning_product(x, self)


class _Linear4bit(Linear4bit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In evaluation mode bitsandbytes would repack the weight for a bf16 product of its own, for good: training on
        # would find no gradient in it.
        return _product(x, self) if _fits(self, x) and _frozen(self) else super().forward(x)


class _LoraLinear(LoraLinear):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _product(x, self.base_layer, *_update(self)) if _plain(self, x, kwargs) else super().forward(x, **kwargs)


class _LoraLinear4bit(LoraLinear4bit):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _product(x, self.base_layer, *_update(self)) if _plain(self, x, kwargs) else super().forward(x, **kwargs)


_FASTER: dict[type, type] = {
    nn.Linear: _Linear,
    Linear4bit: _Linear4bit,
    LoraLinear: _LoraLinear,
    LoraLinear4bit: _LoraLinear4bit,
}


def _fits(layer: nn.Linear, x: torch.Tensor) -> bool:
    """Whether oneDNN's product may stand for a bare layer: float32 on a CPU."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not x.numel():
        return False
    if isinstance(layer, Linear4bit):
        state = layer.weight.quant_state
        return state is not None and not getattr(state, "packing_format_for_cpu", False)
    return layer.weight.dtype == torch.float32


def _frozen(layer: nn.Linear) -> bool:
    """Whether nothing is to be learnt in a layer now."""
    return not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in layer.parameters())


def _plain(layer: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a layer of peft's does nothing but add one adapter's update to its frozen base."""
    base = layer.base_layer
    if layer.disable_adapters or layer.merged or kwargs or layer.lora_variant or not (_fits(base, x) and _frozen(base)):
        return False
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return False
    a, b, dropout = layer.lora_A[names[0]], layer.lora_B[names[0]], layer.lora_dropout[names[0]]
    without_dropout = isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0
    return without_dropout and a.weight.dtype == torch.float32 and a.bias is None and b.bias is None


def _update(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _product(
    x: torch.Tensor,
    base: nn.Linear,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """x [..., in] -> x W^T + bias + scaling (x A^T) B^T [..., out]; A is [r, in], B is [out, r]."""
    return _Product.apply(_flat(x), base, a, b, scaling).view(*x.shape[:-1], -1)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [T, in], without gaps: with them (the first token of each row, say) the gradient of a weight would
    fall to oneDNN's reference code, hundreds of times slower."""
    return x.reshape(-1, x.shape[-1]).contiguous()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, base: nn.Linear, a: torch.Tensor | None, b: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        y = _matmul(x, _weight(base), base.bias)
        ctx.base, ctx.scaling, z = base, scaling, None
        if a is not None and b is not None:
            z = _matmul(x, a)  # [T, r]
            y.addmm_(z, b.t(), alpha=scaling)
        ctx.save_for_backward(x if a is not None else None, z, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, z, a, b = ctx.saved_tensors
        wants_x, _, wants_a, wants_b, _ = ctx.needs_input_grad
        grad_x = _matmul(grad, _weight(ctx.base).t()) if wants_x else None
        grad_a = grad_b = None
        if a is not None:
            u = _matmul(grad, b.t())  # [T, r]
            if grad_x is not None:
                grad_x.addmm_(u, a, alpha=ctx.scaling)
            # With the narrow matrix on the left, oneDNN is several times faster; so B's gradient is transposed.
            grad_a = _matmul(u.t(), x.t()).mul_(ctx.scaling) if wants_a else None
            grad_b = _matmul(z.t(), grad.t()).mul_(ctx.scaling).t().contiguous() if wants_b else None
        return grad_x, None, grad_a, grad_b, None


def _learning_product(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """x [..., in] -> x W^T + bias [..., out], with gradients for both."""
    y = _LearningProduct.apply(_flat(x), layer.weight, layer.bias)
    return y.view(*x.shape[:-1], -1)


class _LearningProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _matmul(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _matmul(grad, weight.t()) if wants_x else None,
            _matmul(grad.t(), x.t()) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


def _matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in], weight [out, in] -> x weight^T + bias [T, out]. Either may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _weight(base: nn.Linear) -> torch.Tensor:
    if isinstance(base, Linear4bit):
        return dequantize_4bit(base.weight.data, base.weight.quant_state).to(torch.float32)
    return base.weight
