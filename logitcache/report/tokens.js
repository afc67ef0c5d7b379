// Tokens as text that can be seen, and the numbers that belong to them.

const ENTROPY_EDGES = [0.1, 0.5, 1, 1.5, 2, 3, 4]; // nats
const PROBABILITY_EDGES = [0.9, 0.5, 0.2, 0.1, 0.03, 0.01, 0.001];
const NOTHING = 0xffff;
// Line breaks and tabs, and what has no look of its own: controls, marks of direction, halves of surrogates, joiners.
// Long runs of one of them are one match.
const UNSEEN = /([\p{C}\p{Zl}\p{Zp}])\1{8,}|[\p{C}\p{Zl}\p{Zp}]|^\p{M}/gu;
const JOINERS = "\u200c\u200d";

function unpack({ type, data }) {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  return new { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array }[type](bytes.buffer);
}

function codePoint(character) {
  return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
}

// A sign that stands for what cannot be seen; `shown` is drawn beside it and is no part of the text.
function sign(shown) {
  return make("i", { class: "sign", "data-sign": shown });
}

// Strings and elements that show a token. wrapping: line breaks break the line, as in the reader.
function visible(token, wrapping) {
  const text = token.text;
  if (text == null) return [make("i", { class: "code" }, `#${token.id}`)];
  if (typeof text !== "string") {
    const bytes = text.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
    return [make("i", { class: "code" }, `‹${bytes}›`)];
  }
  if (text === "") return [make("i", { class: "code" }, "‹empty›")];
  const shown = [];
  let last = 0;
  for (const { 0: run, 1: repeated, index } of text.matchAll(UNSEEN)) {
    const found = repeated ?? run;
    if (JOINERS.includes(found) && index > 0 && index + 1 < text.length) continue;
    shown.push(...spaced(text.slice(last, index), wrapping));
    last = index + run.length;
    const times = repeated ? `×${run.length / found.length}` : "";
    if (found === "\n") shown.push(sign(`↵${times}`), ...(wrapping ? ["\n"] : []));
    else if (found === "\t") shown.push(sign(`⇥${times}`), ...(wrapping ? ["\t"] : []));
    else if (/\p{M}/u.test(found)) shown.push(sign("◌"), found);
    else shown.push(make("i", { class: "code" }, `‹${codePoint(found)}${times}›`));
  }
  shown.push(...spaced(text.slice(last), wrapping));
  return shown;
}

// Spaces alone are drawn as dots; in a list of tokens those at the ends of others too, as they tell tokens apart.
function spaced(text, wrapping) {
  const [, before, inner, after] = /^( *)(.*?)( *)$/s.exec(text);
  if (wrapping && inner) return [text];
  const dots = (spaces) => (spaces ? [make("i", { class: "spaces", "data-sign": "·".repeat(spaces.length) }, spaces)] : []);
  return [...dots(before), ...(inner ? [inner] : []), ...dots(after)];
}

// The beginning of a token, where whole ones would make the page too slow.
function shortened({ id, text }) {
  if (text == null || text.length <= 4) return { id, text };
  return { id, text: typeof text === "string" ? `${[...text].slice(0, 4).join("")}…` : text.slice(0, 4) };
}

// A token's text for a screen reader, with words for what it would leave out.
function spokenText(token) {
  const named = (one, many) => (run) => ` ${run.length === 1 ? one : `${run.length} ${many}`} `;
  if (typeof token.text !== "string") return visible(token, false)[0].textContent;
  const text = token.text
    .replace(/^ +$| {2,}/g, named("space", "spaces"))
    .replace(/\n+/g, named("line break", "line breaks"))
    .replace(/\t+/g, named("tab", "tabs"));
  return visible({ ...token, text: text.replace(/ +/g, " ").replace(/^ | $/g, "") }, true)
    .map((part) => part.textContent ?? part)
    .join("");
}

