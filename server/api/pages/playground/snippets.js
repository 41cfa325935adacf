// A request as others may send it.

import { pathOf, server } from "./api.js";

// For a shell. The key is taken from the variable that our own client reads.
export function curl(body, keyed) {
  const quoted = JSON.stringify(body).replaceAll("'", "'\\''");
  const key = keyed ? "  -H \"Authorization: Bearer $ENTRGI_API_KEY\" \\\n" : "";
  return `curl -s ${server}${pathOf(body)} -H 'Content-Type: application/json' \\\n${key}  -d '${quoted}'\n`;
}

const OPENAI = ["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "seed"];

// For OpenAI's client, which takes our fields in `extra_body`. JSON's strings, numbers, lists and objects are Python's.
export function python(body, keyed) {
  const names = Object.keys(body);
  const ours = Object.fromEntries(names.filter((name) => !OPENAI.includes(name)).map((name) => [name, body[name]]));
  const given = [...names.filter((name) => OPENAI.includes(name)).map((name) => [name, body[name]]), ["extra_body", ours]];
  const call = given.map(([name, value]) => `    ${name}=${JSON.stringify(value)},\n`).join("");
  const [endpoint, text] = body.messages ? ["chat.completions", "message.content"] : ["completions", "text"];
  const key = keyed ? "os.environ[\"ENTRGI_API_KEY\"]" : "\"none\"";
  return `${keyed ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${server}/v1", api_key=${key})
answer = client.${endpoint}.create(
${call})
print(answer.choices[0].${text})
`;
}
