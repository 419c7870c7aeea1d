// Draws the report from the JSON beside it. Texts become text nodes, never markup.
"use strict";

const content = JSON.parse(document.getElementById("content").textContent);
const KINDS = { normal: "Normal cell", reduce: "Reduction cell" };
const INCH = 72; // layouts are in inches, pictures in points

// ---- elements -----------------------------------------------------------------------------------

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function s(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function section(title, ...children) {
  return h("section", { "aria-label": title }, h("h2", {}, title), ...children);
}

function scroll(label, child) {
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, child);
}

function list(pairs, name) {
  return h("dl", { class: name }, ...pairs.map(([term, value]) =>
    h("div", { class: name === "list" ? "contents" : null }, h("dt", {}, term), h("dd", {}, value))));
}

function copyButton(label, text) {
  const button = h("button", { type: "button", "aria-live": "polite", onclick: async () => {
    button.textContent = (await copy(typeof text === "function" ? text() : text)) ? "Copied" : "Copy failed";
    setTimeout(() => { button.textContent = label; }, 1500);
  } }, label);
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch { // not allowed here, or an older browser
    const area = h("textarea", {}, text);
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

function number(value, digits = 4, unit = "") {
  if (value === null || value === undefined) return "–";
  if (unit === "%") return value.toFixed(2); // as accuracies are given
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(digits)));
}

// ---- charts -------------------------------------------------------------------------------------

const WIDTH = 400, HEIGHT = 210, LEFT = 46, RIGHT = 10, TOP = 10, BOTTOM = 34;
const STYLES = ["first", "second"];

