// The server: what it has loaded, and answers as streams of chunks.

// The address under which the server is published, without a slash at the end.
export const server = new URL("..", import.meta.url).href.replace(/\/$/, "");

export const pathOf = (body) => (body.messages ? "/v1/chat/completions" : "/v1/completions");

async function ask(path, key, options) {
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(server + path, { ...options, headers });
  if (response.ok) return response;
  const told = await response.json().catch(() => null); // a proxy's answer may be anything
  throw new Error(told?.error?.message ?? `the server answers with status ${response.status}`);
}

// The diffusion model that is served, and the names of what gives rewards, those with a gradient first.
export async function models(key) {
  const { data } = await (await ask("/v1/models", key)).json();
  const rewards = ["reward", "scorer"].flatMap((type) => data.filter((model) => model.type === type)).map(({ id }) => id);
  return { model: data.find((model) => model.type === "diffusion"), rewards };
}

// Sends a request and gives each chunk of its stream to `take`. Fails as the request does, also after its first byte.
export async function stream(body, key, signal, take) {
  const asked = { ...body, stream: true, stream_canvas: true };
  const response = await ask(pathOf(body), key, { method: "POST", body: JSON.stringify(asked), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (buffer + value).split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      take(chunk);
    }
  }
}
