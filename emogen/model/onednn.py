"""Linear layers on a CPU by the fastest library, with LoRA's update in the same step.

PyTorch multiplies float32 matrices with MKL, which uses AVX2 at most on processors of other makers than Intel. oneDNN,
which PyTorch also ships, uses AVX-512 wherever it exists (measured on an AMD EPYC: 430 GFLOP/s instead of 200). On
Intel's own processors MKL is the faster one by 10 to 25 %. So both are tried, once on a machine. And where peft passes
over the whole output of a layer twice, to scale LoRA's update and to add it, the update is added here in place. Results
equal those of the original layers within float32 rounding.

With `bf16: true`, the products with frozen weights are computed in bfloat16 in training steps: inputs, weights and
results are rounded to 8 bits, sums are not. Processors with AMX are several times faster with it. LoRA's own products,
everything between the layers, and evaluations stay in float32.

A model that is loaded for prediction keeps a second copy of its weights, with LoRA's update added, in the order in
which oneDNN reads them (`pack_weights`). The few tokens of a step of decoding are computed in half to two thirds of the
time, and LoRA costs nothing.

Shapes: T tokens, r the rank of LoRA.
"""

import logging
import platform
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import psutil
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit as LoraLinear4bit
from torch import nn
from torch.nn import functional

from emogen.memo import remembered

log = logging.getLogger(__name__)


def use_onednn(model: nn.Module, *, bf16: bool = False) -> None:
    """Make the linear layers of a model compute through the faster of oneDNN and MKL.

    Only their forward changes: weights, adapters, saving and merging are untouched. A layer uses oneDNN for float32
    inputs on a CPU, if its weights are float32 or NF4 and it is either bare or a frozen layer under plain LoRA. In all
    other cases it computes as before.

    Args:
        bf16: compute the products with frozen weights in bfloat16 in training steps, except for the logits.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        # Changing the class of a module in place is also how peft and FSDP replace a forward.
        if type(module) in _FASTER:
            module.__class__ = _FASTER[type(module)]
        if bf16 and type(module) in (_Linear, _Linear4bit):
            module.in_bf16 = True
    if not bf16:
        return
    if all(parameter.requires_grad for parameter in model.parameters()):
        log.warning("bf16: no weight of this model is frozen, so it computes in float32")
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        output.in_bf16 = False


@torch.no_grad()
def pack_weights(model: nn.Module) -> None:
    """Keep copies of the weights of linear layers as oneDNN reads them, for passes without gradients.

    A layer of `use_onednn` with float32 weights uses its copy as long as its weights and its adapter stay as they were.
    Results equal those of the layer within float32 rounding. Output projections have no copy: under the grammar only a
    few of their rows are computed. Nor has any layer if the copies would take more than half of the free memory.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    adapted = [module for module in model.modules() if isinstance(module, LoraLinear)]
    left_out = {output, *(part for layer in adapted for part in layer.modules() if part is not layer)}
    layers = [m for m in model.modules() if type(m) in (_Linear, _LoraLinear) and m not in left_out]
    for module in model.modules():
        module.__dict__.pop("packed", None)
    layers = [layer for layer in layers if _packs(layer)]
    if not layers or not _onednn_is_faster():
        return
    n_bytes = sum(_base(layer).weight.nbytes for layer in layers)
    if n_bytes > psutil.virtual_memory().available / 2:
        log.info(f"The weights are not packed: their copies would take {n_bytes / 2**30:.1f} GiB of the free memory")
        return
    for layer in layers:
        weight = _base(layer).weight.detach()
        if isinstance(layer, LoraLinear):
            a, b, scaling = _lora_factors(layer)
            weight = weight.addmm(b, a, alpha=scaling)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        layer.__dict__["packed"] = packed, _state(layer)  # not a buffer: it is not saved


def bf16_pays(wanted: bool, device: torch.device) -> bool:
    """Whether training on a device computes in bfloat16 through `use_onednn`. It says what this processor is good at.

    Args:
        wanted: the key `bf16`.
    """
    if device.type != "cpu":
        return False  # the trainer sees to it
    speed = _bf16_speed()
    if wanted and speed < 1:
        log.warning("bf16: this processor is slower in bfloat16 than in float32, so it computes in float32")
    elif not wanted and speed > 2:
        log.info(f"This processor multiplies matrices {speed:.1f} times faster in bfloat16; bf16=true uses it")
    return wanted and speed >= 1


