"""A streamed chat by OpenAI's client: pip install openai; python chat.py "What is 3 plus 4?"."""

import os
import sys

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("CARAVAN_URL", "http://localhost:8080") + "/v1", api_key=os.environ.get("APP_API_KEY", "none"))
question = sys.argv[1] if len(sys.argv) > 1 else "What is 3 plus 4?"
stream = client.chat.completions.create(model="any", messages=[{"role": "user", "content": question}], max_tokens=64, stream=True)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
