#!/bin/sh
# Measure a running server with evalscope: latency and tokens/s of answers of a fixed length.
#
#   pip install 'evalscope[perf]'
#   paddle-ccq serve DIR --served-model-name example &
#   sh examples/measure_with_evalscope.sh [BASE_URL] [TOKENS] [MORE FLAGS OF evalscope perf ...]
#
# The prompts are the questions of examples/data/word.jsonl, and the server's own counts of tokens
# are taken; any server of the OpenAI API that takes `min_tokens` will do.
set -eu
cd "$(dirname "$0")/.."
base=${1:-http://127.0.0.1:8000/v1}
tokens=${2:-64}
shift $(($# < 2 ? $# : 2))
prompts=$(mktemp)
trap 'rm -f "$prompts"' EXIT
"${PYTHON:-python3}" -c '
import json, sys
for line in open("examples/data/word.jsonl", encoding="utf-8"):
    print(json.loads(line)["prompt"].replace("\n", " "))
' > "$prompts"
"${EVALSCOPE:-evalscope}" perf --api openai --url "$base/chat/completions" \
    --model "${MODEL:-example}" \
    --dataset line_by_line --dataset-path "$prompts" --max-prompt-length 512 \
    --max-tokens "$tokens" --min-tokens "$tokens" "$@"
