// Vercel's AI SDK with its OpenAI provider, whose models are /v1/responses unless one asks for another endpoint.
// Says what ../shared/checks.py says: a line about all checks, then one for each.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { APICallError, generateObject, generateText, jsonSchema, streamText, tool } from "ai";

const { CONFORMANCE_URL, CONFORMANCE_KEY, CONFORMANCE_MODEL } = process.env;
const baseURL = `${CONFORMANCE_URL}/v1`;
const openai = createOpenAI({ baseURL, apiKey: CONFORMANCE_KEY });
const PROMPT = "Write a short review of a film.";
// Without a seed, which this provider does not send, an answer is the same again at temperature 0.
const given = { model: openai(CONFORMANCE_MODEL), temperature: 0, maxRetries: 0 };

async function refused(call) {
  const error = await call().then(() => undefined, (raised) => raised);
  assert.ok(APICallError.isInstance(error), String(error));
  return [error.statusCode, JSON.parse(error.responseBody).error.param];
}

const checks = {
  "generateText: the default model, usage and finish reason": async () => {
    const answer = await generateText({ ...given, prompt: PROMPT });
    assert.equal(answer.finishReason, "stop");
    assert.equal(answer.usage.totalTokens, answer.usage.inputTokens + answer.usage.outputTokens);
    const chat = await generateText({ ...given, model: openai.chat(CONFORMANCE_MODEL), prompt: PROMPT });
    assert.equal(answer.text, chat.text);
    const short = await generateText({ ...given, prompt: PROMPT, maxOutputTokens: 4 });
    assert.equal(short.finishReason, "length");
  },
  "streamText: same text as generateText": async () => {
    const whole = await generateText({ ...given, prompt: PROMPT });
    const stream = streamText({ ...given, prompt: PROMPT });
    let text = "";
    for await (const part of stream.textStream) text += part;
    assert.equal(text, whole.text);
    assert.equal(await stream.finishReason, whole.finishReason);
    assert.deepEqual((await stream.usage).totalTokens, whole.usage.totalTokens);
  },
  "a conversation: a system's turn, and an answer sent back with store: false": async () => {
    const providerOptions = { openai: { store: false } };
    const first = await generateText({ ...given, system: "Be brief.", prompt: PROMPT, providerOptions });
    const messages = [{ role: "user", content: PROMPT }, ...first.response.messages, { role: "user", content: "More." }];
    const second = await generateText({ ...given, system: "Be brief.", messages, providerOptions });
    assert.ok(second.usage.inputTokens > first.usage.inputTokens);
  },
  "guidance and best_of, added to the body by a fetch of one's own": async () => {
    let body;
    const fetch = async (url, options) => {
      const asked = { ...JSON.parse(options.body), guidance: "bon", best_of: 2 };
      const response = await globalThis.fetch(url, { ...options, body: JSON.stringify(asked) });
      body = await response.clone().json();
      return response;
    };
    const guided = createOpenAI({ baseURL, apiKey: CONFORMANCE_KEY, fetch });
    await generateText({ ...given, model: guided(CONFORMANCE_MODEL), prompt: PROMPT });
    assert.equal(body.guidance.method, "bon");
    assert.equal(body.reward, Math.max(...body.guidance.rewards[0]));
  },
  "errors: tools, structured output, an unknown model and a wrong key as its exceptions": async () => {
    const inputSchema = jsonSchema({ type: "object", properties: {}, additionalProperties: false });
    const tools = { now: tool({ description: "the time", inputSchema }) };
    assert.deepEqual(await refused(() => generateText({ ...given, prompt: "Hi", tools })), [400, "tools"]);
    const object = () => generateObject({ ...given, prompt: "Hi", schema: inputSchema });
    assert.deepEqual(await refused(object), [400, "text.format.type"]);
    assert.deepEqual(await refused(() => generateText({ ...given, model: openai("gpt-4o"), prompt: "Hi" })), [404, "model"]);
    const stranger = createOpenAI({ baseURL, apiKey: "wrong" });
    assert.deepEqual(await refused(() => generateText({ ...given, model: stranger(CONFORMANCE_MODEL), prompt: "Hi" })), [401, null]);
  },
};

const { dependencies } = JSON.parse(readFileSync(new URL("package.json", import.meta.url)));
console.log(JSON.stringify({ version: dependencies.ai, checks: Object.keys(checks).length }));
for (const [check, run] of Object.entries(checks)) {
  const started = performance.now();
  const error = await run().then(() => null, (raised) => String(raised).slice(0, 500));
  console.log(JSON.stringify({ check, passed: error === null, seconds: (performance.now() - started) / 1000, error }));
  if (error) process.exitCode = 1;
}
