// Requests to the server, and the events of its streams.

/** An error that is told to the user as it is. */
export class Told extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Fetch a path of the server; throw `Told` where that fails. Paths are relative, for proxies. */
export async function ask(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Told("The server does not answer. Is it running, and is the network there?");
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  let message = `The server answered with status ${response.status}.`;
  let code = null;
  try {
    ({ message, code } = (await response.json()).error);
  } catch {
    // not in our form, as of a proxy: the status has to do
  }
  return new Told(String(message), response.status, code);
}

/** Post a request, and yield each object of the answer's stream until its end. */
export async function* stream(path, key, body, signal) {
  const response = await ask(path, key, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const told = JSON.parse(data);
    if (told.error) throw new Told(String(told.error.message));
    yield told;
  }
  throw new Told("The connection ended before the answer did. What was read stays in the cache.");
}

/** Yield the data of each event. Comments, which keep the connection open, are left out. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        } else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may be gone already
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Told("The connection was lost. What was read stays in the cache: send it again.");
  }
}
