// A conversation through the official client: npm install openai, then node openai_chat.mjs [ADDRESS].
import OpenAI from "openai";

const address = process.argv[2] ?? "http://127.0.0.1:8000";
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: process.env.REALM_API_KEY ?? "none" });
const messages = [
  { role: "system", content: "You answer in one short sentence." },
  { role: "user", content: "What is the capital of France?" },
];
const model = (await client.models.list()).data[0].id;

const answer = await client.chat.completions.create({ model, messages, temperature: 0 });
console.log(answer.choices[0].message.content);

for await (const chunk of await client.chat.completions.create({ model, messages, temperature: 0, stream: true })) {
  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
}
process.stdout.write("\n");
