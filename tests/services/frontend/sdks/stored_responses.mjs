// Goes through a conversation of kept responses with OpenAI's SDK for Node.
//
// node stored_responses.mjs FOLDER_OF_THE_SDK < {"url", "key"} > what was found

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const resolve = createRequire(process.argv[2] + "/").resolve;
const { default: OpenAI } = await import(pathToFileURL(resolve("openai")));

let input = "";
for await (const piece of process.stdin) input += piece;
const { url, key } = JSON.parse(input);
const { responses } = new OpenAI({ baseURL: url + "/v1", apiKey: key, maxRetries: 0 });

const model = "plain";
const first = await responses.create({ model, input: "Say: One" });
const second = await responses.create({ model, input: "Prompt:", previous_response_id: first.id });
const third = await responses
  .stream({ model, input: "Say: Three", previous_response_id: second.id })
  .finalResponse();

const texts = [];
for await (const item of responses.inputItems.list(third.id, { limit: 2, order: "asc" })) {
  texts.push(item.content[0].text);
}
const retrieved = await responses.retrieve(third.id);
await responses.delete(third.id);
const after = await responses.retrieve(third.id).catch((error) => error.status);
process.stdout.write(
  JSON.stringify({
    second: second.output_text,
    texts,
    retrieved: retrieved.output_text,
    after_deletion: after,
  }),
);
