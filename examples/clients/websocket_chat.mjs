// Two calls at once on a WebSocket: npm install ws, then node websocket_chat.mjs [ADDRESS].
import WebSocket from "ws";

const address = process.argv[2] ?? "http://127.0.0.1:8000";
const messages = [
  { role: "system", content: "You answer in one short sentence." },
  { role: "user", content: "What is the capital of France?" },
];
const calls = [
  { id: "key", function: "authenticate", params: { key: process.env.REALM_API_KEY ?? "none" } },
  { id: "answer", function: "chat", params: { messages, temperature: 0 } },
  { id: "story", function: "generate", params: { prompt: "Once upon a time", max_tokens: 16 } },
];
const running = new Set(calls.map(({ id }) => id));

const socket = new WebSocket(`${address.replace("http", "ws")}/ws`);
socket.on("open", () => calls.forEach((call) => socket.send(JSON.stringify(call))));
socket.on("message", (text) => {
  const { id, status, data } = JSON.parse(text);
  if (id === "answer" && status === "streaming") process.stdout.write(data.delta.content ?? "");
  if (status === "error") {
    console.error(`${id}: ${data.message}`);
    process.exitCode = 1;
  }
  if (status !== "streaming") running.delete(id);
  if (!running.size) {
    process.stdout.write("\n");
    socket.close();
  }
});
