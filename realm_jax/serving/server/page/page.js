// The page of the server: a chat over /v1/chat/completions, and figures from /metrics.

const FIGURES_EVERY_MS = 2000;
const find = (id) => document.getElementById(id);
const settings = find("settings").elements;
const messages = [];
let running = null; // the AbortController of the answer that is being written

settings.key.value = sessionStorage.getItem("key") ?? "";
settings.key.addEventListener("change", () => {
  sessionStorage.setItem("key", settings.key.value);
  loadModels();
});

function headers() {
  const key = settings.key.value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function say(problem) {
  find("problem").textContent = problem;
}

async function get(path) {
  const response = await fetch(path, { headers: headers() });
  if (!response.ok) throw new Error(await reason(response));
  return response;
}

async function reason(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

async function loadModels() {
  try {
    const { data } = await (await get("v1/models")).json();
    find("model").replaceChildren(
      ...data.map(({ id, parent }) => new Option(parent ? `${id} (adapter of ${parent})` : id, id)),
    );
    say("");
  } catch (error) {
    say(error.message);
  }
}

function bubble(role, text) {
  const element = document.createElement("article");
  element.className = role;
  element.append(document.createTextNode(text), document.createElement("small"));
  find("talk").append(element);
  element.scrollIntoView({ block: "end" });
  return element;
}

function body() {
  const system = settings.system.value.trim();
  return {
    model: find("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: Number(settings.temperature.value),
    ...(settings.max_tokens.value && { max_completion_tokens: Number(settings.max_tokens.value) }),
    ...(settings.seed.value && { seed: Number(settings.seed.value) }),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function* events(response) {
  // Server-sent events: lines of `data: ...`, comments begin with a colon.
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(element) {
  const start = performance.now();
  let first = null;
  let usage = null;
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify(body()),
    signal: running.signal,
  });
  if (!response.ok) throw new Error(await reason(response));
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    const text = chunk.choices?.[0]?.delta?.content;
    if (text) {
      first ??= performance.now();
      element.firstChild.data += text;
      element.scrollIntoView({ block: "end" });
    }
    usage = chunk.usage ?? usage;
  }
  const end = performance.now();
  if (usage) {
    const writing = (end - (first ?? start)) / 1000;
    const speed = usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / writing : 0;
    element.lastChild.textContent =
      `${usage.prompt_tokens} + ${usage.completion_tokens} tokens, first after ` +
      `${(((first ?? end) - start) / 1000).toFixed(2)} s, then ${speed.toFixed(1)} tokens/s`;
  }
}

async function ask(event) {
  event.preventDefault();
  const text = find("prompt").value.trim();
  if (!text || running) return;
  find("prompt").value = "";
  messages.push({ role: "user", content: text });
  bubble("user", text);
  const element = bubble("assistant", "");
  running = new AbortController();
  show(true);
  try {
    await answer(element);
    say("");
  } catch (error) {
    element.lastChild.textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
  const written = element.firstChild.data;
  if (written) messages.push({ role: "assistant", content: written });
  else messages.pop(); // a question that got no answer is not asked again with the next one
  running = null;
  show(false);
}

function show(isAnswering) {
  find("send").hidden = isAnswering;
  find("stop").hidden = !isAnswering;
  if (!isAnswering) find("prompt").focus();
}

let before = null; // the tokens generated at the last look, and when that was

async function showFigures() {
  try {
    const text = await (await get("metrics")).text();
    const sum = (name) =>
      text
        .split("\n")
        .filter((line) => line.startsWith(`realm:${name}{`) || line.startsWith(`realm:${name} `))
        .reduce((total, line) => total + Number(line.slice(line.lastIndexOf(" "))), 0);
    const now = { tokens: sum("generation_tokens_total"), at: performance.now() };
    find("running").textContent = sum("num_requests_running");
    find("waiting").textContent = sum("num_requests_waiting");
    find("generated").textContent = now.tokens.toLocaleString("en");
    if (before) find("rate").textContent = ((1000 * (now.tokens - before.tokens)) / (now.at - before.at)).toFixed(1);
    before = now;
  } catch (error) {
    say(error.message);
  }
}

find("ask").addEventListener("submit", ask);
find("stop").addEventListener("click", () => running?.abort());
find("clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  find("talk").replaceChildren();
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) find("ask").requestSubmit();
  else return;
  event.preventDefault();
});
setInterval(() => document.hidden || showFigures(), FIGURES_EVERY_MS);
loadModels();
showFigures();
