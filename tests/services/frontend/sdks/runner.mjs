// Makes the calls of a table with OpenAI's SDK for Node. See cases.py for what is in it.
//
// node runner.mjs FOLDER_OF_THE_SDK < {"cases", "url", "keyed_url", "keys"} > {name: outcome}

import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const LEFT_AFTER_EVENTS = 4;

const resolve = createRequire(process.argv[2] + "/").resolve;
const { default: OpenAI } = await import(pathToFileURL(resolve("openai")));

let input = "";
for await (const piece of process.stdin) input += piece;
const { cases, url, keyed_url, keys } = JSON.parse(input);

function clientOf(case_) {
  const { key } = case_;
  const base = key === "nobody" ? "http://127.0.0.1:9" : key ? keyed_url : url;
  return new OpenAI({
    baseURL: base + "/v1",
    apiKey: keys[key] ?? "none",
    maxRetries: case_.retries ?? 0,
    timeout: (case_.timeout_seconds ?? 20) * 1000,
  });
}

const plain = (value) => JSON.parse(JSON.stringify(value));

async function resultOf(case_) {
  const path = case_.call.split(".");
  const last = path.pop();
  const owner = path.reduce((at, name) => at[name], clientOf(case_));
  const args = case_.body
    ? [{ ...case_.body, ...case_.extra_body }]
    : [...(case_.args ?? [])];
  const options = case_.headers ? [{ headers: case_.headers }] : [];
  if (case_.how === "final") {
    const stream = owner.stream(...args);
    const isChat = case_.call.startsWith("chat");
    return plain(isChat ? await stream.finalChatCompletion() : await stream.finalResponse());
  }
  if (case_.how === "raw") {
    const { data, response } = await owner[last](...args, ...options).withResponse();
    const headers = Object.fromEntries(response.headers);
    return { status: response.status, headers, body: plain(data) };
  }
  const result = await owner[last](...args, ...options);
  if (!case_.body?.stream) {
    return last === "list" ? { data: plain(result.data) } : plain(result);
  }
  const events = [];
  for await (const event of result) {
    events.push(event);
    if (case_.how === "leave" && events.length > LEFT_AFTER_EVENTS) break;
  }
  return { events };
}

async function outcomeOf(case_) {
  try {
    return { result: await resultOf(case_) };
  } catch (error) {
    if (!(error instanceof OpenAI.OpenAIError)) throw error;
    return {
      error: {
        class: error.constructor.name,
        status: error.status ?? null,
        code: error.code ?? null,
        param: error.param ?? null,
      },
    };
  }
}

const outcomes = await Promise.all(cases.map(async (case_) => [case_.name, await outcomeOf(case_)]));
process.stdout.write(JSON.stringify(Object.fromEntries(outcomes)));
