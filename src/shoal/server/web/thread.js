// A conversation: what was asked, what came, and which token went where. One on the page, or two side by side.

import { post, rows, stream } from "./api.js";
import { el, number } from "./draw.js";
import { copyText, Prose } from "./prose.js";

const LOOK_BACK = 512; // tokens of a prompt whose experts are asked for; a long one's earlier tokens are not

/** A prompt and its answer, token by token, and the choices of experts that are known so far. */
export class Exchange {
  constructor(shape, name) {
    this.shape = shape;
    this.name = name;
    this.tokens = []; // {text, from, logprob, experts, weights}
    this.first = 0; // the position of the first of them
    this.counts = new Uint32Array(shape.layers.length * shape.experts);
    this.known = -1; // the last token whose experts are known
  }

  add(text, from, logprob = null) {
    this.tokens.push({ text, from, logprob, experts: null, weights: null });
    return this.tokens.length - 1;
  }

  route({ position, experts, weights }) {
    const token = this.tokens[position - this.first];
    if (!token || token.experts) return;
    [token.experts, token.weights] = [experts, weights];
    this.known = Math.max(this.known, position - this.first);
    const { top_k: top, experts: all } = this.shape;
    experts.forEach((expert, at) => {
      if (expert >= 0) this.counts[Math.floor(at / top) * all + expert] += 1;
    });
  }
}

export class Thread {
  /** `page` is what threads share: model, settings(), show(exchange, token), follow(exchange), said(text). */
  constructor(page, letter) {
    this.page = page;
    this.letter = letter;
    this.messages = [];
    this.exchanges = [];
    this.abort = null;
    this.list = el("ol", { class: "turns" });
    this.root = el("section", { class: "thread", "aria-label": letter ? `Conversation ${letter}` : "Conversation" }, letter ? el("h2", { class: "letter" }, letter) : null, this.list);
  }

  get busy() {
    return this.abort !== null;
  }

  stop() {
    this.abort?.abort();
  }

  /** A user's words, and the answer to them. True if there was one. */
  async ask(text) {
    const settings = this.page.settings();
    const chat = settings.mode === "chat";
    const said = el("div", { class: "said prose" });
    const turn = el("li", { class: chat ? "turn user" : "turn user prompt" }, el("h3", { class: "unseen" }, "You"), said);
    const prose = new Prose(said, { plain: true });
    prose.push(text, []);
    this.list.append(turn);
    if (!chat) return this.answer(turn, said, { prompt: text });
    this.messages.push({ role: "user", content: text });
    return this.answer(turn, said, { text });
  }

  async answer(turn, said, { prompt = null, text = null }) {
    const settings = this.page.settings();
    const { model } = this.page;
    const exchange = new Exchange(model, this.letter);
    this.exchanges.push(exchange);
    const view = new Answer(this, exchange, prompt !== null);
    this.list.append(view.root);
    this.page.scroll();
    this.abort = new AbortController();
    this.page.changed();
    const before = performance.now();
    let finish = null;
    try {
      const asked = prompt === null ? this.conversation(settings) : { prompt };
      if (model.layers.length) await this.readPrompt(exchange, asked, said, text ?? prompt);
      const body = { ...asked, ...settings.sampling, stream_options: { include_usage: true } };
      body.logprobs = prompt === null ? true : 0;
      if (prompt !== null && body.max_tokens === undefined) body.max_tokens = 256;
      if (model.layers.length) Object.assign(body, { return_routed_experts: true, routed_experts_start_len: exchange.first });
      const path = prompt === null ? "/v1/chat/completions" : "/v1/completions";
      view.started = performance.now();
      for await (const event of stream(path, body, this.abort.signal)) {
        for (const choice of event.choices) {
          view.take(choice);
          finish = choice.finish_reason ?? finish;
        }
        if (event.usage) view.usage = event.usage;
        if (exchange.tokens.length) this.page.follow(exchange);
      }
    } catch (error) {
      if (error.name !== "AbortError") {
        view.fail(error, view.started - before);
        if (prompt === null && !view.tokens) {
          this.messages.pop();
          this.page.refused(error, text);
        }
        return false;
      }
      finish = "stopped";
    } finally {
      this.abort = null;
      this.page.changed();
    }
    view.end(finish);
    if (prompt === null) this.messages.push(view.message());
    this.page.said(view.spoken(finish));
    return true;
  }

