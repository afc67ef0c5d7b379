// The page: overview, reader, and the panel beside it.

const data = JSON.parse(document.getElementById("data").textContent);
const rows = new Rows(data);
const spans = [];
const at = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const narrow = matchMedia("(max-width: 900px)");
const state = { focus: 0, pinned: null, shown: null, drawn: 0 };
const MOST_DRAWN = 400_000;

function overview() {
  at("name").textContent = data.name;
  at("lede").append("by ", make("b", {}, data.teacher), " over ", make("b", {}, data.corpus));
  at("tiles").append(
    ...data.tiles.map(([value, label, remark]) =>
      make("li", {}, make("strong", {}, value), make("span", {}, label), make("small", {}, remark)),
    ),
  );
  const facts = [...data.facts, ...data.history.map((step, i) => [i ? "" : "history", step])];
  at("facts").append(...facts.map(([label, value]) => make("div", {}, make("dt", {}, label), make("dd", {}, value))));
  const found = data.statistics;
  if (found.sampled) {
    at("sampled").hidden = false;
    at("sampled").textContent = `The distributions below are of ${count(found.num_positions)} positions, spread over the cache.`;
  }
  if (!found.num_positions) return;
  if (found.ks.length) at("charts").append(massChart(found));
  at("charts").append(entropyChart(found), tailChart(found));
  if (found.entries_per_position.length > 1) at("charts").append(entriesChart(found));
  at("charts").append(columnBytesCard(data.column_bytes));
}

// What the reader shows of a token; `drawn` counts characters, and for an element 8 as it costs more.
function drawn(token) {
  const parts = visible(state.drawn < MOST_DRAWN ? token : shortened(token), true);
  for (const part of parts) state.drawn += part.length ?? 8 + part.textContent.length;
  return parts;
}

function rowSection(row) {
  const cut = row.shown < row.tokens ? `first ${count(row.shown)} of ` : "";
  const tokens = make("p", { class: "tokens", role: "group", "aria-label": `Tokens of row ${row.number}` });
  for (let i = row.first; i < row.first + row.shown; i++) {
    const span = make("span", { class: rows.colours(i), tabindex: "-1" }, ...drawn(rows.token(i)));
    span.place = i;
    spans.push(span);
    tokens.append(span);
  }
  const columns = row.columns.map(([name, value]) => make("span", {}, make("b", {}, name), ` ${value}`));
  if (row.more_columns) columns.push(make("span", {}, `and ${count(row.more_columns)} more`));
  return make(
    "section",
    { class: "row", id: `row-${row.number}`, tabindex: "-1" },
    make(
      "header",
      {},
      make("h3", {}, `Row ${count(row.number)}`),
      make("span", { class: "columns-of-row" }, ...columns),
      make("span", { class: "sizes" }, `${cut}${count(row.tokens)} tokens, ${count(row.trained)} trained`),
      make("code", { title: row.id }, row.id.slice(0, 12)),
    ),
    tokens,
  );
}

function reader() {
  const shown = data.rows.reduce((sum, row) => sum + row.shown, 0);
  at("shown").textContent = data.rows.length
    ? `${count(data.rows.length)} of ${count(data.num_rows)} rows, ${count(shown)} tokens. ` +
      "Point at a token, or tap it, to see what the teacher expected in its place."
    : "This cache has no rows.";
  if (data.note) {
    at("note").hidden = false;
    at("note").textContent = data.note;
  }
  at("reader").append(...data.rows.map(rowSection));
  if (!spans.length) return;
  spans[0].tabIndex = 0;
  at("reader").addEventListener("pointerover", (event) => {
    const span = event.target.closest(".t");
    if (span && event.pointerType === "mouse" && state.pinned === null) show(span.place);
  });
  // Focus, and with it the sheet, waits for the end of a tap, which would otherwise fall on the sheet.
  at("reader").addEventListener("mousedown", (event) => narrow.matches && event.preventDefault());
  at("reader").addEventListener("click", (event) => {
    const span = event.target.closest(".t");
    if (!span || !getSelection().isCollapsed) return;
    state.pinned = state.pinned === span.place ? null : span.place;
    focusOn(span.place);
  });
  at("reader").addEventListener("focusin", (event) => {
    const span = event.target.closest(".t");
    if (!span) return;
    spans[state.focus].tabIndex = -1;
    state.focus = span.place;
    span.tabIndex = 0;
    if (state.pinned !== null) state.pinned = span.place;
    show(span.place);
  });
  at("reader").addEventListener("keydown", moveByKey);
  document.addEventListener("keydown", (event) => event.key === "Escape" && dismiss());
}

function moveByKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !event.target.closest(".t")) return;
  const row = data.rows[rows.rowOf[state.focus]];
  const index = data.rows.indexOf(row);
  const moves = {
    ArrowRight: () => state.focus + 1,
    ArrowLeft: () => state.focus - 1,
    ArrowDown: () => otherLine(state.focus, 1),
    ArrowUp: () => otherLine(state.focus, -1),
    Home: () => row.first,
    End: () => row.first + row.shown - 1,
    PageDown: () => data.rows[index + 1]?.first ?? state.focus,
    PageUp: () => data.rows[index - 1]?.first ?? row.first,
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  focusOn(Math.min(Math.max(moves[event.key](), 0), spans.length - 1));
}

// The token of the next line, or the one before, that stands nearest below or above.
function otherLine(from, step) {
  const boxOf = (i) => spans[i].getClientRects()[0] ?? spans[i].getBoundingClientRect();
  const start = boxOf(from);
  let [best, distance, line] = [from, Infinity, null];
  for (let i = from + step; i >= 0 && i < spans.length; i += step) {
    const box = boxOf(i);
    if (Math.abs(box.top - start.top) < box.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > box.height / 2) break;
    const away = Math.abs(box.left - start.left);
    if (away < distance) [best, distance] = [i, away];
  }
  return best;
}

function focusOn(i) {
  spans[i].focus({ preventScroll: true });
  const box = spans[i].getBoundingClientRect();
  const floor = narrow.matches ? innerHeight * 0.45 : innerHeight - 40;
  if (box.top < at("toolbar").getBoundingClientRect().bottom + 8 || box.bottom > floor) bringIntoView(spans[i]);
}

function bringIntoView(element) {
  const top = element.getBoundingClientRect().top + scrollY - innerHeight * 0.3;
  window.scrollTo({ top, behavior: calm.matches ? "instant" : "smooth" });
}

function dismiss() {
  state.pinned = null;
  at("panel").classList.remove("open");
}

function show(i) {
  spans[state.shown]?.classList.remove("shown");
  state.shown = i;
  const [token, targets, span] = [rows.token(i), rows.targets(i), spans[i]];
  span.classList.add("shown");
  span.setAttribute("role", "button");
  span.setAttribute("aria-label", spoken(spokenText(token), targets));
  const row = data.rows[rows.rowOf[i]];
  const place = i - row.first;
  const close = make("button", { type: "button", class: "quiet close", "aria-label": "Close" }, "×");
  close.addEventListener("click", dismiss);
  const title = make("p", { class: "panel-token" }, make("span", { class: "chip" }, ...visible(token, false)), close);
  const where = make("p", { class: "where" }, `Row ${count(row.number)}, token ${count(place)}, id ${count(token.id)}`);
  at("panel").replaceChildren(title, where, ...(targets ? distribution(targets, token, place) : [nothingStored(place)]));
  at("panel").classList.add("open");
}

function spoken(text, targets) {
  if (!targets) return `${text}, prompt`;
  const rank = targets.rank ? `probability ${percent(Math.exp(targets.logprob))}, rank ${targets.rank}` : "in the tail";
  return `${text}, ${rank}, entropy ${targets.entropy.toFixed(2)} nats`;
}

function nothingStored(place) {
  const prompt = "Prompt: this token is not trained, and no distribution is stored for it.";
  return make("p", { class: "remark" }, place ? prompt : "The first token: nothing predicts it.");
}

