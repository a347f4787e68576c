#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# From a bfloat16 checkpoint to answers over HTTP, one command a step.
#
#   sh examples/quantize_and_serve.sh [MODEL] [PORT]
#
# MODEL: a folder or hub id; the example model unless given. Needs the extra `serve`, and curl.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
model=${1:-$here/ernie-45-moe-3m}
port=${2:-8000}
url=http://127.0.0.1:$port
python=${PYTHON:-python3}
work=$(mktemp -d)
server=
trap 'test -z "$server" || kill "$server"; wait; rm -rf "$work"' EXIT

echo "1. Quantize: what would become of every tensor, then do it"
"$python" -m paddle_ccq.quantize --model "$model" --output "$work/packed" --dry-run | tail -n 3
"$python" -m paddle_ccq.quantize --model "$model" --output "$work/packed" --quiet

echo "2. Verify against the original"
"$python" -m paddle_ccq.verify "$work/packed" --reference "$model" | tail -n 3

echo "3. Serve, and wait until it takes requests"
"$python" -m paddle_ccq.serve "$work/packed" --port "$port" --served-model-name packed &
server=$!
tries=0
until curl -sf "$url/health" >"$work/health"; do
  kill -0 "$server" || exit 1
  tries=$((tries + 1))
  test "$tries" -lt 600 || { echo "error: the server does not come up" >&2; exit 1; }
  sleep 0.2
done

echo "4. Ask: a completion, then a chat, streamed"
curl -sf "$url/v1/completions" -H 'Content-Type: application/json' \
  -d '{"model": "packed", "prompt": "Q: 12 + 35 = ?\nA:", "temperature": 0, "stop": "\n"}'
echo
curl -sfN "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "model": "packed", "messages": [{"role": "user", "content": "Hello"}],
  "max_tokens": 8, "seed": 1, "stream": true}'

echo "5. What the server counted"
curl -sf "$url/metrics" | grep -E '^fastdeploy:(prompt|generation)_tokens_total'
