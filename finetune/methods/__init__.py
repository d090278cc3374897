"""One file per training method. To add one, copy a file and add a line."""

METHODS = {"sft": "finetune.methods.sft:METHOD"}