// The cache's rows, unpacked once; everything is found by the token's place among all tokens of the page.
class Rows {
  constructor(data) {
    this.data = data;
    this.rows = data.rows;
    this.ids = unpack(data.ids);
    this.arrays = Object.fromEntries(Object.entries(data.arrays).map(([name, packed]) => [name, unpack(packed)]));
    this.length = this.rows.reduce((sum, row) => sum + row.shown, 0);
    this.rowOf = new Uint32Array(this.length);
    this.positionOf = new Int32Array(this.length).fill(-1);
    let token = 0;
    let position = 0;
    this.rows.forEach((row, index) => {
      row.first = token;
      for (const end = token + row.shown; token < end; token++) {
        this.rowOf[token] = index;
        if (this.arrays.trained[token]) this.positionOf[token] = position++;
      }
    });
  }

  vocabulary(place) {
    return { id: this.ids[place], text: this.data.texts[place] };
  }

  token(i) {
    return this.vocabulary(this.arrays.tokens[i]);
  }

  nats(name, place) {
    const steps = this.arrays[name][place];
    return steps === NOTHING ? Infinity : steps * this.data.nats_step;
  }

  // What the teacher expected where token i stands, or null where nothing is stored.
  targets(i) {
    const m = this.positionOf[i];
    if (m < 0) return null;
    const { entries, groups, rebuilt = [], num_entries: numEntries, rank } = this.arrays;
    const positions = this.arrays.entropy.length;
    const [width, numGroups, numRebuilt] = [entries, groups, rebuilt].map((values) => values.length / positions);
    const range = (length) => Array.from({ length }, (_, j) => j);
    return {
      entropy: this.nats("entropy", m),
      logprob: -this.nats("actual", m),
      rank: rank[m],
      numEntries: numEntries[m],
      entries: range(Math.min(width, numEntries[m])).map((j) => ({
        ...this.vocabulary(entries[m * width + j]),
        logprob: -this.nats("logprobs", m * width + j),
      })),
      rest: Math.exp(-this.nats("rest", m)),
      tail: Math.exp(-this.nats("tail", m)),
      groups: range(numGroups)
        .map((j) => ({ group: groups[m * numGroups + j], mass: Math.exp(-this.nats("group_logprobs", m * numGroups + j)) }))
        .filter(({ mass }) => mass > 0),
      rebuilt: range(numRebuilt)
        .map((j) => ({ id: rebuilt[m * numRebuilt + j], mass: Math.exp(-this.nats("rebuilt_logprobs", m * numRebuilt + j)) }))
        .filter(({ mass }) => mass > 0)
        .map(({ id, mass }) => ({ ...this.vocabulary(id), mass })),
    };
  }

  // The classes that colour token i in either mode.
  colours(i) {
    const m = this.positionOf[i];
    if (m < 0) return "t prompt";
    const entropy = this.nats("entropy", m);
    const bin = ENTROPY_EDGES.filter((edge) => edge <= entropy).length;
    if (this.arrays.rank[m] === 0) return `t e${bin} l7 tail`;
    const probability = Math.exp(-this.nats("actual", m));
    return `t e${bin} l${PROBABILITY_EDGES.filter((edge) => edge > probability).length}`;
  }

  // Texts of a row's tokens that join to its text: the bytes of a character that several tokens share belong to the first.
  texts(row) {
    const texts = [];
    for (let i = row.first; i < row.first + row.shown; i++) {
      const text = this.token(i).text;
      texts.push(typeof text === "string" ? text : "");
      if (!Array.isArray(text)) continue;
      const bytes = [...text];
      let end = i + 1;
      while (end < row.first + row.shown && Array.isArray(this.token(end).text)) bytes.push(...this.token(end++).text);
      texts[texts.length - 1] = new TextDecoder().decode(Uint8Array.from(bytes));
      texts.push(...new Array(end - i - 1).fill(""));
      i = end - 1;
    }
    return texts;
  }
}
