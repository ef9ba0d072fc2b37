#!/bin/sh
# Vectors of texts, in llama-server's form and in OpenAI's. Any model gives some; an embedding model (bert, nomic-bert) gives useful ones.
url=${CARAVAN_URL:-http://localhost:8080}
curl --fail-with-body -s "$url/embeddings" -H 'Content-Type: application/json' -d '{"content": "a red fox"}'
echo
curl --fail-with-body -s "$url/v1/embeddings" -H 'Content-Type: application/json' -d '{"input": ["a red fox", "a grey wolf"]}'
echo
