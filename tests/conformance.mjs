// Every endpoint and option that OpenAI's own client for Node has and this server serves, told in one JSON object.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none", maxRetries: 0, timeout: 300_000 });
const messages = [
  { role: "system", content: "You answer in one short sentence." },
  { role: "user", content: "What is the capital of France?" },
];
const told = { models: [] };
for await (const each of await client.models.list()) told.models.push(each.id);
const model = told.models[0];
told.model = (await client.models.retrieve(model)).id;
const greedy = { model, messages, temperature: 0, max_completion_tokens: 16 };

async function collected(stream) {
  const found = { text: "", reasons: [], usage: null };
  for await (const chunk of await stream) {
    const choice = chunk.choices[0];
    found.text += choice?.delta?.content ?? choice?.text ?? "";
    if (choice?.finish_reason) found.reasons.push(choice.finish_reason);
    found.usage = chunk.usage ?? found.usage;
  }
  return found;
}

async function refusal(call) {
  try {
    await call();
    return null;
  } catch (error) {
    return { status: error.status, param: error.param, kind: error.constructor.name };
  }
}

told.chat = await client.chat.completions.create({ ...greedy, logprobs: true, top_logprobs: 2 });
told.stream = await collected(
  client.chat.completions.create({ ...greedy, stream: true, stream_options: { include_usage: true } }),
);
told.several = await client.chat.completions.create({
  ...greedy, temperature: 1, n: 2, seed: 7, stop: ["."], logit_bias: { 28: -100 }, top_p: 0.9,
  presence_penalty: 0.1, frequency_penalty: 0.1, top_k: 40, min_p: 0.05, user: "me", metadata: { a: "b" },
});
told.json = await client.chat.completions.create({
  ...greedy, max_completion_tokens: 60,
  response_format: {
    type: "json_schema",
    json_schema: { name: "city", schema: {
      type: "object", properties: { capital: { enum: ["Paris", "Rome"] } }, required: ["capital"], additionalProperties: false,
    } },
  },
});
const plain = { model, prompt: "The capital of France is", temperature: 0, max_tokens: 4 };
told.completion = await client.completions.create({ ...plain, echo: true, logprobs: 1 });
told.completions = await client.completions.create({ ...plain, prompt: ["The sky is", "Two and two"], n: 2 });
told.completionStream = await collected(client.completions.create({ ...plain, stream: true }));
told.embeddings = (await client.embeddings.create({ model, input: ["a", "b"] })).data.map((each) => each.embedding.length);
told.refused = {
  tools: await refusal(() => client.chat.completions.create({
    ...greedy, tools: [{ type: "function", function: { name: "f", parameters: { type: "object", properties: {} } } }],
  })),
  best_of: await refusal(() => client.completions.create({ ...plain, best_of: 2 })),
  model: await refusal(() => client.chat.completions.create({ ...greedy, model: "gpt-4" })),
};
console.log(JSON.stringify(told));
