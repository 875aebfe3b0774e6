"""A conversation through the official client: pip install openai, then python openai_chat.py [ADDRESS]."""

import os
import sys

from openai import OpenAI

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{address}/v1", api_key=os.environ.get("REALM_API_KEY", "none"))
messages = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]
model = client.models.list().data[0].id

answer = client.chat.completions.create(model=model, messages=messages, temperature=0)
print(answer.choices[0].message.content)

for chunk in client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
