"""Remedies for defects of other packages, each with its versions and a test that fails once it is not needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def keep_4bit_unpacked(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on a CPU.

    bitsandbytes 0.50.2, on CPUs with AVX512-BF16: the first forward in eval mode rewrites a Linear4bit's weight into
    another layout, in place. A forward in training mode, or a dequantisation, then reads it in the old layout: one
    validation, and the rest of the training sees random weights without a word.

    Remove when tests/test_compat.py::test_bitsandbytes_still_repacks_in_eval_mode fails.

    Args:
        model: a model with bitsandbytes' Linear4bit layers, or none.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def flatten_8bit_inputs(model: Any) -> None:
    """Let bitsandbytes' 8-bit layers take inputs of more than three dimensions, as latent attention gives them.

    bitsandbytes 0.50.2 flattens inputs of exactly three dimensions before it quantises them by rows; its kernel for
    CPUs takes the second dimension of others for the rows, and raises a RuntimeError about sizes in eval mode.

    Remove when tests/test_compat.py::test_bitsandbytes_still_takes_no_four_dimensions_in_8_bits fails.

    Args:
        model: a model with bitsandbytes' Linear8bitLt layers, or none.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_pre_hook(_flatten)
            module.register_forward_hook(_unflatten)


def _flatten(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    (x,) = inputs
    module.leading_shape = x.shape[:-1]
    return (x.flatten(0, -2),) if x.dim() > 3 else inputs


def _unflatten(module: Any, inputs: tuple[Any, ...], output: Any) -> Any:
    return output.unflatten(0, module.leading_shape) if len(module.leading_shape) > 2 else output


@contextmanager
def fp8_blocks_of(facts: Mapping[str, Any]) -> Iterator[None]:
    """Have transformers dequantise FP8 weights by the blocks that they were quantised in, inside the `with`.

    transformers 5.23 takes the size of a block from the number of scales. Where the last block of a row or column is a
    short one that is another size: 576 rows in blocks of 128 (DeepSeek-V3's kv_a_proj_with_mqa) raise a ValueError, and
    192 rows are read with other rows' scales without a word.

    Remove when tests/test_compat.py::test_transformers_still_takes_fp8_blocks_from_the_number_of_scales fails.

    Args:
        facts: `quantization_config` of config.json.
    """
    import torch
    from torch.nn.functional import pad
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    block = tuple(facts.get("weight_block_size") or ())
    stock = Fp8Dequantize._dequantize_one

    def whole_blocks(self: Any, quantized: Any, scales: Any, output_dtype: Any = None) -> Any:
        grid, shape = tuple(scales.shape[-2:]), tuple(quantized.shape[-2:])
        full = tuple(count * size for count, size in zip(grid, block, strict=False))
        short = len(full) == 2 and tuple(-(-size // one) for size, one in zip(shape, block, strict=True)) == grid
        if not short or full == shape or not quantized.is_floating_point():
            return stock(self, quantized, scales, output_dtype)
        as_bytes = pad(quantized.view(torch.uint8), (0, full[1] - shape[1], 0, full[0] - shape[0]))
        return stock(self, as_bytes.view(quantized.dtype), scales, output_dtype)[..., : shape[0], : shape[1]]

    Fp8Dequantize._dequantize_one = whole_blocks
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = stock


@contextmanager
def adapter_names_kept() -> Iterator[None]:
    """Have PEFT take an adapter's matrices by the names that they were saved by, inside the `with`.

    peft 0.21.2 takes what it finds in an adapter through the rules by which transformers 5.23 renames the weights of a
    base's files, though matrices are saved by their names in memory. A rule that such a name fits as well renames it
    once more: `experts.` of Mistral Large 4 becomes `mlp.experts.` and from there `mlp.mlp.experts.`, and Laguna's
    `shared_experts` fit the rule for `shared_expert.`, whose dot is any letter. Such matrices start afresh with nothing
    but a warning. Adapters with other names than the model's go through PEFT's rules as before.

    Remove when tests/test_compat.py::test_peft_still_renames_matrices_that_have_their_names_already fails.
    """
    import peft.utils.transformers_weight_conversion as conversion
    from peft import get_peft_model_state_dict

    stock = conversion.convert_peft_adapter_state_dict_for_transformers

    def kept(
        model: Any, peft_config: Any, adapter_state_dict: dict[str, Any], adapter_name: str = "default"
    ) -> dict[str, Any]:
        own = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        if {name for name in adapter_state_dict if ".lora_" in name} <= own.keys():
            return adapter_state_dict
        renamed: dict[str, Any] = stock(model, peft_config, adapter_state_dict, adapter_name)
        return renamed

    conversion.convert_peft_adapter_state_dict_for_transformers = kept
    try:
        yield
    finally:
        conversion.convert_peft_adapter_state_dict_for_transformers = stock


def without_shared_memory_op() -> None:
    """Stop DeepSpeed from compiling an operation for several processes on a CPU.

    DeepSpeed 0.19.8 compiles `deepspeed_shm_comm` when it joins a process group on a CPU: 46 to 80 seconds at the first
    run, a fatal error without ninja or a compiler, and where a compilation was killed, every later run waits for its
    lock for ever without a word. gloo does the same work.

    Remove when tests/test_compat.py::test_deepspeed_still_compiles_to_join_a_group_on_a_cpu fails.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def lay_out_buckets_once(wrapped: Any) -> None:
    """Have DDP lay gradients out in the buckets it keeps before the first step, not after it.

    torch 2.13 sums the gradients of the first step in one bucket, in the order of the parameters, and lays them out
    anew for the second, in the order in which they came. Where a number lies decides in which order more than two
    processes add it up, so that a run that is resumed rounds its first step otherwise than the undisturbed run. The
    gradients of the last weights come first; laid out in that order from the start, buckets leave as early as before.

    Remove when tests/test_compat.py::test_ddp_still_lays_its_buckets_out_anew_after_the_first_step fails.

    Args:
        wrapped: the model as the trainer wrapped it, before its first step; any other than DDP's is left as it is.
    """
    from torch.nn.parallel import DistributedDataParallel

    ddp = getattr(wrapped, "_orig_mod", wrapped)  # what torch.compile has wrapped
    if not isinstance(ddp, DistributedDataParallel) or ddp._use_python_reducer:
        return
    parameters, are_sparse = ddp._build_params_for_reducer()
    parameters, are_sparse = parameters[::-1], are_sparse[::-1]
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, are_sparse, names, ddp.static_graph)
    ddp.reducer._push_all_rebuilt_params()
    ddp.reducer._rebuild_buckets()
