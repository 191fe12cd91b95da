// The map: which experts took the tokens of an exchange, and of one token, layer by layer, with the weights the
// engine used. Two exchanges are drawn one above the other, with the share of choices that they have in common.

import { cellAt, el, heat } from "./draw.js";

export class Experts {
  constructor(root, shape) {
    this.root = root;
    this.shape = shape;
    this.exchange = null; // the one whose token is read out
    this.token = -1;
    this.live = true; // follow the newest token
    this.shown = []; // exchanges on the map
    this.queued = false;
    this.maps = el("div", { class: "maps" });
    this.common = el("p", { class: "common" });
    this.slider = el("input", { type: "range", min: "0", max: "0", value: "0", "aria-label": "Token", oninput: () => this.pick(this.exchange, +this.slider.value) });
    this.where = el("p", { class: "where" });
    this.body = el("tbody");
    this.table = el("table", { class: "layers" }, el("caption", { class: "unseen" }, "Experts of the token by layer, with their weights"), el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Layer"), el("th", { scope: "col" }, "Experts and weights"))), this.body);
    this.tint = el("select", { id: "tint", onchange: () => this.colour() }, el("option", { value: "" }, "no colour"), ...shape.layers.map((layer, at) => el("option", { value: String(at) }, `layer ${layer}`)));
    root.append(
      el("div", { class: "top" }, el("h2", {}, "Experts"), el("label", { class: "tint" }, "Colour text by ", this.tint)),
      el("p", { class: "hint" }, `${shape.layers.length} layers of ${shape.experts} experts, ${shape.top_k} a token${shape.shared ? `, and ${shape.shared} that all share` : ""}.`),
      this.maps,
      this.common,
      el("div", { class: "token" }, this.slider, this.where),
      el("div", { class: "rows", tabindex: "0", role: "group", "aria-label": "Experts by layer" }, this.table),
    );
    this.empty();
  }

  empty() {
    [this.exchange, this.token, this.live, this.shown] = [null, -1, true, []];
    this.queue();
  }

  /** The exchanges to draw; `newest` is where tokens come now. */
  follow(exchanges, newest) {
    this.shown = exchanges;
    if (this.live || !exchanges.includes(this.exchange)) {
      this.exchange = newest;
      this.token = newest.known;
      this.live = true;
    }
    this.queue();
  }

  pick(exchange, token) {
    if (!exchange) return;
    if (!this.shown.includes(exchange)) this.shown = [exchange];
    [this.exchange, this.token] = [exchange, token];
    this.live = token >= exchange.tokens.length - 1;
    this.queue();
  }

  queue() {
    if (this.queued) return;
    this.queued = true;
    requestAnimationFrame(() => {
      this.queued = false;
      if (!this.root.hidden) this.draw();
      this.mark();
      this.colour();
    });
  }

  draw() {
    const { layers, experts } = this.shape;
    this.root.classList.toggle("bare", !this.shown.length);
    while (this.maps.children.length > this.shown.length) this.maps.lastChild.remove();
    this.shown.forEach((exchange, at) => {
      let figure = this.maps.children[at];
      if (!figure) {
        const canvas = el("canvas", { role: "img" });
        const note = el("figcaption");
        figure = el("figure", { class: "map" }, note, el("div", {}, canvas));
        canvas.addEventListener("mousemove", (event) => this.read(note, this.shown[at], cellAt(canvas, event, layers.length, experts)));
        canvas.addEventListener("mouseleave", () => this.read(note, this.shown[at], null));
        this.maps.append(figure);
      }
      const canvas = figure.querySelector("canvas");
      const marks = exchange === this.exchange ? this.marks() : [];
      heat(canvas, layers.length, experts, (row, column) => exchange.counts[row * experts + column], { marks });
      const said = `${exchange.name ? `${exchange.name}: ` : ""}${exchange.tokens.filter((token) => token.experts).length} tokens`;
      canvas.setAttribute("aria-label", `${said}. ${busiest(exchange)}`);
      if (!canvas.matches(":hover")) this.read(figure.querySelector("figcaption"), exchange, null);
    });
    this.common.textContent = this.shown.length === 2 ? shared(...this.shown) : "";
    this.readToken();
  }

  read(note, exchange, cell) {
    const { layers, experts } = this.shape;
    const name = exchange.name ? `${exchange.name} · ` : "";
    if (!cell) {
      note.textContent = `${name}layers down, experts across`;
      return;
    }
    const [row, at] = cell;
    const counts = exchange.counts.subarray(row * experts, (row + 1) * experts);
    const all = counts.reduce((sum, each) => sum + each, 0);
    note.textContent = `${name}layer ${layers[row]}, expert ${at}: ${all ? ((100 * counts[at]) / all).toFixed(1) : 0}% of its choices`;
  }

  current() {
    return this.exchange?.tokens[this.token] ?? null;
  }

  marks() {
    const token = this.current();
    if (!token?.experts) return [];
    const { top_k: top } = this.shape;
    const most = token.weights ? Math.max(...token.weights) : 1;
    return Array.from(token.experts, (expert, at) => [Math.floor(at / top), expert, token.weights ? token.weights[at] / most : 1]).filter(([, expert]) => expert >= 0);
  }

  readToken() {
    const token = this.current();
    const { layers, top_k: top } = this.shape;
    this.slider.disabled = !token;
    if (!token) {
      this.where.textContent = this.shown.length ? "" : "Send something: the map fills as tokens come.";
      this.body.replaceChildren();
      return;
    }
    this.slider.max = String(this.exchange.tokens.length - 1);
    this.slider.value = String(this.token);
    const spelled = JSON.stringify(token.text).slice(1, -1) || "part of a character";
    const chance = token.logprob === null ? "" : `, ${(100 * Math.exp(token.logprob)).toFixed(1)}%`;
    this.where.replaceChildren(el("code", {}, spelled), ` ${this.exchange.name ? `${this.exchange.name}, ` : ""}${token.from} token ${this.exchange.first + this.token + 1}${chance}`);
    if (!token.experts) {
      this.slider.setAttribute("aria-valuetext", `${spelled}, no experts`);
      const last = this.token === this.exchange.tokens.length - 1;
      this.body.replaceChildren(el("tr", {}, el("td", { colspan: "2", class: "hint" }, last ? "The last token has gone through no expert yet." : "Not told.")));
      return;
    }
    const most = token.weights ? Math.max(...token.weights) : 1;
    const rows = layers.map((layer, row) => {
      const cell = el("td");
      for (let at = row * top; at < (row + 1) * top; at++) {
        if (token.experts[at] < 0) continue;
        const weight = token.weights?.[at];
        const chip = el("span", { class: "chip" }, el("b", {}, String(token.experts[at])), weight === undefined ? null : ` ${weight.toFixed(2)}`);
        chip.style.setProperty("--share", String(weight === undefined ? 0.5 : weight / most));
        cell.append(chip, " ");
      }
      return el("tr", {}, el("th", { scope: "row" }, String(layer)), cell);
    });
    this.body.replaceChildren(...rows);
    const first = Array.from(token.experts.subarray(0, top)).join(", ");
    this.slider.setAttribute("aria-valuetext", `${spelled}; layer ${layers[0]}: experts ${first}`);
  }

  /** The token that is read out, marked where it stands in the text. */
  mark() {
    for (const node of document.querySelectorAll(".picked")) node.classList.remove("picked");
    if (this.root.hidden || this.live || !this.exchange) return;
    for (const root of this.exchange.roots ?? []) {
      root.querySelectorAll(`[data-token="${this.token}"]`).forEach((node) => node.classList.add("picked"));
    }
  }

  /** Each token of the text in the colour of the expert that it weighs most in a layer. */
  colour() {
    const on = this.tint.value !== "" && !this.root.hidden;
    document.getElementById("threads").classList.toggle("tinted", on);
    if (!on) return;
    const { top_k: top, experts } = this.shape;
    for (const exchange of this.shown) {
      for (const root of exchange.roots ?? []) {
        for (const node of root.querySelectorAll("[data-token]")) {
          const expert = exchange.tokens[node.dataset.token]?.experts?.[this.tint.value * top];
          if (expert === undefined || expert < 0) continue;
          const hue = ((expert * 360) / experts) % 360;
          if (node.dataset.hue !== String(hue)) {
            node.dataset.hue = String(hue);
            node.style.setProperty("--hue", String(hue));
          }
        }
      }
    }
  }
}

function busiest({ counts, shape }) {
  return shape.layers.slice(0, 4).map((layer, row) => {
    const own = counts.subarray(row * shape.experts, (row + 1) * shape.experts);
    return `Layer ${layer}: expert ${own.indexOf(Math.max(...own))} most.`;
  }).join(" ");
}

/** How much two exchanges use the same experts: what their shares have in common, summed, mean over layers. */
function shared(one, other) {
  const { layers, experts } = one.shape;
  const sums = layers.map((_, row) => {
    const [a, b] = [one, other].map(({ counts }) => {
      const own = counts.subarray(row * experts, (row + 1) * experts);
      const all = own.reduce((sum, each) => sum + each, 0);
      return all ? Array.from(own, (each) => each / all) : null;
    });
    return a && b ? a.reduce((sum, share, at) => sum + Math.min(share, b[at]), 0) : null;
  });
  if (sums.some((sum) => sum === null)) return "";
  const mean = sums.reduce((sum, each) => sum + each, 0) / sums.length;
  const least = sums.indexOf(Math.min(...sums));
  return `A and B have ${(100 * mean).toFixed(0)}% of their choices in common; least in layer ${layers[least]}, ${(100 * sums[least]).toFixed(0)}%.`;
}
