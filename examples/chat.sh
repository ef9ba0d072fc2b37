#!/bin/sh
# A chat in OpenAI's form. With APP_API_KEY on the server, add: -H "Authorization: Bearer KEY"
url=${CARAVAN_URL:-http://localhost:8080}
curl --fail-with-body -s "$url/v1/chat/completions" -H 'Content-Type: application/json' \
  -d '{"messages": [{"role": "user", "content": "What is 3 plus 4?"}], "max_tokens": 64}'
echo
