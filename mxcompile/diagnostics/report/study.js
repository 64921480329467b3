// The plot of a study: a dot for each cell by bytes and KL, and the front as a line.

const study = JSON.parse(document.getElementById("content").textContent);

function drawFront(figure, group) {
  const cells = group.cells.map((cell) => ({ ...cell, mb: cell.bytes / 1e6 }));
  const front = d3.sort(cells.filter((cell) => cell.front), (cell) => cell.mb);
  const [least, most] = d3.extent(cells, (cell) => cell.kl);
  const isWide = least > 0 && most > 20 * least;
  const plot = Plot.plot({
    width: Math.min(figure.clientWidth, 900),
    height: 320,
    marginLeft: 52,
    marginRight: 120,
    ariaLabel: `KL divergence by size: ${group.title}`,
    x: { label: "MB →", nice: true, inset: 12 },
    y: { label: "↑ KL, nats", type: isWide ? "log" : "linear", grid: true, inset: 8, tickFormat: isWide ? "~g" : undefined },
    marks: [
      Plot.line(front, { x: "mb", y: "kl", stroke: "var(--after)", strokeWidth: 1.5 }),
      Plot.dot(d3.sort(cells, (cell) => cell.front), {
        x: "mb",
        y: "kl",
        r: 4,
        fill: { value: (cell) => (cell.front ? "var(--after)" : "var(--before)"), scale: null },
        ariaLabel: (cell) => `${cell.label}: ${d3.format(".1f")(cell.mb)} MB, KL ${d3.format(".4f")(cell.kl)}`,
        title: (cell) => [cell.label, cell.calibration, `${d3.format(".1f")(cell.mb)} MB, KL ${d3.format(".4f")(cell.kl)}`].filter(Boolean).join("\n"),
      }),
      Plot.text(front, { x: "mb", y: "kl", text: "label", dx: 8, textAnchor: "start", fill: "var(--text)" }),
    ],
  });
  figure.append(plot);
}

for (const figure of document.querySelectorAll("figure.front")) drawFront(figure, study.groups[Number(figure.dataset.group)]);
