"""Two calls at once on a WebSocket: pip install websockets, then python websocket_chat.py [ADDRESS]."""

import json
import os
import sys

from websockets.sync.client import connect

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
messages = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]
calls = [
    {"id": "answer", "function": "chat", "params": {"messages": messages, "temperature": 0}},
    {"id": "story", "function": "generate", "params": {"prompt": "Once upon a time", "max_tokens": 16}},
]

with connect(address.replace("http", "ws", 1) + "/ws") as socket:
    key = {"key": os.environ.get("REALM_API_KEY", "none")}
    socket.send(json.dumps({"id": "key", "function": "authenticate", "params": key}))
    for call in calls:
        socket.send(json.dumps(call))
    running = {"key", "answer", "story"}
    while running:
        item = json.loads(socket.recv())
        if item["status"] != "streaming":
            running.discard(item["id"])
        if item["id"] == "answer" and item["status"] == "streaming":
            print(item["data"]["delta"].get("content") or "", end="", flush=True)
        if item["status"] == "error":
            sys.exit(f"{item['id']}: {item['data']['message']}")
print()