// position i predicts token i + 1.
function distribution(targets, token, place) {
  const figure = (label, value) => make("div", {}, make("dt", {}, label), make("dd", {}, value));
  const inTail = targets.rank === 0;
  const bound = data.statistics.entropy_is_lower_bound ? "≥ " : "";
  const figures = make(
    "dl",
    { class: "figures" },
    figure("Log-prob", inTail ? "in the tail" : targets.logprob.toFixed(3).replace("-", "−")),
    figure("Rank", inTail ? `> ${count(targets.numEntries)}` : `${count(targets.rank)} of ${count(targets.numEntries)}`),
    figure("Entropy", `${bound}${targets.entropy.toFixed(2)} nats`),
  );
  const most = Math.max(...targets.entries.map(({ logprob }) => Math.exp(logprob)), targets.rest, targets.tail);
  const line = (label, text, mass, kind) => {
    const bar = make("span", { class: "bar" });
    bar.style.width = `${most > 0 ? (100 * mass) / most : 0}%`;
    return make(
      "li",
      { class: kind },
      make("span", { class: "rank" }, label),
      make("span", { class: "entry" }, ...text),
      make("span", { class: "track" }, bar),
      make("span", { class: "mass" }, percent(mass)),
    );
  };
  const actual = (text) => [...text, make("em", {}, "actual")];
  const lines = targets.entries.map((entry, j) => {
    const hit = j + 1 === targets.rank;
    const text = visible(entry, false);
    return line(String(j + 1), hit ? actual(text) : text, Math.exp(entry.logprob), hit ? "actual" : "");
  });
  const beyond = targets.numEntries - targets.entries.length;
  if (targets.rank > targets.entries.length) {
    lines.push(line(String(targets.rank), actual(visible(token, false)), Math.exp(targets.logprob), "actual"));
  }
  if (beyond > 0) lines.push(line("", [`${count(beyond)} more entries`], targets.rest, "sum"));
  lines.push(line("", inTail ? actual(["Tail"]) : ["Tail"], targets.tail, `sum tail${inTail ? " actual" : ""}`));
  const groups = targets.groups.map(({ group, mass }) => {
    const size = data.group_sizes[group];
    return line("", [`Group ${group}${size ? `, ${count(size)} ids` : ""}`], mass, "sum group");
  });
  const rebuilt = targets.rebuilt.map((entry) => line("≈", visible(entry, false), entry.mass, "rebuilt"));
  return [
    figures,
    make("p", { class: "remark" }, `Position ${count(place - 1)}, which has seen tokens 0 to ${count(place - 1)}, expected:`),
    make("ol", { class: "entries" }, ...lines),
    ...(groups.length ? [make("p", { class: "remark" }, "Heaviest groups of the tail")] : []),
    ...(groups.length ? [make("ol", { class: "entries" }, ...groups)] : []),
    ...(rebuilt.length ? [make("p", { class: "remark" }, "Most probable in the tail, rebuilt from its coefficients, not stored")] : []),
    ...(rebuilt.length ? [make("ol", { class: "entries" }, ...rebuilt)] : []),
  ];
}

function legend(mode) {
  const byEntropy = mode === "entropy";
  const labels = byEntropy ? ENTROPY_EDGES : PROBABILITY_EDGES.map((share) => 100 * share);
  const swatches = Array.from({ length: labels.length + 1 }, (_, i) =>
    make(
      "span",
      { class: `swatch ${byEntropy ? "e" : "l"}${i}` },
      make("span", {}, i < labels.length ? significant(labels[i]) : ""),
    ),
  );
  const ends = byEntropy ? ["certain", "nats"] : ["likely", "% probable"];
  at("legend").replaceChildren(
    make("span", { class: "end" }, ends[0]),
    make("span", { class: "scale", "data-mode": mode }, ...swatches),
    make("span", { class: "end" }, ends[1]),
    make(
      "span",
      { class: "keys", "data-mode": mode },
      make("span", {}, make("span", { class: "t prompt" }, "prompt"), " not trained"),
      ...(byEntropy ? [] : [make("span", {}, make("span", { class: "t l7 tail" }, "token"), " in the tail")]),
    ),
  );
}

