"use strict";
// Tables that sort by any column, and a chart for each metric; one legend for all charts.

const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const COLOURS = {
  light: ["#0072B2", "#D55E00", "#009E73", "#C4609A", "#C98A00", "#3C9BD0", "#6B6B6B"],
  dark: ["#4FA8E0", "#FF8B4A", "#2FC79A", "#E79BC7", "#F2B632", "#9AD4F5", "#B8B8B8"],
};
const DASHES = ["solid", "dash", "dashdot", "dot", "longdash", "longdashdot"];
const SVG_DASHES = { solid: "", dash: "7 4", dashdot: "7 3 2 3", dot: "2 3", longdash: "11 4", longdashdot: "11 3 2 3" };
const hidden = new Set();
const plots = [];

const colour = (row) => COLOURS[dark.matches ? "dark" : "light"][row % COLOURS.light.length];
const dash = (row) => DASHES[(row + Math.floor(row / COLOURS.light.length)) % DASHES.length];
const css = (name) => {
  const probe = document.createElement("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
};
// Plotly reads tags in names.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function traces(curve) {
  return curve.series.flatMap(({ row, steps, mean, low, high }) => {
    const name = plain(data.rows[row]);
    const common = { x: steps, mode: "lines", visible: !hidden.has(row), hoverinfo: "skip" };
    const edge = { ...common, line: { width: 0 } };
    return [
      { ...edge, y: low },
      { ...edge, y: high, fill: "tonexty", fillcolor: colour(row) + "2b" },
      {
        ...common,
        y: mean,
        name,
        mode: steps.length > 40 ? "lines" : "lines+markers",
        line: { color: colour(row), dash: dash(row), width: 2 },
        marker: { color: colour(row), size: 5 },
        hoverinfo: "all",
        hovertemplate: `${name}: %{y:.4g}<extra></extra>`,
      },
    ];
  });
}

function layout() {
  const grid = css("--line");
  const touched = matchMedia("(pointer: coarse)").matches;
  const axis = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, fixedrange: touched };
  return {
    margin: { l: 44, r: 10, t: 8, b: 38 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--quiet") },
    showlegend: false,
    hovermode: "x unified",
    hoverlabel: { bgcolor: css("--card"), bordercolor: grid, font: { color: css("--ink") } },
    dragmode: touched ? false : "zoom",
    xaxis: { ...axis, title: { text: "step", standoff: 6 } },
    yaxis: axis,
  };
}

function drawAll() {
  for (const { curve, place } of plots) {
    Plotly.react(place, traces(curve), layout(), { responsive: true, displayModeBar: false });
  }
  document.querySelectorAll("[data-row]").forEach((line) => line.setAttribute("stroke", colour(Number(line.dataset.row))));
}

function swatch(row) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("width", "26");
  svg.setAttribute("height", "8");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", "M0 4H26");
  line.setAttribute("stroke-width", "2.5");
  line.setAttribute("stroke-dasharray", SVG_DASHES[dash(row)]);
  line.dataset.row = row;
  svg.append(line);
  return svg;
}

function legend() {
  data.rows.forEach((name, row) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", "true");
    button.append(swatch(row), name);
    button.addEventListener("click", () => {
      hidden.has(row) ? hidden.delete(row) : hidden.add(row);
      button.setAttribute("aria-pressed", String(!hidden.has(row)));
      drawAll();
    });
    document.getElementById("legend").append(button);
  });
}

function charts() {
  for (const curve of data.curves) {
    const card = document.createElement("div");
    card.className = "curve";
    const heading = document.createElement("h3");
    heading.textContent = curve.title;
    const place = document.createElement("div");
    place.className = "plot";
    card.append(heading, place);
    document.getElementById("curves").append(card);
    plots.push({ curve, place });
  }
}

function sortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value;
      const rows = [...table.tBodies[0].rows].sort((a, b) => compared(key(a), key(b)) * (descending ? -1 : 1));
      rows.sort((a, b) => (key(a) === undefined) - (key(b) === undefined)); // what is not known comes last
      table.tBodies[0].append(...rows);
    });
  });
}

function compared(a = "", b = "") {
  const numbers = Number(a) - Number(b);
  return a !== "" && b !== "" && !Number.isNaN(numbers) ? numbers : a.localeCompare(b);
}

legend();
charts();
drawAll();
document.querySelectorAll("table.sortable").forEach(sortable);
dark.addEventListener("change", drawAll);
