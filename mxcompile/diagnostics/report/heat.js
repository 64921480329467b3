// The heat map: a panel for each pass, a row for each block of the model, a column for each matmul of a block.
// Darker cells have a larger error.

const MEANINGS = {
  local_db: "Each layer’s output on its input in the float model: the error of the layer itself. Of cached keys and values: the error of rounding them.",
  accumulated_db: "Each layer’s output in the current model: the error accumulated up to it.",
  weight_db: "Each weight against the float model’s. Not measured for passes that preserve the function.",
};
const GAP = 32; // between panels, as in page.css
const CLEAR = 60; // dB: the float rounding of a fold is far above, the rounding of a format far below

function drawMaps() {
  d3.selectAll("#metric input").on("change", (event) => {
    state.metric = event.target.value;
    drawMaps();
  });
  d3.select("#metric-meaning").text(MEANINGS[state.metric]);
  const [low, high] = heatDomain();
  d3.select("#worst").text(`${low} dB`);
  d3.select("#best").text(`${high} dB or better`);
  const maps = d3.select("#maps");
  const size = cellSize(maps.node().clientWidth);
  maps.selectAll("figure").data(measured).join("figure").each(function (pass) {
    const cells = heatCells(pass, low, high);
    const title = d3.create("figcaption").text(passTitle(pass)).node();
    this.replaceChildren(title, heatPlot(cells, size));
    addArrowKeys(d3.select(this), cells);
  });
  drawSelection();
  drawMatches();
}

// From the worst value to the 90th percentile, so that the bad layers stand out.
function heatDomain() {
  const values = measured.flatMap((pass) => Object.values(report.passes[pass].numbers).map((n) => number(n[state.metric])));
  const lossy = values.filter((value) => value !== null && value < CLEAR && value > -Infinity);
  const low = Math.floor(d3.min(lossy) ?? 0);
  return [low, Math.max(low + 6, Math.round(d3.quantile(lossy, 0.9) ?? 0))];
}

function heatCells(pass, low, high) {
  return report.layers.map(({ name, row, column }) => {
    const numbers = report.passes[pass].numbers[name];
    const value = numbers === undefined ? null : number(numbers[state.metric]);
    const ink = value === null || Number.isNaN(value) ? 0 : Math.min(1, Math.max(0, (high - value) / (high - low)));
    return { pass, name, row, column, value, ink };
  });
}

// As many panels side by side as fit; the cells take the remaining width.
function cellSize(available) {
  const longest = (kind) => d3.max(shortened(kind).values(), (label) => label.length);
  const columns = shortened("column").size;
  const left = 8 + 6.2 * longest("row");
  const labels = 5.6 * longest("column");
  const right = 0.79 * labels - 12; // for the end of a slanted label
  const beside = Math.floor((available + GAP) / (left + 28 * columns + right + GAP));
  const panels = Math.max(1, Math.min(beside, measured.length));
  const room = (available + GAP) / panels - GAP - left - right;
  const width = Math.max(26, Math.min(52, room / columns));
  const slanted = labels > width;
  return { left, columns, width, slanted, right: slanted ? right : 0, top: slanted ? 12 + 0.62 * labels : 16 };
}

function heatPlot(cells, { left, right, top, columns, width, slanted }) {
  const rows = shortened("row");
  const names = shortened("column");
  const place = { x: "column", y: "row" };
  return Plot.plot({
    width: left + columns * width + right,
    height: top + rows.size * 20,
    marginTop: top,
    marginLeft: left,
    marginRight: right,
    marginBottom: 0,
    padding: 0,
    round: false,
    x: { axis: "top", label: null, tickSize: 0, tickPadding: slanted ? 5 : 4, tickRotate: slanted ? -38 : 0, domain: names.keys(), tickFormat: (c) => names.get(c) },
    y: { label: null, tickSize: 0, tickPadding: 5, domain: rows.keys(), tickFormat: (r) => rows.get(r) },
    marks: [
      Plot.cell(cells, {
        ...place,
        inset: 1,
        fill: { value: (c) => `color-mix(in oklab, var(--worst) ${Math.round(100 * c.ink)}%, var(--best))`, scale: null },
        href: (c) => layerLink(c.pass, c.name),
        ariaLabel: (c) => `${c.name}, ${passTitle(c.pass)}: ${described(c)}`,
        title: (c) => `${c.name}\n${described(c)}`,
      }),
      Plot.text(cells, {
        ...place,
        text: (c) => cellText(c.value),
        fill: { value: (c) => (c.ink > 0.7 ? "var(--on-worst)" : "var(--text)"), scale: null },
        pointerEvents: "none",
      }),
    ],
  });
}

function described({ value }) {
  return value === null ? "not measured" : value === Infinity ? "exact" : `${db(value)} dB`;
}

function cellText(value) {
  if (value === null) return "·";
  if (value === Infinity) return "=";
  return value < 100 ? decibels(value) : d3.format(".0f")(value);
}

// Labels of rows or columns, shortened to the last names that make them unique.
function shortened(kind) {
  const all = [...new Set(report.layers.map((layer) => layer[kind]))];
  const endings = (label) => label.split(".").map((_, i, parts) => parts.slice(parts.length - 1 - i).join("."));
  const counts = d3.rollup(all.flatMap(endings), (same) => same.length, (ending) => ending);
  return new Map(all.map((label) => [label, endings(label).find((ending) => counts.get(ending) === 1) || label || "(top)"]));
}

// One tab stop for each panel; arrow keys move between cells.
function addArrowKeys(figure, cells) {
  const anchors = figure.selectAll("a").nodes();
  const rows = [...new Set(cells.map((cell) => cell.row))];
  const columns = [...new Set(cells.map((cell) => cell.column))];
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  d3.selectAll(anchors).attr("tabindex", -1).on("keydown", (event) => {
    if (!(event.key in steps)) return;
    event.preventDefault();
    let { row, column } = cells[anchors.indexOf(event.currentTarget)];
    const [down, right] = steps[event.key];
    for (let next; next === undefined; ) {
      row = rows[rows.indexOf(row) + down];
      column = columns[columns.indexOf(column) + right];
      if (row === undefined || column === undefined) return;
      next = anchors[cells.findIndex((cell) => cell.row === row && cell.column === column)];
      next?.focus();
    }
  });
}

function eachCell(selector, draw) {
  d3.selectAll("#maps figure").each(function (pass) {
    d3.select(this).selectAll(selector).each(function (_, i) {
      draw(d3.select(this), report.layers[i].name, pass);
    });
  });
}

function drawSelection() {
  eachCell("a", (cell, name, pass) => {
    const same = name === state.layer;
    cell.classed("same", same).attr("aria-current", same && pass === state.pass ? "true" : null);
    cell.attr("tabindex", same ? 0 : -1);
  });
}

function drawMatches() {
  if (!state.matches) return;
  const draw = (cell, name) => cell.classed("aside", !state.matches(layers.get(name).module));
  eachCell("a", draw);
  eachCell("g[aria-label=text] text", draw);
}