def _bf16_speed() -> float:
    """How many times faster than in float32 a product with a frozen weight is in bfloat16 on this processor."""
    x, weight = torch.randn(512, 576), torch.randn(1536, 576)
    half = weight.bfloat16()
    return _seconds(lambda: _matmul(x, weight)) / _seconds(lambda: _half_matmul(x, half))


@cache
def _onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than MKL on this processor.

    It is measured once on a machine and kept: the two round differently, so a run that is repeated or resumed while
    other work is on the cores would otherwise end with other bytes now and then.
    """
    machine = [platform.node(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    return bool(remembered("onednn", machine, _compare_with_mkl, packages=["torch"]))


def _compare_with_mkl() -> bool:
    x, weight = torch.ones(512, 576), torch.ones(1536, 576)  # random ones would change what a seed draws after them
    return _seconds(lambda: _onednn_matmul(x, weight, None)) < _seconds(lambda: functional.linear(x, weight))


def _seconds(work: Callable[[], Any]) -> float:
    """The shortest time of twenty calls after the first one."""
    times = []
    for _ in range(21):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])


class _Linear(nn.Linear):
    in_bf16 = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _is_supported(self, x):
            return super().forward(x)
        if (packed := _packed(self)) is not None:
            return _packed_linear(x, packed, self.bias)
        return _frozen_linear(x, self) if _is_frozen(self) else _trainable_linear(x, self)


class _Linear4bit(Linear4bit):
    in_bf16 = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The forward of bitsandbytes would, in evaluation mode, repack the weight for a bf16 product, permanently. If
        # training continued afterwards, the layer would have no gradient.
        return _frozen_linear(x, self) if _is_supported(self, x) and _is_frozen(self) else super().forward(x)


class _LoraLinear(LoraLinear):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not _is_plain_lora(self, x, kwargs):
            return super().forward(x, **kwargs)
        if (packed := _packed(self)) is not None:
            return _packed_linear(x, packed, self.base_layer.bias)
        return _frozen_linear(x, self.base_layer, *_lora_factors(self))


class _LoraLinear4bit(LoraLinear4bit):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not _is_plain_lora(self, x, kwargs):
            return super().forward(x, **kwargs)
        return _frozen_linear(x, self.base_layer, *_lora_factors(self))


_FASTER: dict[type, type] = {
    nn.Linear: _Linear,
    Linear4bit: _Linear4bit,
    LoraLinear: _LoraLinear,
    LoraLinear4bit: _LoraLinear4bit,
}


_BARE = (nn.Linear, Linear4bit, _Linear, _Linear4bit)


def _is_supported(layer: nn.Linear, x: torch.Tensor) -> bool:
    """Whether oneDNN can compute a bare layer: float32 on a CPU, and no other kind of layer, such as a `Conv1D`."""
    if type(layer) not in _BARE:
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not x.numel():
        return False
    if isinstance(layer, Linear4bit):
        state = layer.weight.quant_state
        return state is not None and not getattr(state, "packing_format_for_cpu", False)
    return layer.weight.dtype == torch.float32


def _is_frozen(layer: nn.Linear) -> bool:
    """Whether no parameter of a layer needs a gradient now."""
    return not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in layer.parameters())


def _is_plain_lora(layer: Any, x: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a LoRA layer only adds the update of a single adapter to a frozen base layer that oneDNN supports."""
    base = layer.base_layer
    if layer.disable_adapters or layer.merged or kwargs or layer.lora_variant:
        return False
    if not (_is_supported(base, x) and _is_frozen(base)):
        return False
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1:
        return False
    a, b, dropout = layer.lora_A[names[0]], layer.lora_B[names[0]], layer.lora_dropout[names[0]]
    without_dropout = isinstance(dropout, nn.Identity) or not dropout.training or dropout.p == 0
    return without_dropout and a.weight.dtype == torch.float32 and a.bias is None and b.bias is None


def _lora_factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A [r, in], B [out, r] and the scaling of the active adapter."""
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def _base(layer: Any) -> nn.Linear:
    """The layer that holds the weight: `layer` itself, or that under LoRA."""
    return layer.base_layer if isinstance(layer, LoraLinear) else layer


def _packs(layer: Any) -> bool:
    """Whether a copy of the weight, with LoRA's update, would stand for a layer."""
    base = _base(layer)
    x = torch.zeros(1, base.in_features, device=base.weight.device)
    return type(base) is _Linear and _is_supported(base, x) and (base is layer or _is_plain_lora(layer, x, {}))


