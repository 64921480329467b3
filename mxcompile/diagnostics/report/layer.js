// One layer: histograms before and after a pass, its SQNR after every pass, and links to its nodes.

const COLUMNS = [
  ["Weight", "weight_db"],
  ["Local", "local_db"],
  ["Accumulated", "accumulated_db"],
];

function drawLayer() {
  const { layer: name, pass } = state;
  const { module } = layers.get(name);
  const article = d3.select("#layer").html("");
  appendPath(article.append("h3").attr("id", "layer-title"), name);
  const numbers = report.passes[pass].numbers[name];
  if (numbers) article.append("p").attr("class", "remark").text(`${formats(numbers)} after ${passTitle(pass)}`);
  appendDiagnosis(article, name);
  drawPassLinks(article, name);
  drawDistributions(article, name, pass);
  drawNumbers(article, name);
  const links = article.append("p").attr("class", "go");
  const nodes = links.append("a").attr("href", "#graph").text("Nodes in the graph");
  const change = links.append("a").attr("href", `#pass/${pass + 1}`).text(`Changes by ${report.passes[pass].name}`);
  nodes.on("click", () => showStage(pass + 1));
  for (const link of [nodes, change]) link.on("click.search", () => searchFor(module));
}

function formats({ cache, weight, activation }) {
  return cache ? `rounded by ${cache}` : `weight ${weight ?? "float"}, input ${activation ?? "float"}`;
}

function drawPassLinks(article, name) {
  const links = article.append("nav").attr("class", "tabs").attr("aria-label", "Passes");
  links.selectAll("a").data(measured).join("a")
    .attr("href", (pass) => layerLink(pass, name))
    .attr("aria-current", (pass) => (pass === state.pass ? "true" : null))
    .text(passTitle);
}

// The weight against the traced one; the input against its rounded values, or against the traced input.
function drawDistributions(article, name, pass) {
  const box = article.append("div").attr("class", "distributions");
  const change = report.passes[pass].distributions[name];
  if (!change) {
    const what = report.passes[pass].numbers[name]?.cache ? "a cache has none." : "this layer could not be compared after this pass.";
    box.append("p").attr("class", "absent").text(`No histograms: ${what}`);
    return;
  }
  const first = measured.find((each) => report.passes[each].distributions[name]);
  const traced = report.passes[first].distributions[name].before;
  const { after } = change;
  drawDistribution(box, "Weight", traced.weight, after.weight, "traced", "after the pass");
  if (after.rounded) drawDistribution(box, "Input", after.input, after.rounded, "before rounding", "rounded");
  else if (after.input) drawDistribution(box, "Input", traced.input, after.input, "traced", "after the pass");
}

function drawDistribution(box, title, one, other, oneName, otherName) {
  const figure = box.append("figure").attr("class", "distribution");
  const caption = figure.append("figcaption");
  caption.append("strong").text(title);
  const same = JSON.stringify(one) === JSON.stringify(other);
  caption.append("span").attr("class", "swatch before").text(same ? `${oneName}, unchanged` : oneName);
  if (!same) caption.append("span").attr("class", "swatch after").text(otherName);
  const kinds = same ? [["before", one]] : [["before", one], ["after", other]];
  figure.append(() => histogram(title, kinds, figure.node().clientWidth));
  figure.append("p").attr("class", "remark").text(kinds.map(([, values]) => zeros(values)).join(" → ") + notFinite(other));
}

// Share of the values per octave of magnitude, since bins differ in width.
function histogram(title, kinds, width) {
  const bars = kinds.flatMap(([kind, values]) => {
    const total = values.zeros + values.nonfinite + d3.sum(values.counts);
    return values.counts.map((n, i) => {
      const [x1, x2] = [binEdge(values.first + i), binEdge(values.first + i + 1)];
      return { kind, x1, x2, y: n / total / Math.log2(x2 / x1) };
    });
  });
  const seen = bars.filter((bar) => bar.y > 1e-3);
  const domain = seen.length ? [d3.min(seen, (bar) => bar.x1), d3.max(bars, (bar) => bar.x2)] : [0.5, 1];
  const shown = d3.group(bars.filter((bar) => bar.x1 >= domain[0]), (bar) => bar.kind);
  const outline = (shown.get("after") ?? []).flatMap(({ x1, x2, y }) => [{ x: x1, y }, { x: x2, y }]);
  return Plot.plot({
    width,
    height: 130,
    marginLeft: 34,
    marginRight: 8,
    marginTop: 8,
    marginBottom: 24,
    ariaLabel: `${title}: share of the values by magnitude`,
    x: { type: "log", base: 2, domain, label: null, ticks: 6, tickFormat: powerOfTwo },
    y: { label: null, ticks: 3, tickFormat: d3.format(".0%"), grid: true },
    marks: [
      Plot.rectY(shown.get("before") ?? [], { x1: "x1", x2: "x2", y: "y", fill: "var(--before)" }),
      Plot.ruleY([0]),
      Plot.line(outline, { x: "x", y: "y", stroke: "var(--after)", strokeWidth: 1.5, strokeLinejoin: "miter" }),
    ],
  });
}

// Lower edge of a bin of `distributions.json`.
function binEdge(bin) {
  return 2 ** (Math.floor(bin / 4) - 127) * (1 + (bin % 4) / 4);
}

function powerOfTwo(value) {
  const exponent = Math.log2(value);
  return Number.isInteger(exponent) ? `2${[...String(exponent)].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("")}` : "";
}

function zeros(values) {
  return `${percent(values.zeros / (values.zeros + values.nonfinite + d3.sum(values.counts)))} zeros`;
}

function notFinite(values) {
  return values.nonfinite ? `, ${count(values.nonfinite, "value")} not finite` : "";
}

function drawNumbers(article, name) {
  const table = article.append("div").attr("class", "scroll").append("table").attr("class", "numbers");
  table.append("caption").text("SQNR, dB");
  table.append("thead").append("tr").selectAll("th").data(["After", ...COLUMNS.map(([title]) => title)])
    .join("th").attr("scope", "col").text((title) => title);
  const rows = table.append("tbody").selectAll("tr").data(measured).join("tr")
    .attr("aria-current", (pass) => (pass === state.pass ? "true" : null));
  rows.append("th").attr("scope", "row").text(passTitle);
  for (const [, key] of COLUMNS) {
    rows.append("td").text((pass) => db(number(report.passes[pass].numbers[name]?.[key] ?? null)));
  }
}
