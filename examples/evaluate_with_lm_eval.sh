#!/bin/sh
# Score a running server with lm-eval on the example's tasks, as `paddle-ccq evaluate` does.
#
#   pip install 'lm-eval[api]' transformers
#   paddle-ccq serve DIR --served-model-name example &
#   sh examples/evaluate_with_lm_eval.sh DIR [BASE_URL] [ITEMS] [MORE FLAGS OF lm_eval ...]
#
# DIR is the checkpoint's folder, for its tokenizer. Any server that answers /v1/completions with
# `echo` and `logprobs` will do.
set -eu
cd "$(dirname "$0")/.."
folder=$1
base=${2:-http://127.0.0.1:8000/v1}
items=${3:-200}
shift $(($# < 3 ? $# : 3))
model=${MODEL:-example}
TOKENIZER=$folder exec "${LM_EVAL:-lm_eval}" run --model local-completions \
    --model_args "model=$model,base_url=$base/completions,tokenizer=$folder,tokenizer_backend=huggingface,num_concurrent=4,max_length=2048" \
    --include_path examples/lm_eval --tasks ccq_example --limit "$items" --batch_size 8 "$@"
