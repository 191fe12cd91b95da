// How busy the server is, over the last ten minutes: rates, cache, queue, and the heat of the experts.

import { get } from "./api.js";
import { cellAt, el, heat, number, short, sparkline } from "./draw.js";

const KEPT = 600; // seconds

const CARDS = [
  // name, unit, of a sample and the one before
  ["Generating", "tokens/s", (now, last, at) => rate(now, last, at.generated, at.time)],
  ["Reading prompts", "tokens/s", (now, last, at) => rate(now, last, at.prompt_positions, at.time)],
  ["Running", "requests", (now, last, at) => now[at.running]],
  ["Waiting", "requests", (now, last, at) => now[at.waiting]],
  ["Cache in use", "%", (now, last, at) => 100 * (1 - now[at.pages_free] / now[at.pages]), 100],
  ["Prompts found in cache", "%", (now, last, at) => (now[at.prompt_positions] ? (100 * now[at.prompt_positions_cached]) / now[at.prompt_positions] : 0), 100],
];

function rate(now, last, column, time) {
  return last && now[time] > last[time] ? (now[column] - last[column]) / (now[time] - last[time]) : 0;
}

export class Load {
  constructor(root, model) {
    this.root = root;
    this.model = model;
    this.rows = [];
    this.cards = CARDS.map(([name]) => {
      const value = el("strong");
      const range = el("span", { class: "range" });
      const picture = el("div", { class: "picture" });
      return { value, range, picture, root: el("li", { class: "card" }, el("h3", {}, name), value, picture, range) };
    });
    this.ledger = el("pre", { tabindex: "0", "aria-label": "Memory" });
    root.append(el("h2", {}, "Load"), el("ul", { class: "cards" }, ...this.cards.map((card) => card.root)));
    if (model.layers.length) this.addHeat();
    root.append(el("h2", {}, "Memory"), this.ledger);
  }

  addHeat() {
    const { layers, experts } = this.model;
    this.layer = el("select", { id: "heat-layer", onchange: () => this.readHeat() }, ...layers.map((layer, at) => el("option", { value: String(at) }, `layer ${layer}`)));
    this.all = el("canvas", { role: "img" });
    this.one = el("canvas", { role: "img" });
    this.allNote = el("figcaption");
    this.oneNote = el("figcaption");
    this.body = el("tbody");
    this.all.addEventListener("click", (event) => {
      const cell = cellAt(this.all, event, layers.length, experts);
      if (cell) {
        this.layer.value = String(cell[0]);
        this.readHeat();
      }
    });
    const numbers = el("table", {}, el("thead", {}, el("tr", {}, ...["Layer", "Busiest experts", "Busiest over mean", "Experts in use"].map((name) => el("th", { scope: "col" }, name)))), this.body);
    this.root.append(
      el("div", { class: "top" }, el("h2", {}, "Expert heat"), el("label", {}, "Over time: ", this.layer)),
      el("div", { class: "two" }, el("figure", { class: "map" }, this.allNote, el("div", {}, this.all)), el("figure", { class: "map" }, this.oneNote, el("div", {}, this.one))),
      el("details", { "aria-label": "The last minute in numbers" }, el("summary", {}, "The last minute in numbers"), el("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Load of experts by layer" }, numbers)),
    );
  }

  /** Samples that came, and what the server says of itself. */
  take(state) {
    this.at = Object.fromEntries(state.columns.map((name, place) => [name, place]));
    const steps = this.at.steps;
    for (const row of state.rows) {
      if (this.rows.length && row[steps] < this.rows.at(-1)[steps]) this.rows = []; // the engine was started again
      this.rows.push(row);
    }
    this.rows.splice(0, Math.max(0, this.rows.length - KEPT));
    this.state = state;
    if (!this.root.hidden) this.draw();
  }

  get newest() {
    return this.rows.at(-1)?.[0] ?? 0;
  }

  draw() {
    if (!this.state) return;
    CARDS.forEach(([, unit, measure, top], place) => {
      const values = this.rows.map((row, at) => measure(row, this.rows[at - 1], this.at));
      const card = this.cards[place];
      card.value.replaceChildren(values.length ? short(values.at(-1)) : "–", el("small", {}, ` ${unit}`));
      card.picture.replaceChildren(sparkline(values, top));
      card.range.textContent = values.length ? `at most ${short(Math.max(...values))}` : "";
    });
    this.ledger.textContent = this.state.ledger ?? "The engine is loading.";
  }

  async readHeat() {
    if (this.root.hidden || !this.layer) return;
    const { layers, experts } = this.model;
    const told = await get(`/page/heat.json?layer=${this.layer.value}`);
    const { load, over_time: times } = told;
    const span = Math.round(told.seconds);
    const total = load.flat().reduce((sum, each) => sum + each, 0);
    this.allNote.textContent = total ? `Layers down, experts across; the last ${span} s` : "Nothing was routed in the last minute";
    heat(this.all, layers.length, experts, (row, at) => load[row]?.[at] ?? 0);
    this.all.setAttribute("aria-label", `Load of every expert in the last ${span} seconds; the numbers are below`);
    const layer = layers[told.layer];
    this.oneNote.textContent = times.length ? `Layer ${layer}: experts down, the last ${Math.round(told.times.at(-1) - told.times[0] + 5)} s across` : `Layer ${layer}`;
    heat(this.one, experts, Math.max(times.length, 1), (row, at) => times[at]?.[row] ?? 0, { height: Math.max(1, Math.min(8, 220 / experts)) });
    this.one.setAttribute("aria-label", `Load of the experts of layer ${layer} over time`);
    this.body.replaceChildren(...load.map((counts, row) => {
      const all = counts.reduce((sum, each) => sum + each, 0);
      const order = counts.map((count, at) => [count, at]).sort((a, b) => b[0] - a[0]).slice(0, 4);
      const most = all ? order.map(([count, at]) => `${at} (${((100 * count) / all).toFixed(1)}%)`).join(", ") : "–";
      const over = all ? `${((order[0][0] * experts) / all).toFixed(2)}×` : "–";
      return el("tr", {}, el("th", { scope: "row" }, String(layers[row])), el("td", {}, most), el("td", {}, over), el("td", {}, number.format(counts.filter(Boolean).length)));
    }));
  }
}
