// What a pass changed in the graph, side by side, or in one column where there is no room; drawn when it is opened.
// While there is a search, only the lines of the modules that match.

const HUNK = /^@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@/;
const PLACE = /tensor "(?:(.*)\.)?[^".]*"|\) +# (.*)$/;

d3.selectAll("details.pass").on("toggle", function () {
  if (this.open) drawDiff(this);
});

function drawDiff(details) {
  const box = d3.select(details).select(".diff");
  if (box.property("query") === state.query) return;
  const { diff } = report.passes[details.dataset.pass];
  const shown = state.query ? onlyMatching(diff) : diff;
  box.property("query", state.query).html("");
  if (state.query) box.append("p").attr("class", "remark").text(`Lines of modules that match ${state.query}`);
  if (!shown) {
    box.append("p").attr("class", "absent").text(diff ? "None of them has changed." : "The graph is the same before and after.");
    return;
  }
  const wide = matchMedia("(min-width: 60rem)").matches;
  box.append("div").html(Diff2Html.html(shown, {
    outputFormat: wide ? "side-by-side" : "line-by-line",
    drawFileList: false,
    matching: "lines",
    maxLineSizeInBlockForComparison: 1000,
    colorScheme: "auto",
  }));
}

function drawOpenDiffs() {
  d3.selectAll("details.pass[open]").each(function () {
    drawDiff(this);
  });
}

// A unified diff of the lines alone whose module matches; line numbers stay those of the graphs.
function onlyMatching(diff) {
  const [before, after, ...lines] = diff.trimEnd().split("\n");
  const hunks = changes(lines).flatMap(({ removed, added }) => {
    const [old, now] = [runs(removed), runs(added)];
    return d3.range(Math.max(old.length, now.length)).flatMap((i) => hunkLines(old[i] ?? [], now[i] ?? []));
  });
  return hunks.length ? [before, after, ...hunks].join("\n") : "";
}

// What is removed and added in one place, `{removed: [[number, line]], added: ...}`, as far as it matches.
function changes(lines) {
  const found = [];
  let [old, now] = [0, 0];
  for (const line of lines) {
    const hunk = HUNK.exec(line);
    if (hunk) [old, now] = [Number(hunk[1]), Number(hunk[2])];
    else if (line[0] === " ") [old, now] = [old + 1, now + 1];
    if (hunk || line[0] === " ") {
      found.push({ removed: [], added: [] });
      continue;
    }
    const place = PLACE.exec(line);
    const matches = place && state.matches(place[1] ?? place[2] ?? "");
    const [kind, at] = line[0] === "-" ? ["removed", old++] : ["added", now++];
    if (matches) found.at(-1)[kind].push([at, line]);
  }
  return found;
}

// Numbered lines, cut where they do not follow each other.
function runs(numbered) {
  return d3.groups([...numbered.entries()], ([i, [at]]) => at - i).map(([, run]) => run.map(([, line]) => line));
}

function hunkLines(removed, added) {
  const start = (run) => `${run.length ? run[0][0] : 0},${run.length}`;
  return [`@@ -${start(removed)} +${start(added)} @@`, ...[...removed, ...added].map(([, line]) => line)];
}
