// Search by module path: layers that do not match are dimmed, the graph shows only matching nodes.

function prepareSearch() {
  const nodes = report.stages.flatMap((stage) => stage.nodes.map((node) => node[MODULE]));
  const paths = new Set();
  for (const module of new Set([...nodes, ...report.layers.map((layer) => layer.module)])) {
    const parts = module.split(".");
    parts.forEach((_, i) => paths.add(parts.slice(0, i + 1).join(".")));
  }
  paths.delete("");
  state.paths = paths;
  const input = d3.select("#query").on("input", (event) => search(event.target.value));
  input.on("change", drawOpenDiffs);
  input.on("keydown", (event) => event.key === "Enter" && location.assign("#graph"));
  d3.select("#modules").selectAll("option").data(paths).join("option").attr("value", (path) => path);
  search(input.property("value"));
}

function search(query) {
  state.query = query.trim();
  state.matches = matcher(state.query);
  drawMatches();
  drawNodes();
  const matching = report.layers.filter((layer) => state.matches(layer.module)).length;
  const results = state.query ? [["#layers", count(matching, "layer")], ["#graph", count(shownNodes().length, "node")]] : [];
  d3.select("#matches").selectAll("a").data(results).join("a").attr("href", ([link]) => link).text(([, text]) => text);
}

// A path of a module matches it and all modules inside; `*` stands for any text; other text matches anywhere in a path.
function matcher(query) {
  if (!query) return () => true;
  if (state.paths.has(query)) return (path) => path === query || path.startsWith(`${query}.`);
  const parts = query.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&"));
  const pattern = new RegExp(parts.length > 1 ? `^${parts.join(".*")}$` : parts[0], "i");
  return (path) => pattern.test(path);
}

function searchFor(query) {
  d3.select("#query").property("value", query);
  search(query);
  drawOpenDiffs();
}

function count(n, what) {
  return `${d3.format(",")(n)} ${what}${n === 1 ? "" : "s"}`;
}
