"""One file per data format: how a raw row becomes an example. To add one, copy a file and add a line."""

from __future__ import annotations

FORMATS = {
    "messages": "finetune.formats.messages:FORMAT",
    "prompt_completion": "finetune.formats.prompt_completion:FORMAT",
    "text": "finetune.formats.text:FORMAT",
    "alpaca": "finetune.formats.alpaca:FORMAT",
    "sharegpt": "finetune.formats.sharegpt:FORMAT",
    "preference": "finetune.formats.preference:FORMAT",
    "unpaired": "finetune.formats.unpaired:FORMAT",
    "prompt": "finetune.formats.prompt:FORMAT",
}
