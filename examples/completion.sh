#!/bin/sh
# Continues a text: once as one JSON answer, once streamed.
url=${CARAVAN_URL:-http://localhost:8080}
curl --fail-with-body -s "$url/completion" -H 'Content-Type: application/json' \
  -d '{"prompt": "Building a website can be done in 10 simple steps:", "n_predict": 64}'
echo
curl --fail-with-body -sN "$url/completion" -H 'Content-Type: application/json' \
  -d '{"prompt": "Once upon a time there was a fox named Lily.", "n_predict": 64, "stream": true}'
