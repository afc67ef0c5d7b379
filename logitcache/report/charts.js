// Charts as SVG, each with a line that says what is pointed at and a table of its numbers.

const PLOT = { width: 380, height: 214, left: 46, right: 12, top: 12, bottom: 40 };

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children); // strings become text, never markup
  return element;
}

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function count(number) {
  return number.toLocaleString("en-US");
}

function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.001) return "< 0.001%";
  return `${value.toFixed(value >= 10 || value === 0 ? 1 : value >= 0.1 ? 2 : 3)}%`;
}

function significant(value) {
  return String(Number(value.toPrecision(3)));
}

function tableOf(head, rows) {
  const row = (cells, tag) => make("tr", {}, ...cells.map((cell, i) => make(i ? tag : "th", i ? {} : { scope: "row" }, cell)));
  return make("table", {}, make("thead", {}, row(head, "th")), make("tbody", {}, ...rows.map((cells) => row(cells, "td"))));
}

function card(title, body, numbers) {
  const details = numbers ? [make("details", {}, make("summary", {}, "Numbers"), make("div", { class: "scroll" }, numbers))] : [];
  return make("figure", { class: "card" }, make("figcaption", {}, make("h3", {}, title)), ...body, ...details);
}

// items: {from, to, height} in 0…1 of the plot, and what the line says of them; a line's points have from = to.
function chart({ title, summary, line, items, xLabel, yLabel, xTicks, yTicks, head, rows }) {
  const inner = { width: PLOT.width - PLOT.left - PLOT.right, height: PLOT.height - PLOT.top - PLOT.bottom };
  const x = (share) => PLOT.left + share * inner.width;
  const y = (share) => PLOT.top + (1 - share) * inner.height;
  const svg = draw("svg", {
    viewBox: `0 0 ${PLOT.width} ${PLOT.height}`,
    role: "img",
    tabindex: "0",
    "aria-label": `${title}. ${summary} Left and right arrow keys read the values.`,
  });
  for (const [place, label] of yTicks) {
    svg.append(draw("line", { class: "grid", x1: x(0), x2: x(1), y1: y(place), y2: y(place) }));
    svg.append(draw("text", { class: "tick", x: x(0) - 7, y: y(place) + 4, "text-anchor": "end" }, label));
  }
  for (const [place, label] of xTicks) {
    svg.append(draw("line", { class: "axis", x1: x(place), x2: x(place), y1: y(0), y2: y(0) + 4 }));
    svg.append(draw("text", { class: "tick", x: x(place), y: y(0) + 16, "text-anchor": "middle" }, label));
  }
  svg.append(draw("text", { class: "label", x: x(0.5), y: PLOT.height - 5, "text-anchor": "middle" }, xLabel));
  svg.append(draw("line", { class: "axis", x1: x(0), x2: x(1), y1: y(0), y2: y(0) }));
  if (line) {
    const points = items.map((item) => `${x(item.from)},${y(item.height)}`).join(" ");
    const [first, last] = [x(items[0].from), x(items.at(-1).from)];
    svg.append(draw("polygon", { class: "area", points: `${first},${y(0)} ${points} ${last},${y(0)}` }));
    svg.append(draw("polyline", { class: "line", points }));
  }
  const marks = items.map((item) =>
    line
      ? draw("circle", { class: "mark", cx: x(item.from), cy: y(item.height), r: 4 })
      : draw("rect", {
          class: "mark",
          x: x(item.from) + 0.5,
          width: Math.max(x(item.to) - x(item.from) - 1, 1),
          // What is there at all can be seen.
          y: item.height ? Math.min(y(item.height), y(0) - 1) : y(0),
          height: item.height ? Math.max(y(0) - y(item.height), 1) : 0,
          rx: 1,
        }),
  );
  svg.append(...marks);
  const readout = make("p", { class: "readout", role: "status" }, summary);
  let pointed = -1;
  const point = (index) => {
    marks[pointed]?.classList.remove("pointed");
    pointed = index;
    marks[pointed]?.classList.add("pointed");
    readout.textContent = index < 0 ? summary : items[index].says;
    readout.classList.toggle("pointed", index >= 0);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = (((event.clientX - box.left) / box.width) * PLOT.width - PLOT.left) / inner.width;
    const middles = items.map((item) => Math.abs((item.from + item.to) / 2 - share));
    point(middles.indexOf(Math.min(...middles)));
  });
  svg.addEventListener("pointerleave", () => point(-1));
  svg.addEventListener("blur", () => point(-1));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    point(Math.min(Math.max(pointed + step, 0), items.length - 1));
  });
  return card(title, [make("p", { class: "unit" }, yLabel), svg, readout], tableOf(head, rows));
}

function evenTicks(most, label) {
  const steps = [1, 2, 2.5, 5, 10].map((step) => step * 10 ** Math.floor(Math.log10(most / 4)));
  const step = steps.find((one) => most / one <= 4.001) ?? steps.at(-1);
  return Array.from({ length: Math.floor(most / step + 0.001) + 1 }, (_, i) => [(i * step) / most, label(i * step)]);
}

