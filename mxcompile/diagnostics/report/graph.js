// The nodes of the graph after a pass, filtered by module and operation, a page at a time.

const [NAME, OP, CALL, DTYPE, SHAPE, FORMAT, MODULE] = d3.range(7);
const ROWS = 200;

function prepareGraph() {
  const stages = d3.select("#stage");
  stages.selectAll("option").data(report.stages).join("option").attr("value", (_, i) => i).text((stage) => stage.name);
  stages.on("change", () => showStage(Number(stages.property("value"))));
  d3.select("#op").on("change", drawNodes);
  d3.select("#more").on("click", () => drawNodes(null, d3.selectAll("#nodes tr").size() + 5 * ROWS));
  showStage(report.stages.length - 1);
}

function showStage(stage) {
  state.stage = stage;
  d3.select("#stage").property("value", stage);
  const select = d3.select("#op");
  const chosen = select.property("value");
  const ops = d3.rollups(report.stages[stage].nodes, (nodes) => nodes.length, (node) => node[OP]).filter(([op]) => op);
  ops.sort(([a], [b]) => d3.ascending(a, b));
  select.selectAll("option").data([["", report.stages[stage].nodes.length], ...ops]).join("option")
    .attr("value", ([op]) => op)
    .text(([op, n]) => `${op || "all"} (${n})`);
  select.property("value", ops.some(([op]) => op === chosen) ? chosen : "");
  drawNodes();
}

function shownNodes() {
  const op = d3.select("#op").property("value");
  const matches = state.matches ?? (() => true);
  return report.stages[state.stage].nodes.filter((node) => (!op || node[OP] === op) && matches(node[MODULE]));
}

function drawNodes(_, limit = ROWS) {
  const nodes = shownNodes();
  const rows = d3.select("#nodes").html("").selectAll("tr").data(nodes.slice(0, limit)).join("tr");
  rows.append("th").attr("scope", "row").append("code").text((node) => node[NAME]);
  for (const field of [OP, DTYPE, SHAPE, FORMAT, MODULE]) rows.append("td").append("code").text((node) => node[field]);
  rows.append("td").append("code").attr("class", "call").text((node) => node[CALL]);
  rows.attr("class", (node) => (node[FORMAT] ? "quantized" : null));
  d3.select("#graph").classed("whole", !state.query && !d3.select("#op").property("value"));
  const all = report.stages[state.stage].nodes.length;
  const inside = state.query ? ` in ${state.query}` : "";
  d3.select("#shown").text(`${d3.format(",")(nodes.length)} of ${count(all, "node")}${inside}`);
  const rest = nodes.length - limit;
  d3.select("#more").attr("hidden", rest > 0 ? null : "").text(`Show ${Math.min(rest, 5 * ROWS)} more`);
}