  conversation(settings) {
    const system = settings.system ? [{ role: "system", content: settings.system }] : [];
    const asked = { messages: [...system, ...this.messages] };
    if (settings.tools) asked.tools = settings.tools;
    if (settings.thinking && this.page.model.thinks) asked.chat_template_kwargs = { thinking: settings.thinking === "on" };
    return asked;
  }

  /** The tokens of the prompt, the last of them, so that what is told of positions has somewhere to go. */
  async readPrompt(exchange, asked, said, text) {
    const read = await post("/tokenize", { ...asked, return_token_strs: true }, this.abort.signal);
    exchange.first = Math.max(0, read.count - LOOK_BACK);
    const strings = read.token_strs.slice(exchange.first);
    for (const each of strings) exchange.add(each, "prompt");
    if (!text) return;
    // The user's own words among them: shown again, a span for each token.
    const at = strings.join("").lastIndexOf(text);
    if (at < 0) return;
    const owners = [];
    let offset = 0;
    strings.forEach((each, token) => {
      const start = Math.max(0, offset - at);
      if (offset + each.length > at && start < text.length) owners.push([start, token]);
      offset += each.length;
    });
    said.replaceChildren();
    new Prose(said, { plain: true }).push(text, owners);
    this.page.bind(said, exchange);
  }
}

/** An answer as it comes. */
class Answer {
  constructor(thread, exchange, plain) {
    Object.assign(this, { thread, exchange, plain, page: thread.page, tokens: 0, usage: null, calls: [], content: "", reasoning: "" });
    [this.started, this.firstAt, this.lastAt] = [0, null, null];
    this.raw = ""; // what the tokens say, markers included
    this.marks = []; // [offset in raw, token]
    this.at = 0; // up to here raw has been shown
    this.decoder = new TextDecoder();
    this.body = el("div", { class: "prose", tabindex: "0", role: "group", "aria-label": "Answer. Left and right arrow walk its tokens." });
    this.prose = new Prose(this.body, { plain });
    this.meta = el("p", { class: "meta" }, el("span", { class: "wait" }, "waiting"));
    this.root = el("li", { class: "turn model", "aria-busy": "true" }, el("h3", { class: "unseen" }, "Answer"), this.body, this.meta);
    this.page.bind(this.root, exchange);
  }

  take(choice) {
    const now = performance.now();
    const told = this.plain ? this.list(choice.logprobs) : (choice.logprobs?.content ?? []);
    for (const { bytes, token, logprob } of told) {
      const text = bytes?.length ? this.decoder.decode(Uint8Array.from(bytes), { stream: true }) : bytes ? "" : token;
      this.marks.push([this.raw.length, this.exchange.add(text, "answer", logprob)]);
      this.raw += text;
    }
    this.tokens += told.length;
    if (told.length) {
      this.firstAt ??= now;
      this.lastAt = now;
    }
    if (choice.routed_experts) rows(choice.routed_experts).forEach((row) => this.exchange.route(row));
    if (this.plain) this.show(choice.text, this.prose);
    const delta = choice.delta ?? {};
    if (delta.reasoning_content) this.think(delta.reasoning_content);
    if (delta.content) {
      this.thought();
      this.content += delta.content;
      this.show(delta.content, this.prose);
    }
    for (const call of delta.tool_calls ?? []) this.call(call);
    if (told.length) this.tell();
    this.page.scroll();
  }

  list(logprobs) {
    return (logprobs?.tokens ?? []).map((token, at) => ({ token, logprob: logprobs.token_logprobs[at] }));
  }

  /** Text goes to the tokens that said it: it is the next of the raw text that reads so. */
  show(text, prose) {
    if (!text) return;
    const found = this.raw.indexOf(text, this.at);
    const start = found < 0 ? this.raw.length : found;
    const end = start + text.length;
    const owners = [];
    for (let at = this.marks.length - 1; at >= 0; at--) {
      const [offset, token] = this.marks[at];
      if (offset < end || found < 0) owners.unshift([Math.max(0, offset - start), token]);
      if (offset <= start) break;
    }
    this.at = found < 0 ? this.raw.length : end;
    prose.push(text, owners);
  }

