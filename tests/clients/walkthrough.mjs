// The official Node client, unchanged but for its base URL: upload, job, events, paging, errors, webhooks.
import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
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
console.log("done");
