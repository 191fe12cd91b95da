// The page: tabs, the composer, settings, and the threads that it sends to.

import { ApiError, get } from "./api.js";
import { Experts } from "./experts.js";
import { Load } from "./load.js";
import { Plan } from "./plan.js";
import { Thread } from "./thread.js";

const find = (id) => document.getElementById(id);
const DEFAULTS = { mode: "chat", temperature: "0.6", top_p: "0.95", max_tokens: "512" };
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const WIDE = matchMedia("(min-width: 60rem)");
const FINE = matchMedia("(pointer: fine)");

const owners = new WeakMap(); // an element -> the exchange whose tokens it shows

class App {
  constructor(model) {
    this.model = model;
    this.form = find("settings-form");
    this.fields = [find("prompt"), find("prompt-b")];
    this.pinned = true;
    this.threads = [];
    this.experts = model.layers.length ? new Experts(find("experts"), model) : null;
    this.load = new Load(find("load"), model);
    this.plan = new Plan(find("plan"), model);
    this.recall();
    this.reset();
    this.listen();
    if (this.experts) this.toggleExperts(WIDE.matches);
    else find("show-experts").hidden = true;
    this.poll();
  }

  // ---------------------------------------------------------------------------------------------
  // What threads ask of the page

  settings() {
    const value = (name) => this.form.elements[name].value.trim();
    const sampling = {};
    for (const name of NUMBERS) if (value(name) !== "") sampling[name] = Number(value(name));
    const stop = this.form.elements.stop.value.split("\n").filter(Boolean);
    if (stop.length) sampling.stop = stop;
    return { mode: value("mode"), system: value("system"), thinking: value("thinking"), tools: this.tools, sampling };
  }

  follow(exchange) {
    if (!this.experts) return;
    const newest = this.threads.map((thread) => thread.exchanges.at(-1)).filter(Boolean);
    this.experts.follow(newest.length ? newest : [exchange], exchange);
  }

  /** The tokens in an element are those of an exchange. */
  bind(element, exchange) {
    owners.set(element, exchange);
    (exchange.roots ??= []).push(element);
  }

  said(text) {
    find("say").textContent = text;
  }

  scroll() {
    if (this.pinned) requestAnimationFrame(() => this.pinned && find("scroll").scrollTo({ top: find("scroll").scrollHeight }));
  }

  changed() {
    const busy = this.threads.some((thread) => thread.busy);
    find("stop").hidden = !busy;
    find("send").hidden = busy;
    if (!busy && FINE.matches && document.activeElement === document.body) this.fields[0].focus();
  }

  refused(error, text) {
    if (text && !this.fields[0].value) this.fields[0].value = text;
    if (error instanceof ApiError && error.status === 401) this.askForKey();
  }

  // ---------------------------------------------------------------------------------------------

