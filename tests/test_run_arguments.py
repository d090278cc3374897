"""Recipe keys become trainer arguments: every one of them arrives, and nothing arrives unseen."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import SFTConfig

from finetune.errors import RecipeError
from finetune.recipe.foreign import table
from finetune.recipe.sections import LaunchOptions, TrainingOptions
from finetune.recipe.unknown import owned_by_recipe
from finetune.run.arguments import (
    _WITHOUT_EFFECT,
    check_extra,
    check_optim,
    trainer_arguments,
)
from finetune.run.batch import LARGEST_DEFAULT_MICRO_BATCH, BatchShape, batch_shape


def arguments(
    launch: dict[str, Any] | None = None,
    compute: str = "float32",
    device: str = "cpu",
    validates: bool = True,
    processes: int = 1,
    **training: Any,
) -> SFTConfig:
    options = TrainingOptions(**training)
    shape = batch_shape(options, processes)
    return trainer_arguments(
        options, LaunchOptions(**launch or {}), shape, Path("checkpoints"), compute, device, validates
    )


# Each key of the section, a value that is not its default, and what it makes of the trainer's arguments. Those that
# are None go elsewhere: the method chooses the trainer, and the saver is told what a failed save does.
KEYS: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "method": ("my_package.mine:METHOD", None),
    "learning_rate": (0.5, {"learning_rate": 0.5}),
    "num_train_epochs": (2.5, {"num_train_epochs": 2.5}),
    "max_steps": (7, {"max_steps": 7}),
    "global_batch_size": (24, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}),
    "per_device_train_batch_size": (2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}),
    "per_device_eval_batch_size": (3, {"per_device_eval_batch_size": 3}),
    "lr_scheduler_type": ("linear", {"lr_scheduler_type": "linear"}),
    "warmup_steps": (5.0, {"warmup_steps": 5.0}),
    "optim": ("adafactor", {"optim": "adafactor"}),
    "weight_decay": (0.1, {"weight_decay": 0.1}),
    "max_grad_norm": (0.0, {"max_grad_norm": 0.0}),
    "seed": (7, {"seed": 7}),
    "activation_checkpointing": (True, {"activation_checkpointing": True}),
    "logging_steps": (5, {"logging_steps": 5}),
    "eval_steps": (3, {"eval_steps": 3, "eval_strategy": "steps"}),
    "save_steps": (11, {"save_steps": 11}),
    "save_total_limit": (9, {"save_total_limit": 9}),
    "on_save_error": ("continue", None),
    "extra": ({"adam_beta1": 0.5, "dataloader_num_workers": 0}, {"adam_beta1": 0.5}),
}


def test_no_key_is_without_a_line() -> None:
    assert KEYS.keys() == TrainingOptions.model_fields.keys()


@pytest.mark.parametrize("key", [key for key, (_, expected) in KEYS.items() if expected])
def test_every_key_arrives(key: str) -> None:
    value, expected = KEYS[key]
    assert expected
    default, made = arguments(), arguments(**{key: value})
    for name, wanted in expected.items():
        found = getattr(made, name)
        assert getattr(found, "value", found) == wanted
        if name != "per_device_train_batch_size" or key == "per_device_train_batch_size":
            assert getattr(default, name) != getattr(made, name)


def test_the_launch_section_arrives() -> None:
    assert arguments({"timeout": 12.5}).ddp_timeout == 13
    assert arguments({"timeout": 2.5}).ddp_timeout == 3


@pytest.mark.parametrize(
    ("compute", "bf16", "fp16"), [("float32", False, False), ("bfloat16", True, False), ("float16", False, True)]
)
def test_the_precision_is_the_one_given(compute: str, bf16: bool, fp16: bool) -> None:
    made = arguments(compute=compute)
    assert (made.bf16, made.fp16) == (bf16, fp16)
    assert made.use_cpu


@pytest.mark.parametrize(("key", "expected"), [("auto", False), (True, True), (False, False)])
def test_activation_checkpointing_is_off_on_a_cpu_unless_asked_for(key: Any, expected: bool) -> None:
    made = arguments(activation_checkpointing=key)
    assert made.activation_checkpointing is expected


def test_a_share_of_warm_up_is_taken_of_all_steps() -> None:
    assert arguments(warmup_steps=0.1).get_warmup_steps(200) == 20
    assert arguments(warmup_steps=5.0).get_warmup_steps(200) == 5
    assert arguments(warmup_steps=0.0).get_warmup_steps(200) == 0


def test_what_upstream_would_decide_otherwise_is_stated() -> None:
    made = arguments()
    assert made.report_to == []
    assert made.max_length is None
    assert made.packing is False
    assert made.logging_nan_inf_filter is False
    assert made.remove_unused_columns is False
    assert made.dataset_kwargs == {"skip_prepare_dataset": True}
    assert made.save_steps == 10**9  # only the last step is saved
    assert made.eval_strategy.value == "no"  # validation happens once, at the end
    assert made.output_dir == "checkpoints"
    assert made.push_to_hub is False


@pytest.mark.parametrize("key", ["eval_steps", "per_device_eval_batch_size"])
def test_a_key_that_would_do_nothing_is_refused(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"training\.{key}: does nothing without data\.validation"):
        arguments(validates=False, **{key: 2})
    assert arguments(validates=False).eval_strategy.value == "no"


# -- extra ---------------------------------------------------------------------------------------------------------

FIELDS = [field.name for field in dataclasses.fields(SFTConfig) if field.init]
ALLOWED = [name for name in FIELDS if owned_by_recipe(name) is None and name not in _WITHOUT_EFFECT]


def test_every_argument_of_sftconfig_is_allowed_owned_or_refused() -> None:
    assert set(FIELDS) >= _WITHOUT_EFFECT
    assert not [name for name in _WITHOUT_EFFECT if owned_by_recipe(name)]  # no name is refused twice
    assert len(ALLOWED) >= 25
    # Nothing that is stated from the recipe can be overridden beside it, but these, of which any value is right.
    free = {"logging_first_step", "log_level", "ddp_find_unused_parameters", "dataloader_pin_memory",
            "include_num_input_tokens_seen"}  # fmt: skip
    source = Path(__import__("finetune.run.arguments", fromlist=["x"]).__file__).read_text()
    stated = {name for name in FIELDS if f'        "{name}": ' in source}
    assert len(stated) >= 35
    assert stated & set(ALLOWED) == free


VALUES = {
    "adam_beta2": 0.5, "adam_epsilon": 1e-5, "dataloader_num_workers": 1, "neftune_noise_alpha": 5.0,
    "lr_scheduler_kwargs": {"num_cycles": 2}, "logging_first_step": False, "eval_delay": 1,
    "debug": "underflow_overflow", "torch_empty_cache_steps": 3, "optim_args": "a=1",
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_an_extra_argument_arrives(name: str) -> None:
    before, after = getattr(arguments(), name), getattr(arguments(extra={name: VALUES[name]}), name)
    assert before != after


def test_unknown_extra_arguments_are_all_named_with_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        arguments(
            extra={
                "adam_beta_1": 0.5,
                "qqqq": 1,
                "adam_beta1": 0.5,
                "length_column_name": "n",
                "train_sampling_strategy": "sequential",
                "log_level_replica": "loud",
                "dataloader_multiprocessing_context": None,
            }
        )
    lines = str(caught.value).splitlines()
    ignored = "has no effect, or a wrong one, on this trainer's batches, loss and files"
    assert lines == [
        "training.extra.adam_beta_1: SFTConfig has no such argument; did you mean adam_beta1?",
        "training.extra.qqqq: SFTConfig has no such argument",
        f"training.extra.length_column_name: {ignored}",
        f"training.extra.train_sampling_strategy: {ignored}",
        "training.extra.log_level_replica: 'loud' is none of detail, debug, info, warning, error, critical, passive",
    ]


@given(st.dictionaries(st.text(max_size=12), st.integers(), min_size=1, max_size=4))
def test_no_made_up_name_passes(extra: dict[str, int]) -> None:
    if not set(extra) & set(FIELDS):
        with pytest.raises(RecipeError, match="SFTConfig has no such argument") as caught:
            check_extra(extra)
        assert str(caught.value).count("SFTConfig has no such argument") == len(extra)


@pytest.mark.parametrize(
    "extra",
    [
        {"ignore_data_skip": True},
        {"enable_jit_checkpoint": True},
        {"restore_callback_states_from_checkpoint": True},
        {"dataloader_num_workers": 2, "dataloader_in_order": False},
    ],
)
def test_what_would_make_a_run_that_is_continued_another_one_is_refused(extra: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"has no effect, or a wrong one, on this trainer's batches"):
        arguments(extra=extra)


@pytest.mark.parametrize("extra", [{"dataloader_prefetch_factor": 2}, {"lr_scheduler_kwargs": "{broken"}])
def test_what_the_trainer_refuses_is_a_recipe_error(extra: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"training, or training\.extra: refused by the trainer: "):
        arguments(extra=extra)


@pytest.mark.parametrize(
    ("name", "said"), [("adamw_torhc", "did you mean adamw_torch"), ("?", "known are adamw_torch")]
)
def test_an_unknown_optimizer_is_refused(name: str, said: str) -> None:
    with pytest.raises(RecipeError, match=rf"training\.optim: .*{said}"):
        arguments(optim=name)
    check_optim("adamw_torch")


# -- batches -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 16), st.none() | st.integers(1, 64))
def test_a_step_has_exactly_the_rows_asked_for_or_is_refused(total: int, processes: int, micro: int | None) -> None:
    options = TrainingOptions(global_batch_size=total, per_device_train_batch_size=micro)
    share, rest = divmod(total, processes)
    if rest or (micro is not None and share % micro):
        with pytest.raises(RecipeError, match=r"training\.(global_batch_size|per_device_train_batch_size): "):
            batch_shape(options, processes)
        return
    shape = batch_shape(options, processes)
    assert shape.per_device * shape.accumulation * shape.processes == total
    assert shape.processes == processes
    if micro is not None:
        assert shape.per_device == micro
    else:
        assert shape.per_device <= LARGEST_DEFAULT_MICRO_BATCH
        larger = range(shape.per_device + 1, LARGEST_DEFAULT_MICRO_BATCH + 1)
        assert not [size for size in larger if share % size == 0]


def test_a_refused_batch_says_what_would_do() -> None:
    with pytest.raises(RecipeError, match="16 rows cannot be shared evenly by 3 processes; choose a multiple of 3"):
        batch_shape(TrainingOptions(global_batch_size=16), 3)
    with pytest.raises(RecipeError, match="5 does not divide the 8 rows that one of 2 processes has"):
        batch_shape(TrainingOptions(global_batch_size=16, per_device_train_batch_size=5), 2)


def test_a_shape_shows_its_arithmetic() -> None:
    assert str(BatchShape(2, 4, 1)) == "2 per device x 4 accumulated x 1 process = 8 rows a step"
    assert BatchShape(2, 4, 1).told("sequences").endswith(" = 8 sequences a step")
    assert str(BatchShape(2, 4, 3)) == "2 per device x 4 accumulated x 3 processes = 24 rows a step"


def test_no_name_of_another_tool_is_answered_with_an_argument_that_is_refused() -> None:
    for row in table().values():
        if row.key.startswith("training.extra."):
            with contextlib.suppress(RecipeError):
                check_extra({row.key.rsplit(".", 1)[-1]: None})
                continue
            pytest.fail(f"{row.name}: {row.key}")
