// An answer's text as elements: paragraphs, lists, tables, code. It comes from a model, so it is not trusted: every
// character of it becomes a text node, links stay text, and whatever is not markup of the few kinds known here is
// shown as it is written. Each piece of text knows the token it came from, in `data-token`.

import { el } from "./draw.js";

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+/;
const HEADING = /^(#{1,6})\s+/;
const QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}([-*_])( *\1){2,}\s*$/;
const DASHES = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)+\|?\s*$/;
const INLINE = /(`+)([^`\n]+)\1|\*\*(?=\S)([^\n]+?\S|\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*\n]*[^\s*])\*(?![\w*])/g;

export class Prose {
  /** `plain` text is shown as it is. */
  constructor(root, { plain = false } = {}) {
    this.root = root;
    this.plain = plain;
    this.source = "";
    this.owners = []; // [offset, token]: from there on the text is of that token
    this.done = 0; // up to here elements are final
    this.tail = [];
    this.waiting = false;
  }

  /** More text; `owners` as above, within it. */
  push(text, owners) {
    for (const [offset, token] of owners) this.owners.push([this.source.length + offset, token]);
    this.source += text;
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => this.render());
  }

  render() {
    this.waiting = false;
    if (this.plain) {
      this.text(this.root, this.done, this.source.length);
      this.done = this.source.length;
      return;
    }
    for (const node of this.tail) node.remove();
    const blocks = split(this.source, this.done);
    for (const block of blocks) {
      const node = this.block(block);
      this.root.append(node);
      this.tail = [node];
      this.done = block.start;
    }
  }

  block({ kind, start, lines, lang, level }) {
    if (kind === "code") return this.code(lines, lang);
    if (kind === "rule") return el("hr");
    if (kind === "table") return this.table(lines);
    if (kind === "list") return this.list(lines);
    const made = kind === "heading" ? el("p", { role: "heading", "aria-level": Math.min(level + 2, 6), class: "heading" }) : el(kind === "quote" ? "blockquote" : "p");
    lines.forEach(([a, b], at) => {
      if (at) made.append("\n");
      this.inline(made, a, b);
    });
    if (!lines.length) this.inline(made, start, start);
    return made;
  }

  code(lines, lang) {
    const code = el("code");
    lines.forEach(([a, b]) => this.text(code, a, b));
    const copy = el("button", { type: "button", class: "copy", onclick: () => copyText(copy, code.textContent) }, "Copy");
    return el("figure", { class: "code" }, el("figcaption", {}, lang || "code", copy), el("pre", { tabindex: "0", "aria-label": `${lang || ""} code`.trim() }, code));
  }

  list(lines) {
    const ordered = /\d/.test(this.source.slice(...lines[0]).match(ITEM)[2]);
    const first = parseInt(this.source.slice(...lines[0]).match(ITEM)[2], 10);
    const list = el(ordered ? "ol" : "ul", ordered && first !== 1 ? { start: first } : {});
    let item = null;
    for (const [a, b] of lines) {
      const found = this.source.slice(a, b).match(ITEM);
      if (found) {
        item = el("li", { class: `in${Math.min(3, Math.floor(found[1].length / 2))}` });
        list.append(item);
        this.inline(item, a + found[0].length, b);
      } else {
        item.append("\n");
        this.inline(item, a, b);
      }
    }
    return list;
  }

  table(lines) {
    const row = ([a, b], tag) => {
      const made = el("tr");
      let at = a;
      const text = this.source;
      if (text[at] === "|") at += 1;
      while (at < b) {
        let end = at;
        while (end < b && text[end] !== "|") end += text[end] === "\\" ? 2 : 1;
        end = Math.min(end, b);
        const cell = el(tag);
        this.inline(cell, at + text.slice(at, end).match(/^\s*/)[0].length, end);
        if (end < b || cell.textContent.trim()) made.append(cell);
        at = end + 1;
      }
      return made;
    };
    const body = el("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
    return el("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "table" }, el("table", {}, el("thead", {}, row(lines[0], "th")), body));
  }

  inline(parent, a, b) {
    let at = a;
    for (const found of this.source.slice(a, b).matchAll(INLINE)) {
      const [whole, ticks, code, strong, soft] = found;
      const start = a + found.index;
      this.text(parent, at, start);
      const edge = ticks ? ticks.length : strong !== undefined ? 2 : 1;
      const made = el(ticks ? "code" : strong !== undefined ? "strong" : "em");
      if (code !== undefined || soft !== undefined) this.text(made, start + edge, start + whole.length - edge);
      else this.inline(made, start + edge, start + whole.length - edge);
      parent.append(made);
      at = start + whole.length;
    }
    this.text(parent, at, b);
  }

  /** The text from a to b, a span for each token's part of it. */
  text(parent, a, b) {
    if (a >= b) return;
    let [low, high] = [0, this.owners.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.owners[middle][0] <= a) low = middle + 1;
      else high = middle;
    }
    for (let at = a, owner = low - 1; at < b; owner += 1) {
      const end = Math.min(b, this.owners[owner + 1]?.[0] ?? b);
      if (end > at) {
        const piece = this.source.slice(at, end);
        parent.append(owner < 0 ? piece : el("span", { "data-token": this.owners[owner][1] }, piece));
      }
      at = Math.max(at, end);
    }
  }
}

/** Blocks from an offset on; the last may yet grow. */
function split(source, from) {
  const lines = [];
  for (let at = from; at < source.length; ) {
    const end = source.indexOf("\n", at);
    lines.push([at, end < 0 ? source.length : end]);
    at = end < 0 ? source.length : end + 1;
  }
  const say = (at) => source.slice(...lines[at]);
  const starts = (at) => FENCE.test(say(at)) || HEADING.test(say(at)) || QUOTE.test(say(at)) || ITEM.test(say(at)) || RULE.test(say(at));
  const blocks = [];
  let at = 0;
  const take = (kind, more, rest = {}) => {
    const first = at;
    at += 1;
    while (at < lines.length && more(at)) at += 1;
    blocks.push({ kind, start: lines[first][0], lines: lines.slice(first, at), ...rest });
  };
  while (at < lines.length) {
    const text = say(at);
    const fence = text.match(FENCE);
    const heading = text.match(HEADING);
    if (!text.trim()) at += 1;
    else if (fence) {
      const closing = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      const first = at;
      at += 1;
      while (at < lines.length && !closing.test(say(at))) at += 1;
      const inner = lines.slice(first + 1, at).map(([a, b]) => [a, Math.min(b + 1, source.length)]);
      blocks.push({ kind: "code", start: lines[first][0], lines: inner, lang: fence[2] });
      at += 1;
    } else if (heading) {
      blocks.push({ kind: "heading", start: lines[at][0], level: heading[1].length, lines: [[lines[at][0] + heading[0].length, lines[at][1]]] });
      at += 1;
    } else if (RULE.test(text)) take("rule", () => false);
    else if (QUOTE.test(text)) {
      take("quote", (next) => QUOTE.test(say(next)));
      const block = blocks.at(-1);
      block.lines = block.lines.map(([a, b]) => [a + source.slice(a, b).match(QUOTE)[0].length, b]);
    } else if (ITEM.test(text)) take("list", (next) => ITEM.test(say(next)) || /^\s+\S/.test(say(next)));
    else if (text.includes("|") && at + 1 < lines.length && DASHES.test(say(at + 1))) take("table", (next) => say(next).includes("|"));
    else take("text", (next) => say(next).trim() && !starts(next));
  }
  return blocks;
}

export async function copyText(button, text) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed";
  }
  setTimeout(() => (button.textContent = label), 1500);
}
