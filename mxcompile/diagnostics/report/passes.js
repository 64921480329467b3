// The diff of a pass, side by side, or in one column on a narrow screen; drawn when it is opened.
// During a search, only the lines of matching modules.

const HUNK = /^@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@/;
const MODULE_PATH = /tensor "(?:(.*)\.)?[^".]*"|\) +# (.*)$/;

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
    box.append("p").attr("class", "absent").text(diff ? "None of them changed." : "The pass did not change the graph.");
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

// A unified diff of only the lines whose module matches, with the line numbers of the graphs.
function onlyMatching(diff) {
  const [before, after, ...lines] = diff.trimEnd().split("\n");
  const hunks = changes(lines).flatMap(({ removed, added }) => {
    const [old, now] = [runs(removed), runs(added)];
    return d3.range(Math.max(old.length, now.length)).flatMap((i) => hunkLines(old[i] ?? [], now[i] ?? []));
  });
  return hunks.length ? [before, after, ...hunks].join("\n") : "";
}

// The matching lines of each run of changes, as `{removed: [[number, line]], added: ...}`.
function changes(lines) {
  const result = [];
  let [old, now] = [0, 0];
  for (const line of lines) {
    const hunk = HUNK.exec(line);
    if (hunk) [old, now] = [Number(hunk[1]), Number(hunk[2])];
    else if (line[0] === " ") [old, now] = [old + 1, now + 1];
    if (hunk || line[0] === " ") {
      result.push({ removed: [], added: [] });
      continue;
    }
    const path = MODULE_PATH.exec(line);
    const matches = path && state.matches(path[1] ?? path[2] ?? "");
    const [kind, at] = line[0] === "-" ? ["removed", old++] : ["added", now++];
    if (matches) result.at(-1)[kind].push([at, line]);
  }
  return result;
}

// Numbered lines, split into runs of consecutive numbers.
function runs(numbered) {
  return d3.groups([...numbered.entries()], ([i, [at]]) => at - i).map(([, run]) => run.map(([, line]) => line));
}

function hunkLines(removed, added) {
  const start = (run) => `${run.length ? run[0][0] : 0},${run.length}`;
  return [`@@ -${start(removed)} +${start(added)} @@`, ...[...removed, ...added].map(([, line]) => line)];
}
