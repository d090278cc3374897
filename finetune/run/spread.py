"""Weights of which each process holds a part (ZeRO-3, FSDP2): laid out, brought together, looked at.

Everything here is collective: all processes of the run call it with the same parameters in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from finetune.errors import RefusedError
from finetune.families.family import Family

_NARROW = (torch.bfloat16, torch.float16)


def partition(model: nn.Module, config: dict[str, Any], widen: bool) -> None:
    """Lay the weights of a whole model over the processes as ZeRO-3 does, one by one, before anything moves it.

    Left to itself DeepSpeed would first move the whole model to each device.

    Args:
        model: the same on all processes; each of its weights is taken from rank 0.
        config: DeepSpeed's configuration, with nothing left open.
        widen: whether 16-bit weights become float32, each just before its parts are laid down.
    """
    import deepspeed

    def one_by_one(recurse: bool = True) -> Iterator[nn.Parameter]:
        for parameter in type(model).parameters(model, recurse):
            _widen(parameter)
            yield parameter

    if widen:
        model.parameters = one_by_one  # what DeepSpeed asks for them
    try:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    finally:
        vars(model).pop("parameters", None)


@contextmanager
def widened_as_sharded(model: nn.Module) -> Iterator[None]:
    """Have 16-bit weights become float32 as FSDP2 shards them, a layer at a time, inside the `with`.

    accelerate would widen what is trained before, all of it at once on every process. So these weights seem frozen to
    it until their layer is sharded.

    Args:
        model: the whole model, on all processes.
    """
    import accelerate.accelerator as accelerator
    import torch.distributed.fsdp as fsdp

    prepare, shard = accelerator.fsdp2_prepare_model, fsdp.fully_shard
    trained: set[int] = set()

    def prepared(*given: Any) -> Any:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype in _NARROW:
                trained.add(id(parameter))
                parameter.requires_grad_(False)
        return prepare(*given)

    def sharded(module: Any, **named: Any) -> Any:
        for one in module if isinstance(module, list | tuple) else [module]:
            for parameter in one.parameters():
                if not isinstance(parameter, DTensor):
                    _widen(parameter)
                    parameter.requires_grad_(parameter.requires_grad or id(parameter) in trained)
        return shard(module, **named)

    accelerator.fsdp2_prepare_model, fsdp.fully_shard = prepared, sharded
    try:
        yield
    finally:
        accelerator.fsdp2_prepare_model, fsdp.fully_shard = prepare, shard


def _widen(parameter: nn.Parameter) -> None:
    if parameter.dtype in _NARROW:
        parameter.data = parameter.data.float()


@contextmanager
def whole_weights_loaded(arguments: TrainingArguments) -> Iterator[None]:
    """Have transformers load whole models while the block runs, also where ZeRO-3 is on.

    It would partition weights while it builds the model, in float32 whatever they are, and every check of the base and
    of the adapter would look at empty tensors. The trainer partitions them once they are checked.
    """
    config = getattr(arguments, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def name_layers(model: nn.Module, family: Family | None, arguments: TrainingArguments) -> None:
    """Tell FSDP and ZeRO-3 which classes of this model they must take whole.

    FSDP wraps the layers that transformers names, or else those that the family does. ZeRO-3 must gather a block of
    routed experts at once where each expert is a module of its own, for which of them run differs between ranks;
    experts in one parameter are gathered at once anyway.
    """
    plugin = getattr(arguments, "fsdp_plugin_args", None) or {}
    if plugin and family and not getattr(model, "_no_split_modules", None):
        there = {type(module).__name__ for module in model.modules()}
        plugin.setdefault("transformer_cls_names_to_wrap", ",".join(one for one in family.layers if one in there))
    zero = getattr(arguments, "hf_deepspeed_config", None)
    known = family.moe_blocks if family else ()
    if zero is not None and zero.is_zero3() and (apart := blocks_of_experts(model, known)):
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, apart)


def blocks_of_experts(model: nn.Module, known: Sequence[str] = ()) -> list[type[nn.Module]]:
    """Classes of blocks whose routed experts are modules in a list; today models with code of their own have them.

    Args:
        model: with its adapter.
        known: names of the family's blocks of experts.
    """
    found: dict[type[nn.Module], None] = {}
    for module in model.modules():
        own = isinstance(getattr(module, "experts", None), nn.ModuleList)
        if own or (type(module).__name__ in known and any(isinstance(one, nn.ModuleList) for one in module.modules())):
            found[type(module)] = None
    return list(found)


@contextmanager
def together(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Whole weights on every process while the block runs; what is written to them is lost."""
    if any(hasattr(one, "ds_tensor") for one in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters([one for one in parameters if hasattr(one, "ds_tensor")]):
            yield [one.detach() for one in parameters]
        return
    yield [one.full_tensor().detach() if isinstance(one, DTensor) else one.detach() for one in parameters]


@contextmanager
def all_or_none(device: torch.device) -> Iterator[None]:
    """A block that ends well on every process or on none.

    Args:
        device: of the flag that they exchange.

    Raises:
        BaseException: what the block raised here.
        RefusedError: it failed on another process, which says why.
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if dist.is_initialized() and dist.get_world_size() > 1:
        bad = torch.tensor([float(failure is not None)], device=device)
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad.item() and failure is None:
            raise RefusedError("another process of this run could not take up its part of the checkpoint; it says why")
    if failure is not None:
        raise failure


def whole_weights(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Copies of whole weights in the host's memory, brought together one at a time.

    Args:
        named: names and weights, the same on all processes.
        keep: whether this process wants them; the others only take part.

    Returns:
        By name; empty where `keep` is false.
    """
    found: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for name, parameter in named:
        if (known := first.setdefault(id(parameter), name)) != name:  # a tied weight stays one tensor
            if keep:
                found[name] = found[known]
            continue
        with together([parameter]) as (whole,):
            if keep:
                found[name] = whole.to("cpu", copy=True)
    return found
