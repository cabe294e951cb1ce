"""Products of 16-bit values on processors that have no instructions for them.

There PyTorch takes 10 to 100 times as long for bfloat16 and float16 as for float32, which can do
the same: a product of two such values is exact in it, sums are kept in it anyway, and the result is
rounded to the type. Only the order of the sums is another
(docs/decisions/0014-half-precision-without-its-instructions.md).

What is replaced are PyTorch's kernels of a few operators, on CPU and for these types alone. All
matmuls end in them, also those of autograd, peft, transformers and compiled code.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The operators of matmuls that have kernels of their own on CPU. Linear layers, matmul,
# einsum and the gradients of all of these call them. `.out` is what compiled code calls.
OPERATORS = (
    *("mm", "mm.out", "bmm", "bmm.out", "addmm", "addmm.out"),
    *("addmv", "addmv.out", "baddbmm", "baddbmm.out"),
    "_scaled_dot_product_flash_attention_for_cpu",  # of models of transformers
)

_in_float32: frozenset[torch.dtype] = frozenset()  # the types that are multiplied so
_library: Any = None  # holds our kernels, once there was a type to multiply so


def choose_matmuls(setting: str) -> None:
    """How matmuls of 16-bit values are computed on CPU from here on, in this process.

    setting: as MINIMIND_CPU_MATMULS, auto, native or float32.
    """
    global _in_float32
    if setting == "auto":
        # Asked, not timed: equal runs on a machine must not differ.
        native = {torch.bfloat16: _has("bf16"), torch.float16: _has("fp16")}
    else:
        native = dict.fromkeys((torch.bfloat16, torch.float16), setting == "native")
    _in_float32 = frozenset(dtype for dtype, is_native in native.items() if not is_native)
    prepare_matmuls(torch.bfloat16)


def prepare_matmuls(dtype: torch.dtype) -> None:
    """Replace the kernels if this type needs it; to be called before any matmul of float16.

    Not sooner: a call of ours takes 10 us longer, and many processors lack float16 alone.
    """
    if dtype in _in_float32 and _library is None:
        _replace_kernels()


def matmuls_in_float32() -> list[str]:
    """The types whose matmuls are computed in float32, for a record."""
    return sorted(str(dtype).removeprefix("torch.") for dtype in _in_float32)


def _has(type_name: str) -> bool:
    """Whether oneDNN multiplies a type by instructions of this processor.

    It says so of bfloat16 with any AVX-512, but without AVX512-BF16 takes twice as long as float32.
    A build without oneDNN has nothing to ask, and no fast matmuls.
    """
    ask = getattr(torch.ops.mkldnn, f"_is_mkldnn_{type_name}_supported", None)
    if type_name == "bf16" and torch.cpu._is_avx512_supported():
        return ask is not None and torch.cpu._is_avx512_bf16_supported() and bool(ask())
    return ask is not None and bool(ask())


def _replace_kernels() -> None:
    global _library
    _library = torch.library.Library("aten", "IMPL")
    kernels = {name: _kernel(name) for name in OPERATORS}  # each keeps the native ones: all first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that kernels are replaced
        for name, kernel in kernels.items():
            _library.impl(name, kernel, "CPU", with_keyset=True)


def _kernel(operator: str) -> Callable[..., Any]:
    """The native kernel, but for the types in question: on float32, and its result rounded."""
    native = _native(operator)
    returning = _native(operator.removesuffix(".out"))

    def kernel(keys: torch._C.DispatchKeySet, *args: Any, **options: Any) -> Any:
        dtype = args[0].dtype
        if dtype not in _in_float32:
            return native(keys, *args, **options)
        out = options.pop("out", None)
        wide_options = {name: _wide(value) for name, value in options.items()}
        results = returning(keys, *map(_wide, args), **wide_options)
        if out is not None:
            return out.resize_(results.shape).copy_(results)
        if isinstance(results, Tensor):
            return results.to(dtype)
        first, *others = results  # attention's second, sums of exponentials, stays in float32
        return first.to(dtype), *others

    return kernel


def _native(operator: str) -> Callable[..., Any]:
    return torch.library.get_kernel(f"aten::{operator}", "CPU").call_boxed


def _wide(value: Any) -> Any:
    """An attention mask may be of bools, and stays so; other arguments are numbers."""
    return value.float() if isinstance(value, Tensor) and value.dtype in _in_float32 else value