def _state(layer: Any) -> tuple[Any, ...]:
    """What a copy of the weight depends on: the tensors and how often each was changed, and LoRA's scaling."""
    a, b, scaling = _lora_factors(layer) if isinstance(layer, LoraLinear) else (None, None, 1.0)
    tensors = [tensor for tensor in (_base(layer).weight, a, b) if tensor is not None]
    return scaling, *((id(tensor), tensor._version) for tensor in tensors)


def _packed(layer: Any) -> torch.Tensor | None:
    """The copy of the weight of a layer, unless there is none, it is out of date, or gradients are wanted."""
    packed, state = layer.__dict__.get("packed", (None, None))
    return None if packed is None or torch.is_grad_enabled() or state != _state(layer) else packed


def _packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., in] -> [..., out]."""
    return _onednn_matmul(_flat(x), packed, bias).view(*x.shape[:-1], -1)


def _frozen_linear(
    x: torch.Tensor,
    base: nn.Linear,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    scaling: float = 1.0,
) -> torch.Tensor:
    """x W^T + bias + scaling (x A^T) B^T, with gradients for x, A and B.

    Args:
        x: [..., in].
        base: the layer with W [out, in] and bias [out].
        a, b: A [r, in] and B [out, r], or None without LoRA.

    Returns:
        [..., out].
    """
    in_bf16 = getattr(base, "in_bf16", False) and base.training and torch.is_grad_enabled()
    return _FrozenLinear.apply(_flat(x), base, a, b, scaling, in_bf16).view(*x.shape[:-1], -1)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [T, in], contiguous.

    For an input with gaps, such as the first token of each row, the gradient of a weight would be computed by oneDNN's
    reference code, which is hundreds of times slower.
    """
    return x.reshape(-1, x.shape[-1]).contiguous()


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: nn.Linear,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scaling: float,
        in_bf16: bool,
    ) -> torch.Tensor:
        y = _half_matmul(x, _half_weight(base), base.bias) if in_bf16 else _matmul(x, _weight(base), base.bias)
        ctx.base, ctx.scaling, ctx.in_bf16, z = base, scaling, in_bf16, None
        if a is not None and b is not None:
            z = _matmul(x, a)  # [T, r]
            y.addmm_(z, b.t(), alpha=scaling)
        ctx.save_for_backward(x if a is not None else None, z, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, z, a, b = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        grad_x = None
        if needs_x and ctx.in_bf16:
            grad_x = _half_matmul(grad, _half_weight(ctx.base).t())
        elif needs_x:
            grad_x = _matmul(grad, _weight(ctx.base).t())
        grad_a = grad_b = None
        if a is not None:
            u = _matmul(grad, b.t())  # [T, r]
            if grad_x is not None:
                grad_x.addmm_(u, a, alpha=ctx.scaling)
            # Both libraries are faster with the narrow matrix on the left, so B's gradient is transposed.
            grad_a = _matmul(u.t(), x.t()).mul_(ctx.scaling) if needs_a else None
            grad_b = _matmul(z.t(), grad.t()).mul_(ctx.scaling).t().contiguous() if needs_b else None
        return grad_x, None, grad_a, grad_b, None, None


def _trainable_linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """x [..., in] -> x W^T + bias [..., out], with gradients for x, W and the bias."""
    y = _TrainableLinear.apply(_flat(x), layer.weight, layer.bias)
    return y.view(*x.shape[:-1], -1)


class _TrainableLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _matmul(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _matmul(grad, weight.t()) if needs_x else None,
            _matmul(grad.t(), x.t()) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


def _matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in], weight [out, in] -> x weight^T + bias [T, out]. Both may be transposed views."""
    return _onednn_matmul(x, weight, bias) if _onednn_is_faster() else functional.linear(x, weight, bias)


def _onednn_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _half_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same for a bfloat16 weight: x and the result are float32."""
    y = functional.linear(x.bfloat16(), weight).float()
    return y if bias is None else y.add_(bias)


def _weight(base: nn.Linear) -> torch.Tensor:
    """The weight of a layer in float32, [out, in]."""
    if isinstance(base, Linear4bit):
        return dequantize_4bit(base.weight.data, base.weight.quant_state).to(torch.float32)
    return base.weight


def _half_weight(base: Any) -> torch.Tensor:
    """The weight of a frozen layer in bfloat16, [out, in]. That of a float32 layer is kept beside it."""
    if isinstance(base, Linear4bit):
        return dequantize_4bit(base.weight.data, base.weight.quant_state).bfloat16()
    kept, version = base.__dict__.get("half_weight", (None, None))
    if version != base.weight._version:
        kept = base.weight.detach().bfloat16()
        base.__dict__["half_weight"] = kept, base.weight._version  # not a buffer: it is not saved
    return kept
