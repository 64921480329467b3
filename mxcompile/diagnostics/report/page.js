// The state of the page, number formats, and links within the page.

const report = JSON.parse(document.getElementById("content").textContent);
const layers = new Map(report.layers.map((layer) => [layer.name, layer]));
const measured = d3.range(report.passes.length).filter((i) => Object.keys(report.passes[i].numbers).length);
const state = { layer: null, pass: measured.at(-1), metric: "local_db", query: "" };

const WORDS = { inf: Infinity, "-inf": -Infinity, nan: NaN };
const number = (value) => (value in WORDS ? WORDS[value] : value);
const decibels = d3.format(".1f");
const db = (value) => (value === null ? "–" : value === Infinity ? "exact" : decibels(value));
const percent = d3.format(".1%");
const passTitle = (pass) => `${pass + 1} ${report.passes[pass].name}`;
const layerLink = (pass, name) => `#layer/${pass + 1}/${encodeURIComponent(name)}`;

// `#layer/PASS/NAME` and `#pass/PASS`; other links are to sections.
function route() {
  const [kind, index, name] = location.hash.slice(1).split("/").map(decodeURIComponent);
  const pass = Number(index) - 1;
  if (kind === "layer" && layers.has(name) && measured.includes(pass)) {
    selectLayer(pass, name);
    reveal(document.getElementById("layer"));
  } else if (kind === "pass" && report.passes[pass]) {
    const shown = document.getElementById(`pass-${pass + 1}`);
    shown.open = true;
    shown.scrollIntoView();
  }
}

function selectLayer(pass, name) {
  Object.assign(state, { pass, layer: name });
  drawSelection();
  drawLayer();
}

// Scrolls only if the top of the element is out of view.
function reveal(element) {
  const top = element.getBoundingClientRect().top;
  if (top < 0 || top > innerHeight * 0.8) element.scrollIntoView();
}

// A path with line break opportunities.
function appendPath(selection, path) {
  for (const [i, part] of path.split(".").entries()) {
    if (i) selection.append("wbr");
    selection.append("span").text(i ? `.${part}` : part);
  }
}

function worstLayer() {
  const numbers = Object.entries(report.passes[state.pass].numbers);
  return d3.least(numbers, ([, layer]) => number(layer.local_db) ?? Infinity)[0];
}

addEventListener("DOMContentLoaded", () => {
  if (measured.length) {
    state.layer = worstLayer();
    drawMaps();
    drawLayer();
  }
  if (report.diagnosis) drawDiagnosis();
  if (trained.length) drawTraining();
  prepareGraph();
  prepareSearch();
  route();
});
addEventListener("hashchange", route);
