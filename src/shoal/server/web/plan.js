// What the loaded model costs: its parts, and on GPUs of one's choice whether it fits, how fast, for how much.

import { get } from "./api.js";
import { bytes, el, number, seconds, short } from "./draw.js";

const FIELDS = [
  ["gpu", "GPU"],
  ["count", "How many", "fewest"],
  ["weights", "Weights in"],
  ["batch", "At once", "all that fit"],
  ["prompt", "Prompt tokens", ""],
  ["output", "Answer tokens", ""],
];

export class Plan {
  constructor(root, model) {
    this.root = root;
    this.form = el("form", { class: "fields", "aria-label": "What to plan for" });
    for (const [name, label, hint] of FIELDS) {
      const options = { gpu: model.gpus, weights: ["bfloat16", "fp8", "int4", "float32"] }[name];
      const field = options
        ? el("select", { name }, ...options.map((each) => el("option", { value: each }, each)))
        : el("input", { name, type: "number", min: "1", step: "1", inputmode: "numeric", placeholder: hint });
      this.form.append(el("label", {}, label, field));
    }
    if (model.gpus.includes("h200")) this.form.elements.gpu.value = "h200";
    this.form.addEventListener("change", () => this.read());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.read();
    });
    this.out = el("div", { "aria-live": "polite" });
    root.append(el("h2", {}, "Plan"), el("p", { class: "hint" }, `What ${model.name} costs, by arithmetic on its config: nothing is run. Floors are the hardware's; predictions add what this engine adds, as measured on an H200.`), this.form, this.out);
  }

  async read() {
    const fields = [...new FormData(this.form)].filter(([, value]) => value !== "");
    try {
      this.draw(await get(`/page/plan.json?${new URLSearchParams(fields)}`));
    } catch (error) {
      this.out.replaceChildren(el("p", { class: "error", role: "alert" }, error.message));
    }
  }

  draw({ parameters, flops_per_token: flops, kv_bytes_per_token: kv, weight_bytes: stored, hardware, load, serving }) {
    const { memory, point } = serving;
    const how = serving.degree === 1 ? "a whole model each" : `${serving.layout} over ${serving.degree}`;
    const parts = Object.entries(parameters).filter(([name, value]) => !["total", "active"].includes(name) && value);
    const fits = point ? `Fits: ${number.format(point.batch)} at once` : "Does not fit: more GPUs, a smaller batch, or weights in fp8 or int4";
    this.out.replaceChildren(
      el("p", { class: point ? "verdict" : "verdict no" }, `${fits}, on ${serving.count} × ${hardware.gpu}, ${how}.`),
      el("div", { class: "columns" },
        block("Serving", table([
          ["Answers", serving.output === null ? "–" : `${short(serving.output)} tokens/s`],
          ["A decoding step", point ? `${seconds(point.predicted_s)}, floor ${seconds(point.floor_s)}, by ${point.bound}` : "–"],
          ["Prompts", `${short(serving.prefill)} tokens/s, floor ${short(serving.prefill_floor)}`],
          ["A million tokens of answers", serving.dollars_per_million === null ? "no price known" : `$${serving.dollars_per_million.toFixed(2)}`],
          ["Energy at full power", serving.joules_per_token === null ? "–" : `${(serving.joules_per_token / 3.6).toFixed(2)} kWh a million`],
          [`Room for ${number.format(load.prompt)} + ${number.format(load.output)}`, `${number.format(serving.room)} requests`],
        ])),
        block("Memory of a GPU", bars([["weights", memory.weights], ["cache", memory.cache], ["activations", memory.activations]], memory.limit, bytes), el("p", { class: "hint" }, `${bytes(memory.total)} of ${bytes(memory.limit)} that may be used`)),
        block("Parameters", bars(parts, parameters.total, (value) => short(value, 2)), el("p", { class: "hint" }, `${short(parameters.total, 2)} in all, ${short(parameters.active, 2)} read by a token`)),
        block("A token", table([
          ["Decoding", `${short(flops.decode / 1e6)} MFLOP`],
          ["Training", `${short(flops.training / 1e6)} MFLOP`],
          ["Cache, bfloat16", bytes(kv.bfloat16)],
          ...(kv.fp8 ? [["Cache, fp8", bytes(kv.fp8)]] : []),
          ["Weights in bfloat16", bytes(stored.bfloat16)],
          ["Weights in fp8", bytes(stored.fp8)],
        ])),
      ),
      serving.ladder.length ? block("Decoding, by batch", el("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Decoding by batch" }, el("table", {},
        el("thead", {}, el("tr", {}, ...["batch", "experts a layer", "floor", "predicted", "tokens/s", "each", "bound by"].map((name) => el("th", { scope: "col" }, name)))),
        el("tbody", {}, ...serving.ladder.map((step) => el("tr", {}, el("th", { scope: "row" }, number.format(step.batch)), ...[step.experts.toFixed(1), seconds(step.floor_s), seconds(step.predicted_s), short(step.tokens_per_second), short(step.tokens_per_second / step.batch), step.bound].map((cell) => el("td", {}, cell)))))))) : "",
      el("p", { class: "hint" }, `${hardware.gpu}: ${hardware.source}. Price: ${hardware.price_source}.`),
    );
  }
}

function block(title, ...children) {
  return el("section", {}, el("h3", {}, title), ...children);
}

function table(rows) {
  return el("table", { class: "pairs" }, el("tbody", {}, ...rows.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)))));
}

function bars(parts, whole, spell) {
  return el("table", { class: "bars" }, el("tbody", {}, ...parts.map(([name, value]) => {
    const bar = el("i");
    bar.style.setProperty("--share", String(Math.min(1, value / whole)));
    return el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, bar), el("td", { class: "value" }, spell(value)));
  })));
}
