"""What other tools call the things a recipe says: the names of Axolotl, LLaMA-Factory, TRL, Unsloth and others.

A name of another tool in a recipe is answered with ours, and with the value where that differs too. To teach the
table a name, add a row: name, tools, our key (empty when there is none), and what else there is to say.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

TOOLS = {
    "A": "Axolotl",
    "H": "alignment-handbook",
    "L": "LLaMA-Factory",
    "P": "PEFT",
    "S": "ms-swift",
    "T": "TRL",
    "U": "Unsloth",
    "t": "torchtune",
}


@dataclass(frozen=True, slots=True)
class ForeignName:
    """One name as other tools spell it, and what a recipe says instead."""

    name: str
    tools: tuple[str, ...]
    key: str
    """Our dotted key; `training.extra.NAME` where it is passed on to TRL; empty where nothing corresponds."""
    hint: str
    """What to write, or why there is no such key; a sentence without its full stop."""

    def answer(self) -> str:
        """What to do instead, as the end of an error line."""
        here = f"here {self.key}" if self.key else "there is no such key here"
        return f"a name of {_listed(self.tools)}; {here}{f': {self.hint}' if self.hint else ''}"


def foreign(name: str) -> ForeignName | None:
    """The row of a name, whatever its case and with dashes read as underscores."""
    return table().get(name.strip().lower().replace("-", "_"))


@functools.cache
def table() -> dict[str, ForeignName]:
    """All rows by name."""
    rows = [ForeignName(name, tuple(TOOLS[tool] for tool in tools), key, hint) for name, tools, key, hint in _ROWS]
    found = {row.name: row for row in rows}
    assert len(found) == len(rows), "a name has two rows"
    return found


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


_BATCH = "training.global_batch_size"
_MICRO = "training.per_device_train_batch_size"
_EXTRA = "training.extra"
_DERIVED = "it is derived: training.global_batch_size / (rows per device x processes); state training.global_batch_size"
_PRECISION = "compute in the precision of model.dtype: bfloat16, float16 or float32; auto chooses by the hardware"
_LAUNCH = "say how processes are launched in an accelerate config file and name it in launch.config"
_PREPARED = "rows are tokenised before the trainer starts, so it has nothing to do"
_HUB = "nothing is uploaded by a run; upload the adapter folder of the run afterwards"
_TURNS = "the model's own chat template is used; for another give a Jinja file"
_FULL = "none for full fine-tuning, else lora or dora"
_LONGER = "embeddings are made longer by themselves where model.new_tokens needs it"

_ROWS: tuple[tuple[str, str, str, str], ...] = (
    # model
    ("base_model", "A", "model.name_or_path", ""),
    ("model", "S", "model.name_or_path", ""),
    ("model_name_or_path", "LT", "model.name_or_path", ""),
    ("model_name", "UT", "model.name_or_path", ""),
    ("model_id", "S", "model.name_or_path", ""),
    ("model_path", "LS", "model.name_or_path", ""),
    ("model_id_or_path", "S", "model.name_or_path", ""),
    ("base_model_config", "A", "", "the configuration is read from the folder of model.name_or_path"),
    ("tokenizer_config", "A", "", "the tokenizer is read from the folder of model.name_or_path"),
    ("model_revision", "LST", "model.revision", ""),
    ("revision_of_model", "A", "model.revision", ""),
    ("model_type", "AS", "model.family", "auto reads it from config.json"),
    ("torch_dtype", "AST", "model.dtype", "auto, bfloat16, float16 or float32"),
    ("bf16", "ALT", "model.dtype", _PRECISION),
    ("fp16", "ALT", "model.dtype", _PRECISION),
    ("float16", "A", "model.dtype", _PRECISION),
    ("bfloat16", "A", "model.dtype", _PRECISION),
    ("pure_bf16", "L", "model.dtype", "bfloat16, with adapter.method: none"),
    ("bf16_full_eval", "T", "model.dtype", _PRECISION),
    ("fp16_full_eval", "T", "model.dtype", _PRECISION),
    ("load_in_4bit", "ATU", "model.quantization", "nf4"),
    ("load_in_8bit", "ATU", "model.quantization", "int8"),
    ("quantization_bit", "L", "model.quantization", "nf4 for 4, int8 for 8"),
    ("quant_bits", "S", "model.quantization", "nf4 for 4, int8 for 8"),
    ("quantization_method", "L", "model.quantization", "nf4 or int8, both through bitsandbytes"),
    ("quant_method", "S", "model.quantization", "nf4 or int8, both through bitsandbytes"),
    ("quantization_type", "L", "model.quantization", "nf4"),
    ("bnb_4bit_quant_type", "ST", "model.quantization", "nf4"),
    ("use_bnb_nested_quant", "T", "model.quantization", "nf4 always quantises twice"),
    ("double_quantization", "L", "model.quantization", "nf4 always quantises twice"),
    ("bnb_4bit_use_double_quant", "S", "model.quantization", "nf4 always quantises twice"),
    ("bnb_4bit_compute_dtype", "S", "model.dtype", _PRECISION),
    ("bnb_4bit_quant_storage", "ST", "model.quantization", "the storage type follows from model.dtype"),
    ("flash_attention", "A", "model.attn_implementation", "flash_attention_2, sdpa, eager or auto"),
    ("flash_attn", "L", "model.attn_implementation", "flash_attention_2 for fa2, sdpa, eager for disabled, or auto"),
    ("attn_impl", "S", "model.attn_implementation", "flash_attention_2, sdpa, eager or auto"),
    ("use_flash_attn", "S", "model.attn_implementation", "flash_attention_2"),
    ("use_flash_attention_2", "T", "model.attn_implementation", "flash_attention_2"),
    ("sdp_attention", "A", "model.attn_implementation", "sdpa"),
    ("eager_attention", "A", "model.attn_implementation", "eager"),
    ("flex_attention", "A", "model.attn_implementation", "flex_attention"),
    ("xformers_attention", "A", "model.attn_implementation", "sdpa does the same"),
    ("model_init_kwargs", "T", "model", "its keys stand under model: dtype, revision, attn_implementation"),
    ("use_unsloth", "L", "", "the model is trained as transformers loads it"),
    ("resize_vocab", "L", "", _LONGER),
    ("special_tokens", "A", "", "the tokenizer's own special tokens are used"),
    ("tokens", "A", "model.new_tokens", ""),
    ("add_tokens", "L", "model.new_tokens", "a list"),
    ("add_special_tokens", "L", "model.new_special_tokens", "a list"),
    ("pad_token", "T", "", "the tokenizer's own padding token is used"),
    ("eos_token", "T", "", "the end of turn is read from the model's chat template"),
    # adapter
    ("adapter", "A", "adapter.method", "lora; for qlora also model.quantization: nf4; for full fine-tuning none"),
    ("finetuning_type", "L", "adapter.method", _FULL),
    ("train_type", "S", "adapter.method", _FULL),
    ("tuner_type", "S", "adapter.method", _FULL),
    ("sft_type", "S", "adapter.method", _FULL),
    ("full_finetuning", "U", "adapter.method", "none for full fine-tuning"),
    ("use_peft", "T", "adapter.method", _FULL),
    ("lora_r", "AT", "adapter.r", ""),
    ("lora_rank", "LSt", "adapter.r", ""),
    ("rank", "Ut", "adapter.r", ""),
    ("lora_target_modules", "AST", "adapter.target_modules", ""),
    ("lora_target", "L", "adapter.target_modules", "all becomes all-linear, a text with commas a list"),
    ("lora_target_linear", "A", "adapter.target_modules", "all-linear for true"),
    ("lora_attn_modules", "t", "adapter.target_modules", ""),
    ("apply_lora_to_mlp", "t", "adapter.target_modules", "list the modules, or all-linear"),
    ("apply_lora_to_output", "t", "adapter.target_modules", "list the modules"),
    ("use_rslora", "LSTU", "adapter.use_rslora", ""),
    ("lora_use_rslora", "A", "adapter.use_rslora", ""),
    ("peft_use_rslora", "A", "adapter.use_rslora", ""),
    ("use_dora", "LSTt", "adapter.method", "dora for true"),
    ("lora_use_dora", "A", "adapter.method", "dora for true"),
    ("peft_use_dora", "A", "adapter.method", "dora for true"),
    ("lora_modules_to_save", "AT", "adapter.modules_to_save", ""),
    ("modules_to_save", "PSU", "adapter.modules_to_save", ""),
    ("additional_target", "L", "adapter.modules_to_save", "a list"),
    ("lora_bias", "S", "", "biases are not trained beside an adapter"),
    ("lora_task_type", "T", "", "it is always causal language modelling"),
    ("lora_model_dir", "A", "adapter.continue_from", ""),
    ("adapter_name_or_path", "L", "adapter.continue_from", ""),
    ("peft_init_lora_weights", "A", "adapter.init_lora_weights", ""),
    ("pissa_init", "L", "adapter.init_lora_weights", "pissa for true"),
    ("init_weights", "S", "adapter.init_lora_weights", ""),
    ("lorap_lr_ratio", "S", "adapter.loraplus_lr_ratio", ""),
    ("freeze_parameters", "S", "model.freeze", "with adapter.method: none"),
    ("unfrozen_parameters", "A", "model.freeze", "name what stays frozen, with adapter.method: none"),
    # data
    ("datasets", "AT", "data.train", "a path, or a list of sources with path, format, split and weight"),
    ("dataset", "LSt", "data.train", "a path, or a list of sources with path, format, split and weight"),
    ("dataset_name", "T", "data.train", "a path, or a list of sources with path, format, split and weight"),
    ("dataset_mixer", "H", "data.train", "a list of sources, each with its weight"),
    ("interleave_probs", "LS", "data.train[].weight", "each source has its own; set data.weight_by to rows"),
    ("mix_strategy", "L", "data.weight_by", "epochs, rows or tokens; data.stopping_strategy says when an epoch ends"),
    ("dataset_dir", "L", "data.train[].path", "write the whole path of each source"),
    ("dataset_train_split", "T", "data.train[].split", ""),
    ("dataset_test_split", "T", "data.validation[].split", ""),
    ("dataset_config", "T", "data.train[].path", "a hub data set with several configurations is best saved as a file"),
    ("test_datasets", "A", "data.validation", ""),
    ("eval_dataset", "LT", "data.validation", ""),
    ("val_dataset", "S", "data.validation", ""),
    ("val_set_size", "A", "data.validation_split", "a share from 0 to 1; rows are chosen by a hash of their content"),
    ("val_size", "L", "data.validation_split", "a share from 0 to 1; rows are chosen by a hash of their content"),
    (
        "split_dataset_ratio",
        "S",
        "data.validation_split",
        "a share from 0 to 1; rows are chosen by a hash of their content",
    ),
    (
        "test_split_size",
        "T",
        "data.validation_split",
        "a share from 0 to 1; rows are chosen by a hash of their content",
    ),
    ("sequence_len", "A", "data.max_length", ""),
    ("cutoff_len", "L", "data.max_length", ""),
    ("max_seq_length", "TU", "data.max_length", ""),
    ("max_seq_len", "t", "data.max_length", ""),
    ("model_max_length", "LS", "data.max_length", ""),
    ("excess_length_strategy", "A", "data.on_long_row", "error, truncate, drop or split"),
    ("truncation_strategy", "S", "data.on_long_row", "drop for delete, truncate for left or right, else error"),
    ("truncation_mode", "T", "data.on_long_row", "error, truncate, drop or split"),
    ("sample_packing", "A", "data.packing", ""),
    ("neat_packing", "L", "data.packing", "rows in a pack never attend to each other"),
    ("packing_strategy", "T", "data.packing_strategy", "bfd, which cuts no row, or wrapped"),
    (
        "padding_free",
        "ST",
        "data.packing",
        "rows are never padded, packed or not; true packs them into sequences of max_length",
    ),
    ("eval_sample_packing", "A", "data.packing", "it holds for validation rows too"),
    ("eval_packing", "T", "data.packing", "it holds for validation rows too"),
    ("packed", "t", "data.packing", ""),
    ("pad_to_sequence_len", "A", "data.packing", "rows are laid end to end and not padded"),
    ("train_on_inputs", "A", "data.loss_on", "all for true, assistant for false"),
    ("train_on_input", "t", "data.loss_on", "all for true, assistant for false"),
    ("train_on_prompt", "L", "data.loss_on", "all for true, assistant for false"),
    ("train_on_eos", "A", "data.loss_on", "assistant trains each turn with its end-of-turn token"),
    ("roles_to_train", "A", "data.loss_on", "a list of roles, or assistant, last_assistant or all"),
    ("mask_history", "L", "data.loss_on", "last_assistant for true"),
    ("loss_scale", "S", "data.loss_on", "assistant, last_assistant or all"),
    ("completion_only_loss", "T", "data.loss_on", "assistant for true, all for false"),
    ("assistant_only_loss", "T", "data.loss_on", "assistant for true, all for false"),
    ("train_on_responses_only", "U", "data.loss_on", "assistant"),
    ("template", "LS", "data.chat_template", _TURNS),
    ("chat_template_jinja", "A", "data.chat_template", _TURNS),
    ("chat_template_path", "T", "data.chat_template", _TURNS),
    ("default_system_message", "A", "", "write the system message into the rows"),
    ("system", "S", "", "write the system message into the rows"),
    ("new_system_prompt", "t", "", "write the system message into the rows"),
    ("dataset_text_field", "TU", "data.train[].format", "text takes a column named text"),
    ("formatting_func", "TU", "data.train[].format", "package.module:attribute of a format of your own"),
    (
        "type",
        "A",
        "data.train[].format",
        "auto, or a format's name: messages, sharegpt, alpaca, prompt_completion, text",
    ),
    ("ds_type", "A", "data.train[].path", "the file type follows from the name"),
    ("data_files", "AT", "data.train[].path", "one source for each file"),
    ("field_messages", "A", "data.train[].format", "set the source's columns: {messages: the_column}"),
    ("dataset_prepared_path", "A", "data.cache_dir", "prepared rows are kept there by the hash of what made them"),
    ("tokenized_path", "L", "data.cache_dir", "prepared rows are kept there by the hash of what made them"),
    ("skip_prepare_dataset", "AT", "", _PREPARED),
    ("dataset_kwargs", "T", "", _PREPARED),
    ("dataset_num_proc", "ST", "data.num_proc", ""),
    ("dataset_processes", "A", "data.num_proc", ""),
    ("preprocessing_num_workers", "L", "data.num_proc", ""),
    ("overwrite_cache", "L", "data.cache_dir", "what changed is prepared anew; another folder begins empty"),
    ("remove_unused_columns", "T", "", _PREPARED),
    ("max_samples", "L", "data.train[].weight", "0.1 sees a seeded tenth of the rows"),
    ("streaming", "LS", "data.streaming", "needs training.max_steps"),
    ("dataset_streaming", "T", "data.streaming", "needs training.max_steps"),
    ("shuffle_dataset", "T", "training.seed", "rows are always shuffled, by this seed"),
    ("dataset_shuffle", "S", "training.seed", "rows are always shuffled, by this seed"),
    # training
    ("stage", "L", "training.method", "sft; for pre-training rows sft with data.loss_on: all"),
    ("rl", "A", "training.method", "sft, or package.module:attribute"),
    ("rlhf_type", "S", "training.method", "sft, or package.module:attribute"),
    ("do_train", "LT", "", "finetune train always trains"),
    ("do_eval", "LT", "data.validation", "rows to measure during training; set training.eval_steps for how often"),
    ("lr", "t", "training.learning_rate", ""),
    ("micro_batch_size", "A", _MICRO, ""),
    ("batch_size", "At", _BATCH, "the rows of one optimizer step over all processes"),
    ("gradient_accumulation_steps", "ALSTUt", "", _DERIVED),
    ("eval_batch_size", "A", "training.per_device_eval_batch_size", ""),
    ("auto_find_batch_size", "AT", _MICRO, "state it, or leave it out for a divisor of the global batch"),
    ("num_epochs", "A", "training.num_train_epochs", ""),
    ("epochs", "t", "training.num_train_epochs", ""),
    ("max_steps_per_epoch", "t", "training.max_steps", ""),
    ("optimizer", "At", "training.optim", "a name of TrainingArguments, as adamw_torch"),
    ("optim_args", "AT", f"{_EXTRA}.optim_args", ""),
    ("lr_scheduler", "At", "training.lr_scheduler_type", ""),
    ("lr_scheduler_kwargs", "AT", f"{_EXTRA}.lr_scheduler_kwargs", ""),
    ("warmup_ratio", "ALSTU", "training.warmup_steps", "a number below 1 is a share of all steps"),
    ("num_warmup_steps", "t", "training.warmup_steps", ""),
    ("adam_beta1", "ALST", f"{_EXTRA}.adam_beta1", ""),
    ("adam_beta2", "ALST", f"{_EXTRA}.adam_beta2", ""),
    ("adam_epsilon", "ALST", f"{_EXTRA}.adam_epsilon", ""),
    ("gradient_clipping", "A", "training.max_grad_norm", ""),
    ("clip_grad_norm", "t", "training.max_grad_norm", ""),
    ("gradient_checkpointing", "ALST", "training.activation_checkpointing", ""),
    ("use_gradient_checkpointing", "U", "training.activation_checkpointing", "true for unsloth"),
    ("enable_activation_checkpointing", "t", "training.activation_checkpointing", ""),
    ("disable_gradient_checkpointing", "L", "training.activation_checkpointing", "false for true"),
    ("gradient_checkpointing_kwargs", "AT", "training.activation_checkpointing", "true, false or auto"),
    ("activation_checkpointing_kwargs", "T", "training.activation_checkpointing", "true, false or auto"),
    ("activation_offloading", "AT", f"{_EXTRA}.activation_offloading", ""),
    ("random_state", "U", "training.seed", ""),
    ("data_seed", "ST", "training.seed", "one seed serves for everything"),
    ("group_by_length", "AT", "", "the order of rows is the seed's; data.packing leaves little padding"),
    ("neftune_noise_alpha", "ALT", f"{_EXTRA}.neftune_noise_alpha", ""),
    ("torch_compile", "AT", f"{_EXTRA}.torch_compile", ""),
    ("use_liger_kernel", "ST", "", "the loss is computed here, over the trained tokens alone"),
    ("liger_kernel", "L", "", "the loss is computed here, over the trained tokens alone"),
    ("enable_liger_kernel", "L", "", "the loss is computed here, over the trained tokens alone"),
    ("label_smoothing_factor", "T", "", "the loss is that of the tokens themselves"),
    ("dataloader_num_workers", "AST", f"{_EXTRA}.dataloader_num_workers", ""),
    ("dataloader_pin_memory", "AT", f"{_EXTRA}.dataloader_pin_memory", ""),
    ("eval_strategy", "AST", "training.eval_steps", "a number of steps, or left out to measure once at the end"),
    ("evaluation_strategy", "AT", "training.eval_steps", "a number of steps, or left out to measure once at the end"),
    ("evals_per_epoch", "A", "training.eval_steps", "a number of steps"),
    ("save_strategy", "AST", "training.save_steps", "a number of steps, or left out to save once at the end"),
    ("saves_per_epoch", "A", "training.save_steps", "a number of steps"),
    ("logging_strategy", "T", "training.logging_steps", "a number of steps"),
    ("log_every_n_steps", "t", "training.logging_steps", ""),
    ("resume_from_checkpoint", "ALST", "", "run the same command again: a run that was stopped goes on by itself"),
    ("auto_resume_from_checkpoints", "A", "", "run the same command again: a run that was stopped goes on by itself"),
    ("load_best_model_at_end", "AT", "", "the run keeps its last adapter; checkpoints/ holds the earlier ones"),
    ("trainable_token_indices", "P", "adapter.trainable_token_indices", ""),
    # launch
    ("deepspeed", "ALST", "launch.config", _LAUNCH),
    ("fsdp", "AST", "launch.config", _LAUNCH),
    ("fsdp_config", "AST", "launch.config", _LAUNCH),
    ("accelerator_config", "T", "launch.config", _LAUNCH),
    ("parallelism_config", "T", "launch.config", _LAUNCH),
    ("ddp_timeout", "LT", "launch.timeout", "in seconds"),
    ("ddp_backend", "T", "", "the backend follows from the device"),
    ("local_rank", "AT", "", "the launcher sets it"),
    ("nproc_per_node", "S", "launch.num_processes", ""),
    ("use_cpu", "T", "launch.device", "cpu for true"),
    ("no_cuda", "T", "launch.device", "cpu for true"),
    ("device_map", "ASU", "launch.device", "each process takes one device"),
    # evaluation, export, tracking, output
    ("predict_with_generate", "L", "evaluate.data", "finetune evaluate answers these rows with the adapter"),
    ("export_dir", "L", "", "finetune merge RUN --output FOLDER"),
    ("export_size", "L", "export.max_shard_size", "with its unit, as 5GB"),
    ("merge_lora", "AS", "", "finetune merge RUN writes merged weights"),
    ("report_to", "LST", "tracking.trackers", "a list, as [wandb]; left out for none"),
    ("use_wandb", "A", "tracking.trackers", "[wandb]"),
    ("use_swanlab", "L", "tracking.trackers", "package.module:attribute"),
    ("wandb_project", "A", "tracking.project", "and tracking.trackers: [wandb]"),
    ("wandb_name", "A", "tracking.run_name", "and tracking.trackers: [wandb]"),
    ("wandb_run_id", "A", "tracking.run_name", ""),
    ("wandb_mode", "A", "tracking.mode", "offline or online"),
    ("wandb_entity", "A", "", "set the environment variable WANDB_ENTITY"),
    ("wandb_log_model", "A", "", _HUB),
    ("mlflow_tracking_uri", "A", "tracking.trackers", "package.module:attribute"),
    ("swanlab_project", "L", "tracking.project", ""),
    ("output_path", "S", "output_dir", ""),
    ("overwrite_output_dir", "LT", "", "a run never overwrites another; choose another output_dir"),
    ("logging_dir", "LT", "", "metrics.jsonl stands in output_dir"),
    ("plot_loss", "L", "", "metrics.jsonl in output_dir holds every loss"),
    ("push_to_hub", "ST", "", _HUB),
    ("hub_model_id", "AST", "", _HUB),
    ("hub_strategy", "AT", "", _HUB),
    ("hub_private_repo", "ST", "", _HUB),
    ("use_hf", "S", "", "a model id is one of the Hugging Face hub; a local folder always works"),
)

_DTYPES = {
    "bf16": "bfloat16",
    "torch.bfloat16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "torch.float16": "float16",
    "fp32": "float32",
    "float": "float32",
    "torch.float32": "float32",
}

FOREIGN_VALUES: dict[str, dict[str, str]] = {
    "dtype": _DTYPES,
    "quantization": {
        **dict.fromkeys(("4bit", "4-bit", "4", "int4", "fp4", "q4", "bnb", "bnb-4bit", "bitsandbytes"), "nf4"),
        **dict.fromkeys(("8bit", "8-bit", "8", "bnb-8bit", "llm.int8"), "int8"),
    },
    "attn_implementation": {
        **dict.fromkeys(("fa2", "flash", "flash_attn", "flash_attention", "flash-attn"), "flash_attention_2"),
        **dict.fromkeys(("fa3", "flash_attn_3"), "flash_attention_3"),
        **dict.fromkeys(("disabled", "vanilla"), "eager"),
    },
    "method": {"qlora": "lora, with model.quantization: nf4"},
    "loss_on": {
        **dict.fromkeys(("completion", "completions", "response", "responses", "output", "outputs"), "assistant"),
        **dict.fromkeys(("last", "last_turn", "last_round"), "last_assistant"),
    },
    "on_long_row": {**dict.fromkeys(("delete", "skip", "remove"), "drop"), "cut": "truncate", "raise": "error"},
    "device": dict.fromkeys(("gpu", "cuda", "cuda:0", "mps", "npu", "xpu"), "accelerator"),
}
"""By the name of a key: words of other tools for its values, and ours."""