// Steps of 1, 2 or 5 times a power of ten, about four of them.
function ticks(low, high) {
  const rough = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((candidate) => candidate >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// A chart shows the values of one epoch in its legend; `show` says of which.
function drawChart({ title, unit, series }) {
  const factor = unit === "%" ? 100 : 1;
  const curves = series.map(({ name, values }) =>
    ({ name, values: values.map((value) => (value === null ? null : value * factor)) }));
  const count = Math.max(...curves.map(({ values }) => values.length));
  const known = curves.flatMap(({ values }) => values).filter((value) => value !== null);
  let low = Math.min(...known), high = Math.max(...known);
  if (low === high) { low = Math.min(0, low); high = Math.max(high, low + 1); }
  const pad = (high - low) * 0.06;
  low = low >= 0 && low - pad < 0 ? 0 : low - pad;
  high += pad;
  const x = (index) => LEFT + (count > 1 ? index / (count - 1) : 0.5) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM);

  const svg = s("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${title} by epoch; the numbers are in a table below` });
  for (const value of ticks(low, high)) {
    svg.append(s("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      s("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value, 3)));
  }
  const marks = count > 1 ? [...new Set(ticks(1, count).map(Math.round))].filter((e) => e >= 1) : [1];
  for (const epoch of marks) {
    svg.append(s("text", { x: x(epoch - 1), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, String(epoch)));
  }
  svg.append(s("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, "epoch"));
  const cursor = s("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM });
  svg.append(cursor);
  curves.forEach(({ values }, index) => {
    let path = "", pen = "M";
    values.forEach((value, epoch) => {
      if (value !== null) path += `${pen}${x(epoch).toFixed(1)},${y(value).toFixed(1)}`;
      pen = value === null ? "M" : "L";
    });
    svg.append(s("path", { class: `curve ${STYLES[index]}`, d: path }));
  });
  const dots = curves.map((_, index) => s("circle", { class: STYLES[index], r: 3.5 }));
  svg.append(...dots);

  const readings = curves.map(() => h("span"));
  const legend = h("figcaption", { class: "legend" }, ...curves.map(({ name }, index) =>
    h("span", {}, s("svg", { "aria-hidden": "true" }, s("line", { class: `curve ${STYLES[index]}`, x1: 0, x2: 24, y1: 5, y2: 5 })),
      `${name} `, readings[index])));
  function show(epoch) {
    fill(cursor, { x1: x(epoch), x2: x(epoch) }, []);
    curves.forEach(({ values }, index) => {
      const value = values[epoch] ?? null;
      readings[index].textContent = number(value, 4, unit) + (value !== null && unit ? ` ${unit}` : "");
      dots[index].setAttribute("visibility", value === null ? "hidden" : "visible");
      if (value !== null) fill(dots[index], { cx: x(epoch), cy: y(value) }, []);
    });
  }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT);
    showEpoch(Math.min(count - 1, Math.max(0, Math.round(share * (count - 1)))));
  });
  svg.addEventListener("pointerleave", () => showEpoch(null));
  return { show, node: h("figure", { class: "chart" }, h("h3", {}, title), legend, svg) };
}

// All charts show the epoch under the pointer, or else that of the slider.
const charts = (content.charts || []).map(drawChart);
let chosen = (content.numbers ? content.numbers.rows.length : 1) - 1;
function showEpoch(epoch) {
  for (const { show } of charts) show(epoch ?? chosen);
}

// ---- cells --------------------------------------------------------------------------------------

// "1: c_{k-1}" with its subscript.
function nodeText(name, x, y) {
  const [, number, letter, index] = /^(.*)(c)_\{(.*)\}$/.exec(name) || [null, name];
  if (!index) return s("text", { x, y }, number);
  const italic = (attributes, text) => s("tspan", { "font-style": "italic", ...attributes }, text);
  return s("text", { x, y }, number, italic({}, letter),
    italic({ dy: 3, "font-size": 8 }, index.replace("-", "−")));
}

function drawCell(kind, layout) {
  const px = (value) => (value * INCH).toFixed(1);
  const X = (value) => Number(px(value)), Y = (value) => Number(px(layout.height - value));
  const words = layout.edges.map(({ primitive, source, target }) => `${primitive} from ${source} to ${target}`);
  const svg = s("svg", { class: "cell", viewBox: `0 0 ${px(layout.width)} ${px(layout.height)}`, role: "img", "aria-label": `${KINDS[kind]}: ${words.join(", ")}` });
  const drops = s("g"), gaps = s("g"), rows = s("g"), boxes = s("g");
  svg.append(drops, gaps, rows, boxes);
  const head = (x, y) => s("path", { class: "head", d: `M${x},${y}l-7,-3.5v7z` });
  for (const edge of layout.edges) {
    const [[x0, y0], [x1, y1], [x2, y2]] = edge.points.map(([x, y]) => [X(x), Y(y)]);
    const bend = 7;
    drops.append(s("path", { class: "drop", d: `M${x0},${y0}V${y1 - bend}` }));
    // Drops are interrupted where a row passes over them: a crossing is not a junction.
    gaps.append(s("path", { class: "gap", d: `M${x1 + bend},${y1}H${x2}` }));
    const [left, bottom, right, top] = edge.label;
    const color = colorIn(edge.primitive);
    const group = (...parts) => s("g", { class: "edge", "--color": color, "data-edge": `${edge.source}-${edge.target}-${edge.primitive}` }, ...parts);
    rows.append(group(s("path", { class: "row", d: `M${x0},${y1 - bend}Q${x1},${y1} ${x1 + bend},${y1}H${x2 - 6}` }), head(x2, y2)));
    boxes.append(group(
      s("rect", { class: "label", x: X(left), y: Y(top), width: px(right - left), height: px(top - bottom), rx: 4 }),
      s("text", { class: "name", x: X((left + right) / 2), y: y2, textLength: px(right - left - 0.12), lengthAdjust: "spacingAndGlyphs" }, edge.primitive)));
  }
  for (const wire of layout.concat) {
    const [[x0, y0], [x1]] = wire.points.map(([x, y]) => [X(x), Y(y)]);
    rows.append(s("path", { class: "concat", d: `M${x0},${y0}H${x1 - 6}` }), head(x1, y0));
  }
  layout.nodes.forEach(([left, bottom, right, top], node) => {
    const end = node < 2 || node === layout.nodes.length - 1;
    boxes.append(s("rect", { class: end ? "node end" : "node", x: X(left), y: Y(top), width: px(right - left), height: px(top - bottom), rx: 4 }),
      nodeText(layout.names[node], X((left + right) / 2), Y((bottom + top) / 2)));
  });
  return svg;
}

function cellsOf(index) {
  return Object.entries(content.pictures.cells[index].layout).map(([kind, layout]) =>
    h("figure", {}, h("h3", {}, KINDS[kind]), scroll(KINDS[kind], drawCell(kind, layout))));
}

// Black is ink: light on dark paper.
function colorIn(primitive) {
  const color = content.pictures.colors[primitive];
  return color === "#000000" ? "var(--ink)" : color;
}

function key() {
  return h("ul", { class: "key", "aria-label": "Colours" }, ...Object.keys(content.pictures.colors).map((name) =>
    h("li", { "--color": colorIn(name) }, name)));
}

// ---- a search, epoch by epoch -------------------------------------------------------------------

function colorOf(weight) {
  const { palette, range: [smallest, largest] } = content.search;
  const share = (weight - smallest) / (largest - smallest || 1);
  const place = Math.min(1, Math.max(0, share)) * (palette.length - 1);
  const below = Math.min(palette.length - 2, Math.floor(place));
  return palette[below].map((part, i) => Math.round(part + (palette[below + 1][i] - part) * (place - below)));
}

function inkOn(color) { // whichever reads better, by the luminance of WCAG 2
  const [r, g, b] = color.map((part) => part / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

function heatMap(kind) {
  const { edges, primitives } = content.search;
  const fields = edges.map(() => primitives.map(() => h("td")));
  const table = h("table", { class: "heat" },
    h("thead", {}, h("tr", {}, h("td"), ...primitives.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, ...edges.map(([node, source], row) =>
      h("tr", { class: source === 0 && row > 0 ? "first-of-node" : null },
        h("th", { scope: "row" }, `node ${node} ← node ${source}`), ...fields[row]))));
  function show(epoch) {
    const { layout } = content.pictures.cells[content.search.genotypes[epoch]];
    const inCell = new Set(layout[kind].edges.map((edge) => `${edge.target} ${edge.source} ${edge.primitive}`));
    content.search.strengths[epoch][kind].forEach((weights, row) => weights.forEach((weight, column) => {
      const color = colorOf(weight), field = fields[row][column];
      const [node, source] = edges[row];
      field.textContent = weight.toFixed(2);
      field.style.background = `rgb(${color})`;
      field.style.color = inkOn(color);
      field.style.outlineColor = inkOn(color);
      field.className = inCell.has(`${node} ${source} ${primitives[column]}`) ? "chosen" : "";
    }));
  }
  return { show, node: h("figure", {}, h("h3", {}, `Edge weights, ${KINDS[kind].toLowerCase()}`), scroll(`Edge weights, ${KINDS[kind].toLowerCase()}`, table)) };
}

function scale() {
  const { palette, range } = content.search;
  const [smallest, largest] = range.map((weight) => weight.toFixed(2));
  const bar = h("span", { class: "bar", "aria-hidden": "true" });
  bar.style.background = `linear-gradient(to right, ${palette.map((color) => `rgb(${color})`)})`;
  return h("p", { class: "soft" }, `Edge weights from ${smallest} `, bar, ` to ${largest}, in both maps and all epochs. Outlined: what is in the genotype.`);
}

function searchSection() {
  const { genotypes } = content.search;
  const maps = Object.keys(KINDS).map(heatMap);
  const cells = h("div", { class: "pair", id: "cells" });
  const output = h("output", { for: "epoch" });
  const slider = h("input", { type: "range", id: "epoch", min: 1, max: genotypes.length, value: genotypes.length, oninput: () => show(slider.value - 1) });
  let timer = null, drawn = null;
  const play = h("button", { type: "button", onclick: () => (timer === null ? start() : stop()) }, "Play");
  function show(epoch) {
    chosen = epoch;
    slider.value = epoch + 1;
    output.textContent = `Epoch ${epoch + 1} of ${genotypes.length}`;
    slider.setAttribute("aria-valuetext", output.textContent);
    if (drawn !== genotypes[epoch]) cells.replaceChildren(...cellsOf(genotypes[epoch]));
    drawn = genotypes[epoch];
    for (const map of maps) map.show(epoch);
    showEpoch(null);
  }
  function start() {
    play.textContent = "Pause";
    if (chosen === genotypes.length - 1) show(0);
    timer = setInterval(() => (chosen < genotypes.length - 1 ? show(chosen + 1) : stop()), 400);
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  show(genotypes.length - 1);
  return section("Epoch by epoch",
    h("div", { class: "slider" }, play, h("label", { for: "epoch" }, "Epoch"), slider, output,
      copyButton("Copy this genotype", () => content.pictures.cells[genotypes[chosen]].notation)),
    cells, key(),
    h("div", { class: "pair" }, ...maps.map(({ node }) => node)), scale());
}

// ---- everything else ----------------------------------------------------------------------------

function genotypeSection() {
  const { yaml, notation } = content.pictures.cells[content.genotype];
  const pictures = content.search ? [] : [h("div", { class: "pair" }, ...cellsOf(content.genotype)), key()];
  return section(content.search ? "Genotype of the last epoch" : "Cells", ...pictures,
    h("div", { class: "pair" },
      h("div", {}, h("h3", {}, "As yaml"), h("pre", {}, yaml), copyButton("Copy yaml", yaml)),
      h("div", {}, h("h3", {}, "As in the official code"), h("pre", { class: "wrap" }, notation), copyButton("Copy official notation", notation))));
}

function numberTable({ columns, rows }) {
  return h("table", {}, h("thead", {}, h("tr", {}, ...columns.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, ...rows.map(([first, ...rest]) =>
      h("tr", {}, h("th", { scope: "row" }, number(first)), ...rest.map((value) => h("td", {}, number(value)))))));
}

// Rows in the order of a column, whose heading is a button; a second press turns it round.
function sortableTable({ columns, rows, reports }) {
  const entries = rows.map((row, index) => ({ row, report: reports[index] }));
  const body = h("tbody");
  const heads = columns.map((name, column) => h("th", { scope: "col", class: rows.some((row) => typeof row[column] === "string") ? "text" : null }, h("button", { type: "button", onclick: () => sort(column) }, name)));
  function cell(value, column, report) {
    const unit = columns[column].endsWith("(%)") ? "%" : "";
    const text = typeof value === "string" ? value : number(value, 4, unit);
    const link = column === 0 && report ? h("a", { href: encodeURI(report) }, text) : text;
    return h(column === 0 ? "th" : "td", { class: typeof value === "string" ? "text" : null, scope: column === 0 ? "row" : null }, link);
  }
  function draw() {
    body.replaceChildren(...entries.map(({ row, report }) => h("tr", {}, ...row.map((value, column) => cell(value, column, report)))));
  }
  function sort(column) {
    const down = heads[column].getAttribute("aria-sort") === "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    entries.sort(({ row: a }, { row: b }) => {
      const [one, other] = [a[column], b[column]];
      if (one === null || other === null) return (one === null) - (other === null); // unknown comes last
      const order = typeof one === "string" ? one.localeCompare(other, "en", { numeric: true }) : one - other;
      return down ? -order : order;
    });
    draw();
  }
  draw();
  return h("table", {}, h("thead", {}, h("tr", {}, ...heads)), body);
}

function tableSection(table) {
  return section(table.title,
    table.means.length ? list(table.means, "facts") : null,
    table.means.length ? h("p", { class: "soft" }, `Mean ± standard deviation over the finished runs that differ in the seed alone. Finished: ${table.complete}.`) : null,
    scroll(table.title, sortableTable(table)));
}

function sideBySide() {
  return section("Cells", h("p", { class: "soft" }, "The normal cell, and below it the reduction cell."),
    h("div", { class: "cards" }, ...content.cells.map(({ run, genotype }) =>
    h("article", {}, h("h3", {}, run),
      scroll(`Cells of ${run}`, h("div", {},
        ...Object.entries(content.pictures.cells[genotype].layout).map(([kind, layout]) => drawCell(kind, layout)))),
      h("div", { class: "buttons" }, copyButton("Copy yaml", content.pictures.cells[genotype].yaml),
        copyButton("Copy official notation", content.pictures.cells[genotype].notation))))), key());
}

function about() {
  const command = new Map(content.environment).get("command");
  return section("How it was made",
    command ? h("pre", { class: "wrap" }, command) : null,
    command ? h("div", { class: "buttons" }, copyButton("Copy command", command)) : null,
    list(content.environment.filter(([name]) => name !== "command"), "list"),
    content.config ? h("details", {}, h("summary", {}, "Config"), h("pre", {}, content.config)) : null);
}

function themeButton() {
  const root = document.documentElement;
  const set = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
  };
  const button = h("button", { type: "button", "aria-label": "Change between light and dark", onclick: () => set(root.dataset.theme !== "dark") });
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", () => set(system.matches));
  set(system.matches);
  return button;
}

document.body.append(
  h("header", {}, h("h1", {}, content.title), themeButton()),
  h("main", {},
    list(content.facts, "facts"),
    ...(content.tables || []).map(tableSection),
    content.cells && content.cells.length ? sideBySide() : null,
    charts.length ? section("Curves", h("div", { class: "charts" }, ...charts.map(({ node }) => node)),
      h("details", {}, h("summary", {}, "Numbers"), scroll("Numbers", numberTable(content.numbers)))) : null,
    content.search ? searchSection() : null,
    typeof content.genotype === "number" ? genotypeSection() : null,
    about()));
showEpoch(null);