  listen() {
    const composer = find("composer");
    composer.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    for (const field of this.fields) {
      field.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
          event.preventDefault();
          this.send();
        }
      });
      field.addEventListener("input", () => grow(field));
    }
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !find("settings").open) this.stop();
    });
    find("stop").addEventListener("click", () => this.stop());
    find("reset").addEventListener("click", () => this.reset());
    find("compare").addEventListener("click", () => this.compare());
    find("show-experts").addEventListener("click", () => this.toggleExperts(find("experts").hidden));
    find("open-settings").addEventListener("click", () => this.openSettings());
    find("defaults").addEventListener("click", () => this.fill(DEFAULTS));
    this.form.addEventListener("submit", (event) => {
      if (!this.keep()) event.preventDefault();
    });
    find("settings").addEventListener("close", () => this.keep());
    const tabs = [...find("tabs").children];
    tabs.forEach((tab, at) => {
      tab.addEventListener("click", () => this.open(tab));
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        const next = step ? tabs[(at + step + tabs.length) % tabs.length] : { Home: tabs[0], End: tabs.at(-1) }[event.key];
        if (next) {
          event.preventDefault();
          this.open(next);
          next.focus();
        }
      });
    });
    const scroll = find("scroll");
    scroll.addEventListener("scroll", () => {
      this.pinned = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 48;
    });
    const threads = find("threads");
    for (const kind of ["mouseover", "click"]) threads.addEventListener(kind, (event) => this.point(event.target));
    threads.addEventListener("keydown", (event) => this.walk(event));
    const redraw = () => {
      this.experts?.queue();
      this.load.draw();
      this.load.readHeat();
    };
    addEventListener("resize", redraw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  }

  async send() {
    if (this.threads.some((thread) => thread.busy)) return;
    const asked = this.threads.map((thread, at) => [thread, this.fields[at].value]).filter(([, text]) => text.trim());
    if (!asked.length) return;
    for (const field of this.fields) {
      field.value = "";
      grow(field);
    }
    find("welcome")?.remove();
    this.pinned = true;
    if (this.experts) this.experts.live = true;
    await Promise.all(asked.map(([thread, text]) => thread.ask(text)));
  }

  stop() {
    for (const thread of this.threads) thread.stop();
  }

  reset() {
    this.stop();
    const two = find("compare").getAttribute("aria-pressed") === "true";
    this.threads = (two ? ["A", "B"] : [""]).map((letter) => new Thread(this, letter));
    find("threads").replaceChildren(...this.threads.map((thread) => thread.root));
    find("threads").classList.toggle("pair", two);
    if (!two) this.threads[0].root.append(welcome(this.model));
    this.experts?.empty();
    this.changed();
    if (FINE.matches) this.fields[0].focus({ preventScroll: true }); // elsewhere a keyboard would rise
  }

  compare() {
    const on = find("compare").getAttribute("aria-pressed") !== "true";
    find("compare").setAttribute("aria-pressed", String(on));
    find("second").hidden = !on;
    find("prompt-label").textContent = on ? "Prompt A" : "Prompt";
    find("prompt-label").classList.toggle("unseen", !on);
    this.reset();
  }

  toggleExperts(on) {
    find("experts").hidden = !on;
    find("show-experts").setAttribute("aria-pressed", String(on));
    find("chat").classList.toggle("mapped", on);
    this.experts.queue();
  }

  // ---------------------------------------------------------------------------------------------
  // Tokens in the text

  point(target) {
    const node = target.closest?.("[data-token]");
    const exchange = node && this.ownerOf(node);
    if (exchange) this.experts?.pick(exchange, Number(node.dataset.token));
  }

  ownerOf(node) {
    for (let at = node; at; at = at.parentElement) if (owners.has(at)) return owners.get(at);
    return null;
  }

  walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const root = event.target.closest?.(".turn.model .prose");
    if (!step || event.target !== root || !this.experts) return;
    const nodes = [...root.querySelectorAll("[data-token]")];
    const exchange = this.ownerOf(root);
    const at = this.experts.exchange === exchange ? nodes.findIndex((node) => Number(node.dataset.token) === this.experts.token) : -1;
    const next = nodes[at < 0 ? (step > 0 ? 0 : nodes.length - 1) : at + step];
    if (!next) return;
    event.preventDefault();
    this.experts.pick(exchange, Number(next.dataset.token));
    next.scrollIntoView({ block: "nearest" });
    requestAnimationFrame(() => this.said(this.experts.slider.getAttribute("aria-valuetext") ?? ""));
  }

  // ---------------------------------------------------------------------------------------------
  // Settings

  recall() {
    let kept = {};
    try {
      kept = JSON.parse(localStorage.getItem("shoal.settings") ?? "{}");
    } catch {
      localStorage.removeItem("shoal.settings");
    }
    this.fill({ ...DEFAULTS, ...kept });
    this.form.elements.key.value = sessionStorage.getItem("shoal.key") ?? "";
    find("thinking-field").hidden = !this.model.thinks;
    find("tools-field").hidden = !this.model.calls;
    if (!this.model.turns || location.hash === "#continue") this.form.elements.mode.value = "continue";
    this.keep();
  }

  fill(values) {
    for (const field of this.form.elements) if (field.name && field.name !== "key") field.value = values[field.name] ?? "";
  }

  openSettings() {
    find("settings").showModal();
  }

  askForKey() {
    this.openSettings();
    find("settings-error").textContent = "This server wants an API key.";
    this.form.elements.key.focus();
  }

  /** Take over what the dialog says. False, and a word on it, where the tools are no JSON. */
  keep() {
    const text = this.form.elements.tools.value.trim();
    try {
      this.tools = text ? JSON.parse(text) : null;
    } catch (error) {
      find("settings-error").textContent = `Tools are not JSON: ${error.message}`;
      return false;
    }
    find("settings-error").textContent = "";
    const { key, ...rest } = Object.fromEntries(new FormData(this.form));
    localStorage.setItem("shoal.settings", JSON.stringify(rest));
    if (key) sessionStorage.setItem("shoal.key", key);
    else sessionStorage.removeItem("shoal.key");
    const going = rest.mode === "continue";
    this.fields[0].placeholder = going ? "The beginning of a text" : "Ask something";
    return true;
  }

  // ---------------------------------------------------------------------------------------------
  // Tabs, and the state of the server

  open(tab) {
    for (const each of find("tabs").children) {
      const on = each === tab;
      each.setAttribute("aria-selected", String(on));
      each.tabIndex = on ? 0 : -1;
      find(each.getAttribute("aria-controls")).hidden = !on;
    }
    if (tab.id === "tab-load") {
      this.load.draw();
      this.load.readHeat().catch(() => {});
    }
    if (tab.id === "tab-plan" && !this.plan.out.childNodes.length) this.plan.read();
    if (tab.id === "tab-chat") this.experts?.queue();
  }

  async poll() {
    for (let round = 0; ; round++) {
      try {
        const state = await get(`/page/state.json?since=${this.load.newest}`);
        this.load.take(state);
        const { what, done, total } = state.progress;
        show(state.state, state.state === "loading" ? `${what}${total > 1 ? ` ${done} of ${total}` : ""}` : state.state);
        if (round % 5 === 0) await this.load.readHeat();
      } catch (error) {
        show("dead", error instanceof ApiError ? error.message : "not reachable");
      }
      await new Promise((done) => setTimeout(done, document.hidden ? 10_000 : 1000));
    }
  }
}

function show(state, text) {
  const node = find("state");
  node.dataset.state = state;
  if (node.textContent !== text) node.textContent = text;
}

function grow(field) {
  if (CSS.supports("field-sizing", "content")) return;
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function welcome(model) {
  const note = document.createElement("p");
  note.id = "welcome";
  note.textContent = model.layers.length
    ? "Hover a token, or walk them with the arrow keys, to see the experts that took it."
    : "This model is dense: it has no experts to show.";
  return note;
}

async function begin() {
  try {
    const model = await get("/page/model.json");
    find("model").textContent = model.name;
    document.title = `${model.name} · Shoal`;
    new App(model);
  } catch (error) {
    show("dead", error.message);
    if (error.status !== 401) throw error;
    const dialog = find("settings");
    dialog.showModal();
    find("settings-error").textContent = "This server wants an API key.";
    const form = find("settings-form");
    form.elements.key.focus();
    form.addEventListener("submit", () => {
      sessionStorage.setItem("shoal.key", form.elements.key.value);
      location.reload();
    });
  }
}

begin();
