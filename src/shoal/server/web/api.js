// Requests to the server that this page came from, and their streams.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers() {
  const key = sessionStorage.getItem("shoal.key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function check(answer) {
  if (answer.ok) return answer;
  let message = `the server answered ${answer.status}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // not in OpenAI's shape: the status has to do
  }
  throw new ApiError(message, answer.status);
}

export async function get(path, signal) {
  return (await check(await fetch(path, { headers: headers(), signal }))).json();
}

export async function post(path, body, signal) {
  const sent = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  return (await check(await fetch(path, sent))).json();
}

/** The events of a stream, each as it comes. */
export async function* stream(path, body, signal) {
  const sent = { method: "POST", headers: headers(), body: JSON.stringify({ ...body, stream: true }), signal };
  const answer = await check(await fetch(path, sent));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError("the connection ended before the answer did", 0);
      const lines = (rest + value).split("\n\n");
      rest = lines.pop();
      for (const line of lines) {
        const data = line.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, event.error.code);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function raw(text) {
  return Uint8Array.from(atob(text), (char) => char.charCodeAt(0)).buffer;
}

function half(bits) {
  const [sign, power, part] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  return sign * (power ? 2 ** (power - 15) * (1 + part / 1024) : 2 ** -24 * part);
}

/** Rows of `routed_experts`: experts, and weights or null, K of each layer one after the other. */
export function rows(told) {
  const [count, layers, top] = told.shape;
  const experts = new Int16Array(raw(told.experts));
  const weights = told.weights && Float32Array.from(new Uint16Array(raw(told.weights)), half);
  const size = layers * top;
  return Array.from({ length: count }, (_, at) => ({
    position: told.start + at,
    experts: experts.subarray(at * size, (at + 1) * size),
    weights: weights && weights.subarray(at * size, (at + 1) * size),
  }));
}
