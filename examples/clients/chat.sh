#!/usr/bin/env bash
# A conversation with curl, whole and streamed: chat.sh [ADDRESS]
set -euo pipefail
address=${1:-http://127.0.0.1:8000}
body='{
  "messages": [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"}
  ],
  "temperature": 0
}'
ask() {
  curl --silent --show-error --fail-with-body --no-buffer "$address/v1/chat/completions" \
    -H "Content-Type: application/json" -H "Authorization: Bearer ${REALM_API_KEY:-none}" -d "$1"
}
ask "$body"
echo
ask "${body%\}}, \"stream\": true}"
