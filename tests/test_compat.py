"""Each remedy is still needed, and works."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from finetune.compat import flatten_8bit_inputs, fp8_blocks_of, keep_4bit_unpacked, lay_out_buckets_once

bnb = pytest.importorskip("bitsandbytes", reason="the quant extra is not installed")


def quantised() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(128, 128, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(128, 128), requires_grad=False, quant_type="nf4")
    return torch.nn.Sequential(layer).to("cpu")


def before_and_after_eval(model: torch.nn.Sequential) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 128, dtype=torch.bfloat16)
    model.train()
    before = model(x.clone().requires_grad_()).detach().clone()
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    return before, model(x.clone().requires_grad_()).detach()


def repacks() -> bool:
    return bool(quantised()[0].support_avx512bf16_for_cpu)


@pytest.mark.skipif(not repacks(), reason="this CPU has no AVX512-BF16, so bitsandbytes does not repack")
def test_bitsandbytes_still_repacks_in_eval_mode() -> None:
    try:
        before, after = before_and_after_eval(quantised())
    except (AssertionError, RuntimeError):
        return  # refusing to go on is the other form of the defect
    assert not torch.equal(before, after)


def test_training_after_an_evaluation_sees_the_same_weights() -> None:
    model = copy.deepcopy(quantised())
    keep_4bit_unpacked(model)
    before, after = before_and_after_eval(model)
    assert torch.equal(before, after)


def eight_bits() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(torch.randn(48, 64), requires_grad=False, has_fp16_weights=False)
    return torch.nn.Sequential(layer).to("cpu").eval()  # training on a CPU goes another way


def test_bitsandbytes_still_takes_no_four_dimensions_in_8_bits() -> None:
    with pytest.raises(RuntimeError, match="size"):
        eight_bits()(torch.randn(2, 5, 3, 64))


@pytest.mark.parametrize("shape", [(7, 64), (2, 7, 64), (2, 5, 3, 64), (1, 1, 1, 1, 64)])
def test_8_bit_layers_take_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    model = eight_bits()
    flatten_8bit_inputs(model)
    x = torch.randn(shape, requires_grad=True)
    found = model(x)
    expected = eight_bits()(x.reshape(-1, 64))
    torch.testing.assert_close(found, expected.view(*shape[:-1], 48))
    model.train()(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_peft_still_leaves_lora_on_parameters_that_are_parametrised_already() -> None:
    """Why experts in 4 bits are not bitsandbytes' `replace_parameter_4bit` (finetune/model/quantise_experts.py)."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from peft import LoraConfig, get_peft_model

    class Experts(torch.nn.Module):
        """Two matrices in one parameter."""

        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.Parameter(torch.randn(2, 64, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Both, one after the other."""
            return x @ self.weights[0] @ self.weights[1]

    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("experts", Experts())
    replace_parameter_4bit(model.experts, "weights", quant_type="nf4")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.weights"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    x = torch.randn(3, 64)
    with torch.no_grad():
        first, second = wrapped(x), wrapped(x)
    assert not torch.allclose(first, second)


def test_peft_still_renames_matrices_that_have_their_names_already(tmp_path: Path) -> None:
    """Why `adapter_names_kept` is there. Once PEFT keeps them, `never` of families/laguna.py can do without layers."""
    import warnings

    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

    from finetune.compat import adapter_names_kept
    from finetune.families import match
    from finetune.model.quantise_lora import lost_by_peft
    from finetune.model.twin import family_twin

    family = match("auto", "laguna")
    assert family is not None
    config = LoraConfig(r=2, target_modules=["q_proj", "shared_experts.up_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(family_twin(family), config)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.normal_()
        wrapped.save_pretrained(str(tmp_path))
        plain = PeftModel.from_pretrained(family_twin(family), str(tmp_path))
        with adapter_names_kept():
            again = PeftModel.from_pretrained(family_twin(family), str(tmp_path))
    saved = get_peft_model_state_dict(wrapped)
    opened = get_peft_model_state_dict(plain)
    lost = sorted(
        name.removeprefix("base_model.model.") for name in saved if not torch.equal(saved[name], opened[name])
    )
    assert len(lost) == 2
    assert lost == lost_by_peft(wrapped)
    found = get_peft_model_state_dict(again)
    assert all(torch.equal(saved[name], found[name]) for name in saved)


def test_deepspeed_still_compiles_to_join_a_group_on_a_cpu() -> None:
    """Why `without_shared_memory_op` is there."""
    import importlib
    import inspect

    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    from finetune.compat import without_shared_memory_op

    assert "build_shm_op()" in inspect.getsource(importlib.import_module("deepspeed.comm.torch").TorchBackend)
    before = dict(deepspeed.ops.__compatible_ops__)
    assert ShareMemCommBuilder.NAME in before
    try:
        without_shared_memory_op()
        assert not deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME]
    finally:
        deepspeed.ops.__compatible_ops__.update(before)


def fp8(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ones in FP8, and scales by blocks of 32: the number of each block of rows, from 1."""
    blocks = -(-rows // 32)
    scales = torch.arange(1.0, blocks + 1)[:, None].repeat(1, 2)
    return torch.ones(rows, 64).to(torch.float8_e4m3fn), scales


def test_transformers_still_takes_fp8_blocks_from_the_number_of_scales() -> None:
    stock = Fp8Dequantize(None)
    wrong = stock._dequantize_one(*fp8(48), torch.float32)
    assert wrong[24, 0] == 2, "row 24 of 48 is in the first block of 32"
    with pytest.raises(ValueError, match="not divisible by scale grid"):
        stock._dequantize_one(*fp8(65), torch.float32)


@pytest.mark.parametrize("rows", [32, 48, 64, 65, 127])
def test_fp8_weights_are_read_by_the_blocks_of_their_config(rows: int) -> None:
    stock = Fp8Dequantize._dequantize_one
    with fp8_blocks_of({"weight_block_size": [32, 32]}):
        found = Fp8Dequantize(None)._dequantize_one(*fp8(rows), torch.float32)
    assert Fp8Dequantize._dequantize_one is stock
    assert found.shape == (rows, 64)
    assert found[:, 0].tolist() == [1 + row // 32 for row in range(rows)]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def laid_out(settled: bool) -> list[list[list[str]]]:
    """Which gradients lie in each bucket of DDP, and in which order, in each of three steps."""
    layers = [torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Tanh()) for _ in range(4)]
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(*layers))
    if settled:
        lay_out_buckets_once(ddp)
    names = {id(parameter): name for name, parameter in ddp.module.named_parameters()}
    steps: list[list[list[str]]] = []

    def seen(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        steps[-1].append([names[id(parameter)] for parameter in bucket.parameters()])
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    kinds = {"bucket": torch.distributed.GradBucket, "return": torch.futures.Future[torch.Tensor]}
    seen.__annotations__.update(kinds)  # torch compares them, and these are text here
    ddp.register_comm_hook(None, seen)
    for _ in range(3):
        steps.append([])
        ddp.zero_grad()
        ddp(torch.ones(2, 300)).sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in ddp.parameters())
    return steps


def test_ddp_still_lays_its_buckets_out_anew_after_the_first_step(group: None) -> None:
    first, second, third = laid_out(settled=False)
    assert first != second
    assert second == third


def test_ddps_buckets_are_from_the_first_step_on_what_they_would_become(group: None) -> None:
    first, second, third = laid_out(settled=True)
    assert first == second == third
    assert len(first) == 2
    assert [name for bucket in first for name in bucket][:2] == ["3.0.bias", "3.0.weight"], "the last come first"
    assert first == laid_out(settled=False)[-1]
