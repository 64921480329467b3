// The loss of passes that train: of every step, and of the batches that are held out.

const trained = report.passes.flatMap((pass, index) => Object.entries(pass.curves).map(([name, curve]) => ({ index, name, curve })));

function drawTraining() {
  const figures = d3.select("#curves").classed("many", trained.length > 9).selectAll("figure").data(trained).join("figure");
  figures.each(function ({ index, name, curve }) {
    const caption = d3.create("figcaption").text(`${passTitle(index)}: ${name}`).node();
    this.replaceChildren(caption);
    this.append(curvePlot(curve, caption.textContent, this.clientWidth));
  });
}

const points = (pairs) => pairs.map(([step, loss]) => ({ step, loss: number(loss) })).filter(({ loss }) => isFinite(loss));

function curvePlot(curve, title, width) {
  const [steps, held] = [points(curve.training), points(curve.held_out)];
  const [least, most] = d3.extent([...steps, ...held], (point) => point.loss);
  const isWide = least > 0 && most > 10 * least;
  const dot = (point) => `${title}, step ${point.step}: ${d3.format(".4~g")(point.loss)}`;
  return Plot.plot({
    width,
    height: trained.length > 9 ? 110 : 170,
    marginLeft: 48,
    marginRight: 12,
    ariaLabel: `Loss by step: ${title}`,
    x: { label: trained.length > 9 ? null : "step →", ticks: 4, tickFormat: "~s" },
    y: { label: null, type: isWide ? "log" : "linear", ticks: 4, tickFormat: "~g", grid: true, zero: false },
    marks: [
      Plot.line(steps, { x: "step", y: "loss", stroke: "var(--before)", strokeWidth: 1 }),
      Plot.line(held, { x: "step", y: "loss", stroke: "var(--after)", strokeWidth: 1.5 }),
      Plot.dot(held, { x: "step", y: "loss", r: 2.5, fill: "var(--after)", ariaLabel: dot, title: dot }),
    ],
  });
}
