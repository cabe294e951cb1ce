"""Products of 16-bit values on processors that have no instructions for them.

There PyTorch multiplies bfloat16 and float16 one number at a time, which takes 10 to 100 times as
long as float32. But float32 can do it: a product of two such values is exact in it, sums are kept
in it anyway, and the result is rounded to the type. Only the order of the sums is another
(docs/decisions/0014-half-precision-without-its-instructions.md).

What is replaced are PyTorch's kernels of a few operators, on CPU and for these types alone. All
matmuls end in them: those of layers, of autograd's gradients, of optimizers, of peft, of
transformers and of compiled code. So no place has to ask for it, and none can forget to.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The operators of matmuls that have kernels of their own on CPU. Linear layers, matmul,
# einsum and the gradients of all of these call them. `.out` is what compiled code calls.
OPERATORS = (
    "mm",
    "mm.out",
    "bmm",
    "bmm.out",
    "addmm",
    "addmm.out",
    "addmv",
    "addmv.out",
    "baddbmm",
    "baddbmm.out",
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

    Not sooner: a call of ours takes 10 us longer, which is a fifth of the smallest models' steps,
    and most processors that have instructions for bfloat16 have none for float16.
    """
    if dtype in _in_float32 and _library is None:
        _replace_kernels()


def matmuls_in_float32() -> list[str]:
    """The types whose matmuls are computed in float32, for a record."""
    return sorted(str(dtype).removeprefix("torch.") for dtype in _in_float32)


def _has(type_name: str) -> bool:
    """Whether oneDNN multiplies a type by instructions of this processor.

    It says so of bfloat16 on x86 with any AVX-512, where without AVX512-BF16 it takes twice as
    long as float32, with AVX-NE-CONVERT, and on ARM with its bfloat16 extension; of float16 with
    AVX512-FP16 or AVX-NE-CONVERT. A build without oneDNN has nothing to ask, and no fast matmuls.
    """
    ask = getattr(torch.ops.mkldnn, f"_is_mkldnn_{type_name}_supported", None)
    if type_name == "bf16" and torch.cpu._is_avx512_supported():
        return ask is not None and torch.cpu._is_avx512_bf16_supported() and bool(ask())
    return ask is not None and bool(ask())


def _replace_kernels() -> None:
    global _library
    _library = torch.library.Library("aten", "IMPL")
    kernels = {  # all of them before the first is replaced: each keeps the native one
        name: _writing(name.removesuffix(".out")) if name.endswith(".out") else _returning(name)
        for name in OPERATORS
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that kernels are replaced
        for name, kernel in kernels.items():
            _library.impl(name, kernel, "CPU", with_keyset=True)


def _returning(operator: str) -> Callable[..., Any]:
    """The kernel of an operator that returns its results."""
    native = torch.library.get_kernel(f"aten::{operator}", "CPU").call_boxed

    def kernel(keys: torch._C.DispatchKeySet, *args: Any, **options: Any) -> Any:
        dtype = args[0].dtype
        if dtype not in _in_float32:
            return native(keys, *args, **options)
        return _rounded(_called_wide(native, keys, args, options), dtype)

    return kernel


def _writing(operator: str) -> Callable[..., Tensor]:
    """The kernel of an operator that writes its result to a tensor it is given."""
    native_out = torch.library.get_kernel(f"aten::{operator}.out", "CPU").call_boxed
    native = torch.library.get_kernel(f"aten::{operator}", "CPU").call_boxed

    def kernel(keys: torch._C.DispatchKeySet, *args: Any, out: Tensor, **options: Any) -> Any:
        if args[0].dtype not in _in_float32:
            return native_out(keys, *args, out=out, **options)
        result = _called_wide(native, keys, args, options)
        return out.resize_(result.shape).copy_(result)

    return kernel


def _called_wide(native: Callable[..., Any], keys: Any, args: Any, options: Any) -> Any:
    """The native kernel's results for the same values in float32."""
    wide_options = {name: _wide(value) for name, value in options.items()}
    return native(keys, *map(_wide, args), **wide_options)


def _wide(value: Any) -> Any:
    """An attention mask may be of bools, and stays so; other arguments are numbers."""
    return value.float() if isinstance(value, Tensor) and value.dtype in _in_float32 else value


def _rounded(results: Any, dtype: torch.dtype) -> Any:
    """The result in its type. Attention's second one, sums of exponentials, stays in float32."""
    if isinstance(results, Tensor):
        return results.to(dtype)
    first, *others = results
    return first.to(dtype), *others