function massChart({ ks, mass_covered: covered }) {
  const widest = Math.log2(ks.at(-1)) || 1;
  const items = ks.map((k, i) => {
    const place = Math.log2(k) / widest;
    return { from: place, to: place, height: covered[i], says: `The ${count(k)} most probable: ${percent(covered[i])}` };
  });
  // The last k need not be a power of two, and then may stand too near to the one before.
  const apart = (i) => i === ks.length - 1 || ks.at(-1) / ks[i] > 1.5;
  return chart({
    title: "Mass covered by the k most probable",
    summary: `On average ${percent(covered.at(-1))} by ${count(ks.at(-1))}, ${percent(covered[0])} by the first alone.`,
    line: true,
    items,
    xLabel: "k",
    yLabel: "share of probability",
    xTicks: items.filter((_, i) => apart(i)).map((item) => [item.from, count(ks[items.indexOf(item)])]),
    yTicks: [0, 0.25, 0.5, 0.75, 1].map((share) => [share, `${100 * share}%`]),
    head: ["k", "Mass covered"],
    rows: ks.map((k, i) => [count(k), percent(covered[i])]),
  });
}

function histogramChart({ title, summary, edges, counts, xLabel, xTicks, place, range, head }) {
  const total = counts.reduce((sum, value) => sum + value, 0);
  const most = Math.max(...counts);
  const items = counts.map((value, i) => ({
    from: place(edges[i]),
    to: place(edges[i + 1]),
    height: value / most,
    says: `${range(edges[i], edges[i + 1])}: ${count(value)} positions, ${percent(value / total)}`,
  }));
  return chart({
    title,
    summary,
    items,
    xLabel,
    yLabel: "share of positions",
    xTicks,
    yTicks: evenTicks((100 * most) / total, (share) => `${significant(share)}%`),
    head: [head, "Positions", "Share"],
    rows: counts.map((value, i) => [range(edges[i], edges[i + 1]), count(value), percent(value / total)]),
  });
}

function entropyChart({ entropy, entropy_histogram: { edges, counts }, entropy_is_lower_bound: bound }) {
  const last = edges.at(-1);
  return histogramChart({
    title: "Entropy of the teacher",
    summary:
      `Mean ${entropy.mean.toFixed(2)} nats, half between ${entropy.p25.toFixed(2)} and ${entropy.p75.toFixed(2)}.` +
      (bound ? " The tail counts as one outcome: a lower bound." : ""),
    edges,
    counts,
    xLabel: "nats",
    xTicks: evenTicks(last, significant),
    place: (value) => value / last,
    range: (from, to) => `${significant(from)} – ${significant(to)} nats`,
    head: "Entropy",
  });
}

function tailChart({ tail_mass: tail, tail_histogram: { edges, counts } }) {
  const decades = -Math.log10(edges[0]);
  const place = (mass) => 1 + Math.log10(mass) / decades;
  const labelled = Array.from({ length: Math.floor(decades / 2 + 0.01) + 1 }, (_, i) => 100 ** -i);
  return histogramChart({
    title: "Mass of the tail",
    summary: `Mean ${percent(tail.mean)}, median ${percent(tail.p50)}, 95 of 100 below ${percent(tail.p95)}.`,
    edges,
    counts,
    xLabel: "probability outside the entries (logarithmic)",
    xTicks: labelled.map((mass) => [place(mass), `${significant(100 * mass)}%`]),
    place,
    range: (from, to) => (from === edges[0] ? `below ${percent(to)}` : `${percent(from)} – ${percent(to)}`),
    head: "Tail",
  });
}

function entriesChart({ entries_per_position: pairs }) {
  const [least, most] = [pairs[0][0], pairs.at(-1)[0]];
  const width = Math.ceil((most - least + 1) / 40);
  const bars = Math.ceil((most - least + 1) / width);
  const counts = new Array(bars).fill(0);
  for (const [entries, positions] of pairs) counts[Math.floor((entries - least) / width)] += positions;
  const total = counts.reduce((sum, value) => sum + value, 0);
  const mean = pairs.reduce((sum, [entries, positions]) => sum + entries * positions, 0) / total;
  return histogramChart({
    title: "Entries per position",
    summary: `Mean ${mean.toFixed(1)}, from ${count(least)} to ${count(most)}.`,
    edges: Array.from({ length: bars + 1 }, (_, i) => least + i * width),
    counts,
    xLabel: "entries (k)",
    xTicks: [0, 0.25, 0.5, 0.75, 1]
      .map((share) => Math.round(share * (bars - 1)))
      .filter((bar, i, all) => all.indexOf(bar) === i)
      .map((bar) => [(bar + 0.5) / bars, count(least + bar * width)]),
    place: (entries) => (entries - least) / (bars * width),
    range: (from, to) => (to - from === 1 ? `${count(from)} entries` : `${count(from)} – ${count(to - 1)} entries`),
    head: "Entries",
  });
}

function columnBytesCard({ columns, positions, shards, of_shards: all }) {
  const total = columns.reduce((sum, [, bytes]) => sum + bytes, 0) || 1;
  const most = Math.max(...columns.map(([, bytes]) => bytes), 1);
  const rows = columns.map(([name, bytes]) => {
    const bar = make("span", { class: "bar" });
    bar.style.width = `${(100 * bytes) / most}%`;
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, name),
      make("td", { class: "bar-cell" }, bar),
      make("td", {}, (bytes / Math.max(positions, 1)).toFixed(2)),
      make("td", {}, percent(bytes / total)),
    );
  });
  const head = make(
    "tr",
    {},
    ...["Column", "", "Bytes per position", "Share"].map((label) => make("th", { scope: "col" }, label)),
  );
  const of = shards < all ? [make("p", { class: "readout" }, `Of ${count(shards)} of ${count(all)} shards.`)] : [];
  const table = make("table", { class: "columns" }, make("thead", {}, head), make("tbody", {}, ...rows));
  const figure = card("Bytes by column", [table, ...of]);
  figure.classList.add("wide");
  return figure;
}
