// The official Node client, unchanged but for its base URL: upload, job, events, paging, errors, answers, webhooks.
import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:http";
import OpenAI, { toFile } from "openai";

const [baseURL, apiKey, model, tuned] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });

const row = JSON.stringify({ messages: [{ role: "user", content: "hi" }, { role: "assistant", content: "hello" }] });
const file = await client.files.create({ file: await toFile(Buffer.from(`${row}\n`.repeat(8)), "rows.jsonl"), purpose: "fine-tune" });
assert.equal((await client.files.retrieve(file.id)).status, "processed");

let job = await client.fineTuning.jobs.create({
  model,
  training_file: file.id,
  suffix: "succeed",
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 1 } } },
  max_seq_length: 512,
});
while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
  await new Promise((done) => setTimeout(done, 50));
  job = await client.fineTuning.jobs.retrieve(job.id);
}
assert.equal(job.status, "succeeded");
assert.match(await (await client.files.content(job.result_files[0])).text(), /^step,train_loss/);

const messages = [];
for await (const event of client.fineTuning.jobs.listEvents(job.id, { limit: 2 })) messages.push(event.message);
assert.ok(messages.length > 2);
assert.equal((await client.models.retrieve(job.fine_tuned_model)).id, job.fine_tuned_model);
await assert.rejects(client.fineTuning.jobs.cancel(job.id), OpenAI.ConflictError);
await assert.rejects(client.fineTuning.jobs.create({ model, training_file: "file-x" }), (error) => {
  assert.ok(error instanceof OpenAI.BadRequestError);
  assert.equal(error.param, "training_file");
  return true;
});

const asked = { model: tuned, messages: [{ role: "user", content: "What is the capital of France?" }], max_tokens: 8, temperature: 0 };
const whole = await client.chat.completions.create(asked);
assert.equal(whole.usage.completion_tokens, 8);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) text += chunk.choices[0].delta.content ?? "";
assert.equal(text, whole.choices[0].message.content);
await assert.rejects(client.chat.completions.create({ ...asked, n: 2 }), (error) => error.status === 400 && error.param === "n");

const receiver = createServer().listen(0, "127.0.0.1");
await once(receiver, "listening");
const arrived = (async () => {
  const [request, response] = await once(receiver, "request");
  let body = "";
  for await (const chunk of request) body += chunk;
  response.end();
  return [body, request.headers];
})();
const url = `http://127.0.0.1:${receiver.address().port}/`;
const hook = await client.webhooks.create({ name: "node", url, event_types: ["fine_tuning.job.failed"] });
await client.webhooks.test(hook.id, { event_type: "fine_tuning.job.failed" });
const told = await client.webhooks.unwrap(...(await arrived), hook.signing_secret);
assert.equal(told.type, "fine_tuning.job.failed");
assert.ok((await client.webhooks.delete(hook.id)).deleted);
receiver.close();
console.log("done");
