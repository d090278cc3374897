#!/bin/sh
# The demo, as `make demo` runs it: every command is the public one and is printed before it runs.
set -eu
cd "$(dirname "$0")/.."

run() {
    printf '\n+ %s\n' "$*"
    "$@"
}

started=$(date +%s)
echo "Adapting a 135M chat model to turn support tickets into JSON."
echo "A CPU with fast bfloat16 products (AMX) needs about 8 minutes, an older one up to half an hour, a GPU one or two."

run finetune base smollm2
run finetune train recipes/quickstart.yaml --overwrite
run finetune evaluate runs/quickstart
run finetune merge runs/quickstart
run finetune evaluate runs/quickstart/merged

cat <<'END'

The adapter is in runs/quickstart/adapter, the merged model in runs/quickstart/merged.
What to run next:
  finetune recipe list                          every recipe that comes along
  finetune recipe copy qwen3/0.6b-lora          a Qwen recipe to make your own
  finetune train recipes/quickstart-qlora.yaml  the same with a 4-bit base (QLoRA)
  finetune train recipes/quickstart.yaml launch.num_processes=2 output_dir=runs/two
                                                two processes, or two GPUs
  docs/                                         how each part works
END
echo "Done in $(($(date +%s) - started)) seconds."
