"""16-bit matmuls on processors without instructions for them: none is left, none is another's."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from minimind.compute import matmuls
from minimind.compute.compiling import can_compile
from minimind.compute.matmuls import OPERATORS, choose_matmuls, matmuls_in_float32
from minimind.compute.precision import DType, autocast
from minimind.compute.settings import load_settings
from minimind.datasets.batches import PackedBatch, pack
from minimind.distillation.teacher import PaddedModel, Teacher
from minimind.errors import Stopped, UserError
from minimind.evaluation.likelihood import Fork, branch_logprobs
from minimind.model.generate import generate
from minimind.model.lora import AdapterShape, add_adapter
from minimind.model.reward import RewardModel
from minimind.model.transformer import Transformer
from minimind.objectives.next_token import NextToken
from minimind.objectives.reward_model import PairwiseReward
from minimind.training.fit import FitConfig
from minimind.training.muon import Muon
from minimind.training.optimizer import Optimizer, OptimizerConfig
from tests.test_fit import (  # noqa: F401
    CONFIG,
    a_run,
    data,
    quiet_surroundings,
    train,
    weights,
)
from tests.test_generate import lively_model, random_prompts
from tests.tiny import VOCAB_SIZE, random_pairs, random_rows, tiny_model, write_rows

CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]
OPTIMIZER = {"lr": 0.01, "weight_decay": 0.01, "beta2": 0.95, "grad_clip": 1.0}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = matmuls._in_float32
    yield
    matmuls._in_float32 = before


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def calls(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """A function that ends in each operator, and its arguments."""

    def new(*shape: int) -> Tensor:
        return randn(*shape, dtype=dtype)

    def into(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Writes its result to a tensor of another shape, which PyTorch then changes."""
        return lambda *args: function(*args, out=torch.empty(0, dtype=args[0].dtype))

    def attention(*args: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*args[:3], attn_mask=args[3])

    def scaled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **named: function(*args, beta=0.5, alpha=2.0, **named)

    two, three = [new(37, 200), new(200, 51)], [new(3, 37, 200), new(3, 200, 51)]
    bias, sums, vectors = new(51), new(3, 37, 51), [new(37), new(37, 200), new(200)]
    heads = [new(2, 3, 20, 16) for _ in range(3)] + [new(20, 20)]
    return {
        "mm": (torch.mm, two),
        "mm.out": (into(torch.mm), two),
        "bmm": (torch.bmm, three),
        "bmm.out": (into(torch.bmm), three),
        "addmm": (scaled(torch.addmm), [bias, *two]),
        "addmm.out": (into(scaled(torch.addmm)), [bias, *two]),
        "addmv": (scaled(torch.addmv), vectors),
        "addmv.out": (into(torch.mv), vectors[1:]),
        "baddbmm": (scaled(torch.baddbmm), [sums, *three]),
        "baddbmm.out": (into(scaled(torch.baddbmm)), [sums, *three]),
        "_scaled_dot_product_flash_attention_for_cpu": (attention, heads),
    }


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_is_the_one_of_float32_on_the_same_values(
    operator: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    function, args = calls(dtype)[operator]
    native = function(*args)
    choose_matmuls("float32")
    found = function(*args)
    assert found.dtype == dtype
    assert torch.equal(found, function(*(arg.float() for arg in args)).to(dtype))
    if dtype == torch.bfloat16:  # float16's native sums may be of float16
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(found, native, rtol=step, atol=step)
    # What is multiplied are the wide values, and no others.
    wide = matmuls._wide
    monkeypatch.setattr(matmuls, "_wide", lambda v: 2 * wide(v) if isinstance(v, Tensor) else v)
    assert not torch.equal(function(*args), found)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_those_of_float32_on_the_same_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    def new(*shape: int) -> Tensor:
        return randn(*shape, dtype=dtype)

    functions: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
        (F.linear, [new(5, 40, 64), new(48, 64)]),
        (F.linear, [new(40, 64), new(48, 64), new(48)]),
        (torch.matmul, [new(2, 3, 9, 64), new(2, 3, 64, 7)]),
        (torch.baddbmm, [new(3, 9, 7), new(3, 9, 64), new(3, 64, 7)]),
    ]

    def results(function: Callable[..., Tensor], args: list[Tensor], seed: Tensor) -> list[Tensor]:
        leaves = [arg.clone().requires_grad_() for arg in args]
        out = function(*leaves)
        out.backward(seed.to(out.dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]

    for function, args in functions:
        seed = torch.randn_like(function(*args))
        native = results(function, args, seed)
        choose_matmuls("float32")
        found = results(function, args, seed)
        choose_matmuls("native")
        for ours, theirs in zip(found, native, strict=True):
            assert ours.dtype == dtype
            if dtype == torch.bfloat16:
                step = torch.finfo(dtype).eps
                torch.testing.assert_close(ours, theirs, rtol=step, atol=step)
        exact = results(function, [arg.double() for arg in args], seed)
        for ours, theirs in zip(found, exact, strict=True):
            step = torch.finfo(dtype).eps / 2  # rounded once, at the end
            # A bias' gradient is a sum in the type, not a product.
            step *= 8 if ours.dim() == 1 else 1
            torch.testing.assert_close(ours.double(), theirs, rtol=1.01 * step, atol=1e-4)


def test_float32_is_untouched() -> None:
    torch.manual_seed(0)

    def results() -> list[Tensor]:
        torch.manual_seed(1)
        values = [function(*args) for function, args in calls(torch.float32).values()]
        x, w = torch.randn(33, 64, requires_grad=True), torch.randn(48, 64, requires_grad=True)
        F.linear(x, w).square().sum().backward()
        return [*values, x.grad, w.grad]  # type: ignore[list-item]

    choose_matmuls("native")
    native = results()
    choose_matmuls("float32")
    for ours, theirs in zip(results(), native, strict=True):
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()


class Watch(TorchDispatchMode):
    """Every operator that gets 16-bit tensors, by name; those made of others are taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        values, _ = torch.utils._pytree.tree_flatten((args, kwargs))
        if any(isinstance(value, Tensor) and value.dtype in HALVES for value in values):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            if torch.Tag.pointwise not in func.tags:
                self.seen.add(func.name().removeprefix("aten::"))
        return func(*args, **kwargs)


# What else gets 16-bit values, element by element apart. What is neither here nor in OPERATORS
# may be a product that minimind/compute/matmuls.py has to know.
NO_PRODUCTS = {
    *("_to_copy", "_unsafe_view", "cat", "copy_", "detach", "empty_like", "expand"),
    *(
        "fill_.Scalar",
        "index.Tensor",
        "index_put_",
        "index_put",
        "linalg_vector_norm",
        "new_zeros",
        "permute",
        "select.int",
    ),
    *("slice.Tensor", "slice_backward", "split.Tensor", "stack", "t", "transpose.int"),
    *("unbind.int", "unsqueeze", "view"),
    "minimind::packed_attention",  # in float32 inside
    "minimind::packed_attention_backward",
}


def tiny_batch(tmp_path: Path, pairs: bool = False) -> PackedBatch:
    rows, kind = (random_pairs(4), "preference") if pairs else (random_rows(6), "chat")
    return pack(write_rows(tmp_path / "rows", rows, kind), np.arange(4), {})


def trained(model: nn.Module, batch: PackedBatch, dtype: DType, kind: str = "muon") -> float:
    """The loss of a training step."""
    config = OptimizerConfig.model_validate(OPTIMIZER | {"optimizer": kind, "dtype": dtype})
    optimizer = Optimizer(model.train(), config, CPU)
    objective: Any = PairwiseReward() if isinstance(model, RewardModel) else NextToken()
    with autocast(CPU, dtype):
        loss = objective(model, batch, 0.0)
    total = torch.stack([term.total for term in loss.terms.values()]).sum()
    optimizer.backward(total)
    optimizer.step(1.0)
    return float(total.detach())


def adapted() -> nn.Module:
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shape = AdapterShape.model_validate(
        {"rank": 4, "alpha": 8.0, "dropout": 0.1, "projections": projections}
    )
    return add_adapter(tiny_model(), shape, seed=1)


def recomputing() -> Transformer:
    model = tiny_model()
    model.model.recompute_layers = True
    return model


def taught(tmp_path: Path, dtype: DType) -> Tensor:
    """Scores of a teacher that is a model of transformers."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    stock = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **sizes, **heads))
    batch = tiny_batch(tmp_path)
    return Teacher(PaddedModel(stock), VOCAB_SIZE, dtype)(batch.tokens, batch.predict_at).raw_logits


WORKS: dict[str, Callable[[Path, DType], Any]] = {
    "train": lambda path, dtype: trained(tiny_model(), tiny_batch(path), dtype),
    "recompute": lambda path, dtype: trained(recomputing(), tiny_batch(path), dtype),
    "experts": lambda path, dtype: trained(tiny_model(num_experts=4), tiny_batch(path), dtype),
    "lora": lambda path, dtype: trained(adapted(), tiny_batch(path), dtype, "adamw"),
    "reward": lambda path, dtype: trained(RewardModel(tiny_model()), tiny_batch(path, True), dtype),
    "decode": lambda _, dtype: generate(
        lively_model(), random_prompts(5), max_new_tokens=9, end_id=-1, dtype=dtype
    ),
    "decode with experts": lambda _, dtype: generate(
        lively_model(num_experts=4), [[3, 4]], max_new_tokens=9, end_id=-1, dtype=dtype
    ),
    "evaluate": lambda _, dtype: branch_logprobs(
        tiny_model(), [Fork([3, 4], [[5, 6], [7]]), Fork([3], [[4, 5], [6]])], dtype
    ),
    "teacher": taught,
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("work", WORKS)
def test_no_16_bit_product_is_left(work: str, dtype: DType, tmp_path: Path) -> None:
    choose_matmuls("float32")
    with Watch() as watch:
        WORKS[work](tmp_path, dtype)
    assert "mm" in watch.seen  # there was something to see
    assert watch.seen - {*OPERATORS} - NO_PRODUCTS == set()


@pytest.mark.parametrize("work", ["train", "experts", "reward", "evaluate", "teacher", "lora"])
def test_a_whole_step_is_that_of_native_matmuls(work: str, tmp_path: Path) -> None:
    def result() -> Tensor:
        torch.manual_seed(0)
        return torch.as_tensor(WORKS[work](tmp_path, "bfloat16")).double()

    native = result()
    choose_matmuls("float32")
    torch.testing.assert_close(result(), native, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_is_as_with_native_matmuls_and_repeats_itself(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    changes = {"dtype": dtype, "optimizer": "muon"}
    monkeypatch.setenv("MINIMIND_CPU_MATMULS", "native")
    native, _ = train(tmp_path, data, **changes)
    monkeypatch.setenv("MINIMIND_CPU_MATMULS", "float32")
    forced, model = train(tmp_path, data, **changes)
    again, same = train(tmp_path, data, **changes)
    recomputed, _ = train(tmp_path, data, **changes, gradient_checkpointing=True)
    losses = [row["loss"] for row in native.rows if "loss" in row]
    assert [row["loss"] for row in forced.rows if "loss" in row] == pytest.approx(losses, rel=0.02)
    assert forced.rows == again.rows == recomputed.rows
    assert weights(model) == weights(same)


def test_a_run_says_how_it_multiplies(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = FitConfig.model_validate(CONFIG)
    for setting, types in (("native", []), ("float32", ["bfloat16", "float16"])):
        monkeypatch.setenv("MINIMIND_CPU_MATMULS", setting)
        with a_run(tmp_path, config) as run:
            assert run.computed_with()["cpu_matmuls_in_float32"] == types
    with pytest.raises(Stopped):
        train(tmp_path, data, stop_after=3)
    monkeypatch.setenv("MINIMIND_CPU_MATMULS", "native")
    train(tmp_path, data)
    said = "computed otherwise than before (cpu_matmuls_in_float32 ['bfloat16', 'float16'] -> [])"
    assert said in capfd.readouterr().err


def test_a_wrong_setting_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIMIND_CPU_MATMULS", "fast")
    with pytest.raises(UserError, match=r"MINIMIND_CPU_MATMULS is 'fast'.*'native'"):
        load_settings()


@pytest.mark.parametrize(
    ("onednn", "avx512", "avx512_bf16", "in_float32"),
    [
        ({"bf16": True, "fp16": True}, True, True, []),  # Sapphire Rapids
        ({"bf16": True, "fp16": False}, True, True, ["float16"]),  # Zen 4
        ({"bf16": True, "fp16": False}, True, False, ["bfloat16", "float16"]),  # Ice Lake
        ({"bf16": False, "fp16": False}, False, False, ["bfloat16", "float16"]),  # Zen 3, M1
        ({"bf16": True, "fp16": False}, False, False, ["float16"]),  # Graviton 3
        ({}, False, False, ["bfloat16", "float16"]),  # without oneDNN
    ],
)
def test_the_processor_is_asked(
    onednn: dict[str, bool],
    avx512: bool,
    avx512_bf16: bool,
    in_float32: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {
        f"_is_mkldnn_{name}_supported": lambda answer=answer: answer
        for name, answer in onednn.items()
    }
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**answers))
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    choose_matmuls("auto")
    assert matmuls_in_float32() == in_float32


@pytest.mark.parametrize(
    ("missing", "replaced_at"),
    [
        ([], []),
        (["float16"], ["float16"]),  # not sooner: every call of every type would take longer
        (["bfloat16", "float16"], ["start"]),
    ],
)
def test_kernels_are_replaced_when_a_type_needs_it_and_not_before(
    missing: list[str], replaced_at: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced, now = [], "start"

    def replace() -> None:
        replaced.append(now)
        monkeypatch.setattr(matmuls, "_library", object())

    monkeypatch.setattr(matmuls, "_library", None)
    monkeypatch.setattr(matmuls, "_replace_kernels", replace)
    natively = {"bf16": "bfloat16" not in missing, "fp16": "float16" not in missing}
    monkeypatch.setattr(matmuls, "_has", natively.__getitem__)
    choose_matmuls("auto")
    for dtype in get_args(DType):
        now = dtype
        with autocast(torch.device("cpu"), dtype):
            pass
    assert replaced == replaced_at


@pytest.mark.skipif(not can_compile(), reason="PyTorch's path has spaces")
def test_compiled_code_multiplies_as_eager_code_does(
    tmp_path: Path,
    data,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MINIMIND_CPU_MATMULS", "float32")
    changes = {"max_steps": 6, "log_interval": 1, "dtype": "bfloat16"}
    eager, _ = train(tmp_path, data, **changes)
    monkeypatch.setenv("MINIMIND_COMPILE", "1")
    num_operands = 0
    wide = matmuls._wide

    def counted(value: Any) -> Any:
        nonlocal num_operands
        num_operands += 1
        return wide(value)

    monkeypatch.setattr(matmuls, "_wide", counted)
    compiled, _ = train(tmp_path, data, **changes)
    # Of 14 linear layers and the head: forward, and each one's two gradients, of two operands.
    assert num_operands >= 6 * 2 * 3 * 15 * 2
    losses = [row["loss"] for row in eager.rows if "loss" in row]
    assert [row["loss"] for row in compiled.rows if "loss" in row] == pytest.approx(
        losses, rel=0.02
    )


def test_muon_orthogonalizes_in_the_type_of_the_stage() -> None:
    types = {}
    for dtype in ("float32", "bfloat16", "float16"):
        config = OptimizerConfig.model_validate(OPTIMIZER | {"optimizer": "muon", "dtype": dtype})
        muon = Optimizer(tiny_model(), config, CPU).optimizers[0]
        assert isinstance(muon, Muon)
        types[dtype] = muon.dtype
    assert types == {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.bfloat16,  # gradients may be far below float16's range
    }


def test_muons_update_in_float32_is_exact_to_it() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(24, 40), torch.randn(24, 40)
    updates = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        parameter = nn.Parameter(start.clone())
        parameter.grad = gradient.clone()
        Muon([parameter], dtype=dtype, lr=0.1, weight_decay=0.0).step()
        updates[dtype] = parameter.detach() - start
    error = (updates[torch.float32] - updates[torch.float64]).abs().max()
    coarse = (updates[torch.bfloat16] - updates[torch.float64]).abs().max()
    assert error < 1e-5 < coarse
