#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Ask a server one question with curl: client.sh "question" [URL]; prints the stream of events.
set -eu
question=${1:?usage: client.sh QUESTION [URL]}
url=${2:-http://127.0.0.1:8180}
body=$(python3 -c 'import json, sys; print(json.dumps({
    "model": "default", "max_tokens": 256, "stream": True,
    "messages": [{"role": "user", "content": sys.argv[1]}]}))' "$question")
exec curl --silent --show-error --fail-with-body --no-buffer "$url/v1/chat/completions" \
    --header "Content-Type: application/json" \
    --header "Authorization: Bearer ${FD_API_KEY:-none}" \
    --data "$body"