  think(text) {
    if (!this.thinking) {
      this.since = performance.now();
      this.summary = el("summary", {}, "Thinking");
      const inside = el("div", { class: "prose" });
      this.thinking = new Prose(inside);
      this.folded = el("details", { class: "thinking", "aria-label": "Thinking" }, this.summary, inside);
      this.body.before(this.folded);
      this.page.said("Thinking");
    }
    this.reasoning += text;
    this.show(text, this.thinking);
  }

  thought() {
    if (!this.thinking || this.settled) return;
    this.settled = true;
    this.summary.textContent = `Thought for ${((performance.now() - this.since) / 1000).toFixed(1)} s`;
  }

  call({ index, id, function: given }) {
    this.thought();
    let call = this.calls[index];
    if (!call) {
      call = this.calls[index] = { id, name: given.name, arguments: "", pre: el("pre", { tabindex: "0", "aria-label": "arguments" }) };
      call.root = el("section", { class: "call", "aria-label": `Tool call: ${given.name}` }, el("p", { class: "heading" }, "Calls ", el("code", {}, given.name)), call.pre);
      this.meta.before(call.root);
    }
    call.arguments += given.arguments ?? "";
    call.pre.textContent = call.arguments;
  }

  get speed() {
    const span = (this.lastAt - this.firstAt) / 1000;
    return this.tokens > 1 && span > 0 ? (this.tokens - 1) / span : null;
  }

  tell(finish = null) {
    const parts = [`${number.format(this.tokens)} token${this.tokens === 1 ? "" : "s"}`];
    if (this.speed) parts.push(`${this.speed.toFixed(this.speed < 100 ? 1 : 0)} tokens/s`);
    if (this.firstAt) parts.push(`first after ${((this.firstAt - this.started) / 1000).toFixed(2)} s`);
    if (this.usage) {
      const cached = this.usage.prompt_tokens_details?.cached_tokens;
      parts.push(`prompt ${number.format(this.usage.prompt_tokens)}${cached ? `, ${number.format(cached)} from the cache` : ""}`);
    }
    if (finish === "length") parts.push("cut at its longest");
    if (finish === "stopped") parts.push("stopped");
    this.meta.textContent = parts.join(" · ");
  }

  end(finish) {
    this.thought();
    this.root.removeAttribute("aria-busy");
    this.tell(finish);
    const text = () => this.content || this.raw;
    const copy = el("button", { type: "button", class: "quiet", onclick: () => copyText(copy, text()) }, "Copy");
    this.meta.append(copy);
    this.calls = this.calls.filter(Boolean);
    for (const call of this.calls) {
      try {
        call.pre.textContent = JSON.stringify(JSON.parse(call.arguments), null, 2);
      } catch {
        // cut off: it stays as it came
      }
    }
    if (this.calls.length && finish === "tool_calls") this.askForResults();
    if (!this.body.childNodes.length && !this.prose.source) this.body.remove();
  }

  askForResults() {
    const form = el("form", { class: "results", "aria-label": "Results of the tools" });
    for (const call of this.calls) {
      call.field = el("textarea", { rows: "2", spellcheck: "false" });
      form.append(el("label", {}, `What ${call.name} returns`, call.field));
    }
    form.append(el("button", { class: "primary" }, "Give back"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      for (const call of this.calls) this.thread.messages.push({ role: "tool", tool_call_id: call.id, content: call.field.value });
      form.querySelectorAll("textarea").forEach((field) => (field.readOnly = true));
      form.lastChild.remove();
      this.thread.answer(this.root, el("div"), {});
    });
    this.meta.before(form);
  }

  message() {
    const made = { role: "assistant", content: this.content };
    if (this.calls.length) {
      made.tool_calls = this.calls.map(({ id, name, arguments: given }) => ({ id, type: "function", function: { name, arguments: given } }));
    }
    return made;
  }

  spoken(finish) {
    const said = (this.content || this.raw).slice(0, 2000);
    return finish === "stopped" ? `Stopped after ${this.tokens} tokens.` : `Answer: ${said}`;
  }

  fail(error) {
    this.root.removeAttribute("aria-busy");
    if (this.tokens) this.tell();
    else this.meta.remove();
    this.root.append(el("p", { class: "error", role: "alert" }, error.message));
  }
}