function modes() {
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.addEventListener("change", () => {
      at("reader").dataset.mode = radio.value;
      legend(radio.value);
    });
    if (radio.checked) {
      at("reader").dataset.mode = radio.value; // a reload keeps what was chosen
      legend(radio.value);
    }
  }
}

function search() {
  // Lower case of single tokens, so that places in the text of a row are places in its tokens.
  const texts = data.rows.map((row) => rows.texts(row).map((text) => text.toLowerCase()));
  let found = [];
  let current = -1;
  const mark = (match, on, name) => {
    for (let i = match.first; i <= match.last; i++) spans[i].classList.toggle(name, on);
  };
  const go = (to) => {
    if (!found.length) return;
    if (current >= 0) mark(found[current], false, "now");
    current = (to + found.length) % found.length;
    mark(found[current], true, "now");
    at("matches").textContent = `${count(current + 1)} of ${count(found.length)}`;
    show(found[current].first);
    bringIntoView(spans[found[current].first]);
  };
  const find = () => {
    found.forEach((match) => ["hit", "now"].forEach((name) => mark(match, false, name)));
    const sought = at("search").value.toLowerCase();
    [found, current] = [sought ? data.rows.flatMap((row, r) => matches(row, texts[r], sought)) : [], -1];
    found.forEach((match) => mark(match, true, "hit"));
    at("matches").textContent = sought && !found.length ? "none" : "";
    go(0);
  };
  let waiting = 0;
  at("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(find, 120);
  });
  at("search").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    go(current + (event.shiftKey ? -1 : 1));
  });
  at("next").addEventListener("click", () => go(current + 1));
  at("previous").addEventListener("click", () => go(current - 1));
}

function matches(row, texts, sought) {
  const ends = [];
  let length = 0;
  for (const text of texts) ends.push((length += text.length));
  const whole = texts.join("");
  const result = [];
  let token = 0;
  for (let start = whole.indexOf(sought); start >= 0; start = whole.indexOf(sought, start + sought.length)) {
    while (ends[token] <= start) token++;
    let last = token;
    while (ends[last] < start + sought.length) last++;
    result.push({ first: row.first + token, last: row.first + last });
  }
  return result;
}

function jump() {
  at("jump-form").addEventListener("submit", (event) => {
    event.preventDefault();
    // As headings have it, too: "Row 1,000".
    const wanted = at("jump").value.trim().toLowerCase().replace(/^row\s+/, "").replace(/(?<=\d),(?=\d)/g, "");
    const isNumber = /^\d{1,7}$/.test(wanted); // longer ones may be ids
    const byId = ({ id }) => wanted && !isNumber && id.startsWith(wanted);
    const byNumber = ({ number }) => String(number) === wanted.replace(/^0+(?=\d)/, "");
    const row = data.rows.find(byNumber) ?? data.rows.find(byId);
    at("jump-problem").hidden = Boolean(row) || !wanted;
    if (row) {
      const section = at(`row-${row.number}`);
      section.focus({ preventScroll: true });
      bringIntoView(section);
    } else if (wanted) {
      const exists = isNumber ? Number(wanted) < data.num_rows : /^[0-9a-f]{1,32}$/.test(wanted);
      at("jump-problem").textContent = exists
        ? `Row ${wanted} is not on this page: logitcache view CACHE --rows ${wanted} shows ${isNumber ? "it" : "it, if there is one"}.`
        : `The cache has no such row: its ${count(data.num_rows)} rows have numbers from 0 on, and ids of digits and a to f.`;
    }
  });
}

function theme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = document.documentElement.dataset;
  const dark = () => (chosen.theme ? chosen.theme === "dark" : system.matches);
  const label = () => (at("theme").textContent = dark() ? "Light" : "Dark");
  at("theme").addEventListener("click", () => {
    chosen.theme = dark() ? "light" : "dark";
    label();
  });
  system.addEventListener("change", label);
  label();
}

overview();
reader();
modes();
search();
jump();
theme();
at("panel").append(
  make("p", { class: "remark empty" }, "Point at a token to see what the teacher expected in its place. A click keeps it here."),
);
