"""The sections of a recipe: every key, its type, its default and what it does.

Leaf names are those of Hugging Face's libraries, so their documentation explains ours. The line under a field is what
`finetune recipe explain RECIPE KEY` prints.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from finetune.recipe.section import Section

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Count = Annotated[int, Field(ge=1, le=10**9)]


def _as_tuple(value: Any) -> Any:
    """A YAML list becomes a tuple, so that a frozen section holds nothing that can change."""
    return tuple(value) if isinstance(value, list) else value


class ModelOptions(Section):
    """The base model: what is loaded and in which precision."""

    name_or_path: Annotated[str, Field(min_length=1)]
    """A local folder, or a model id of the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; pin a commit for a run that can be repeated."""
    family: str = "auto"
    """The model family's facts: `auto` (from config.json), a name from `finetune families`, or
    package.module:attribute."""
    dtype: Dtype = "auto"
    """Precision of the base weights: `auto` is bfloat16 where hardware has it, float16 on older CUDA, else float32."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Quantise the frozen base with bitsandbytes: `nf4` (4-bit with double quantisation, QLoRA) or `int8`."""
    attn_implementation: Literal[
        "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """Attention kernel: `auto` is eager for short rows on a CPU, sdpa elsewhere."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships. Leave off unless you have read that code."""


class AdapterOptions(Section):
    """What is trained: a LoRA adapter, or with `method: none` every weight of the base."""

    method: Literal["lora", "dora", "none"] = "lora"
    """`lora` (arXiv 2106.09685), `dora` (arXiv 2402.09353), or `none` for full fine-tuning."""
    r: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Rank of the LoRA matrices."""
    lora_alpha: Count = 32
    """Scale of the update: lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, as a share from 0 to 1."""
    target_modules: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    """Which linear layers get an adapter: `auto` (the family's list), `all-linear`, or a list of module names."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (arXiv 2312.03732), which keeps large r stable."""

    _tuples = field_validator("target_modules", mode="before")(_as_tuple)

    @field_validator("target_modules")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if isinstance(value, tuple) and (not value or any(not name.strip() for name in value)):
            raise ValueError("name at least one module, or write auto")
        return value


class Source(Section):
    """One place that rows come from."""

    path: Annotated[str, Field(min_length=1)]
    """A file (jsonl, json, parquet, csv; .gz allowed but for parquet), or a data set id of the Hugging Face hub."""
    format: str = "auto"
    """`auto` (by content), `messages`, `sharegpt`, `alpaca`, `prompt_completion`, `text`, or module:attribute."""
    split: str = "train"
    """Split of a hub data set; a local file has only `train`."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    name: str | None = None
    """How this source is called in reports; the path by default."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often its rows are seen in an epoch: 2.0 is twice each, 0.5 a seeded half of them."""


class DataOptions(Section):
    """The rows: where they come from and which of their tokens are trained."""

    train: tuple[Source, ...]
    """A path, or a list of sources."""
    validation: tuple[Source, ...] = ()
    """Rows whose loss is measured during training: a path, or a list of sources."""
    max_length: Count = 2048
    """Longest row in tokens."""
    on_long_row: Literal["error", "truncate", "drop"] = "error"
    """What happens to rows over max_length; whatever it is, they are counted and reported."""
    packing: bool = False
    """Put several short rows into one sequence of max_length tokens, each attending only to itself."""
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Tokens trained in chats: every assistant turn with its end-of-turn token, only the last one, or all tokens."""
    chat_template: str | None = None
    """A Jinja file to use instead of the tokenizer's own chat template."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        if isinstance(value, str | dict):
            value = [value]
        if isinstance(value, list):
            return tuple({"path": item} if isinstance(item, str) else item for item in value)
        return value

    @field_validator("train")
    @classmethod
    def _some_source(cls, value: tuple[Source, ...]) -> tuple[Source, ...]:
        if not value:
            raise ValueError("name at least one source of training rows")
        return value


class TrainingOptions(Section):
    """The optimisation. Steps are optimizer steps, each over `global_batch_size` rows."""

    method: str = "sft"
    """Training method: `sft`, or package.module:attribute."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate. LoRA wants about ten times that of full fine-tuning."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training rows; max_steps, when set, decides instead."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps."""
    global_batch_size: Count = 16
    """Rows per optimizer step over all processes: per device x accumulation x processes."""
    per_device_train_batch_size: Count | None = None
    """Rows per micro-batch on one device; by default the largest divisor of the share of one process, at most 8."""
    per_device_eval_batch_size: Count | None = None
    """Rows per validation batch on one device; as the training micro-batch by default."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "cosine"
    """How the learning rate falls."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.03
    """Steps over which the learning rate rises; below 1 it is a share of all steps."""
    optim: str = "adamw_torch"
    """Optimizer, by the name TrainingArguments gives it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the gradient's norm to this; 0 switches clipping off."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Seed of the adapter's initial weights, the row order and dropout."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: saves memory, costs a third more time. `auto` is off on a
    CPU, on elsewhere."""
    logging_steps: Count = 1
    """Write metrics every so many steps."""
    eval_steps: Count | None = None
    """Measure the validation loss every so many steps; by default once, at the end."""
    save_steps: Count | None = None
    """Write a checkpoint every so many steps; by default once, at the end of training."""
    save_total_limit: Count = 2
    """How many checkpoints are kept."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Any other argument of TRL's SFTConfig, checked against the installed class."""


class LaunchOptions(Section):
    """What the recipe runs on."""

    num_processes: Count | None = None
    """Processes, one per device; by default as many as there are accelerators, else one."""
    config: str | None = None
    """An accelerate config file; by default one of configs/accelerate that fits the hardware."""
    device: Literal["auto", "cpu", "accelerator"] = "auto"
    """`auto` uses an accelerator where there is one; `cpu` and `accelerator` insist."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which ranks that wait for another give up."""


class EvaluateOptions(Section):
    """How answers are measured, before and after training."""

    data: tuple[Source, ...] = ()
    """Held-out rows: a path, or a list of sources. Must not be trained on."""
    scorer: str = "exact_match"
    """How an answer is scored: a name from finetune/scorers, or package.module:attribute."""
    max_new_tokens: Count = 256
    """Longest answer in tokens."""
    batch_size: Count = 32
    """Rows answered at once."""
    limit: Count | None = None
    """Use only the first so many rows."""

    _sources = field_validator("data", mode="before")(DataOptions._sources.__func__)  # type: ignore[attr-defined]


class ExportOptions(Section):
    """What `finetune merge` writes."""

    dtype: Dtype = "auto"
    """Precision of merged weights: `auto` keeps the base's."""
    max_shard_size: Annotated[str, Field(pattern=r"^\d+(\.\d+)?(MB|GB)$")] = "5GB"
    """Largest weight file, as 500MB or 5GB."""


class TrackingOptions(Section):
    """Where metrics are mirrored. metrics.jsonl in the run folder is always the truth."""

    trackers: tuple[str, ...] = ()
    """Any of `wandb`, `tensorboard`, `trackio`, or package.module:attribute."""
    project: str = "finetune"
    """Project name for the trackers."""
    run_name: str | None = None
    """Run name for the trackers; the output folder's name by default."""
    mode: Literal["offline", "online"] = "offline"
    """`offline` keeps everything on this machine; `online` lets a tracker talk to its server."""

    _tuples = field_validator("trackers", mode="before")(_as_tuple)


class Recipe(Section):
    """One file, one run."""

    model: ModelOptions
    adapter: AdapterOptions = Field(default_factory=AdapterOptions)
    data: DataOptions
    training: TrainingOptions = Field(default_factory=TrainingOptions)
    launch: LaunchOptions = Field(default_factory=LaunchOptions)
    evaluate: EvaluateOptions = Field(default_factory=EvaluateOptions)
    export: ExportOptions = Field(default_factory=ExportOptions)
    tracking: TrackingOptions = Field(default_factory=TrackingOptions)
    output_dir: Annotated[str, Field(min_length=1)]
    """The run folder."""
