// The diagnosis: a dot for each value in graph order, and the numbers of a layer.

const PROFILES = [
  ["In-block ratio", "input_in_block"],
  ["Imbalance", "imbalance"],
  ["SQNR of the output, dB", "sqnr_db"],
];

// Three digits, without an exponent.
const short = (value) => (value < 1000 ? d3.format(".3~r")(value) : d3.format(".0f")(value));

function drawDiagnosis() {
  const values = report.diagnosis.map((value, index) => ({ ...value, index }));
  const figures = d3.select("#profiles").selectAll("figure").data(PROFILES).join("figure");
  figures.each(function ([title, key]) {
    const caption = d3.create("figcaption").text(title).node();
    this.replaceChildren(caption);
    this.append(profilePlot(values, title, key, this.clientWidth));
  });
}

function profilePlot(values, title, key, width) {
  const dots = values.map((value) => ({ ...value, y: number(value.numbers[key]) }));
  const type = key === "imbalance" ? "log" : "linear";
  const powers = d3.range(0, 9).map((exponent) => 10 ** exponent).filter((value) => value <= d3.max(dots, (d) => d.y));
  return Plot.plot({
    width,
    height: 150,
    marginLeft: 38,
    marginRight: 8,
    marginTop: 8,
    marginBottom: 8,
    ariaLabel: `${title} of the inputs of layers, in the order of the model`,
    x: { axis: null },
    y: { type, label: null, ticks: type === "log" ? powers : 4, tickFormat: "~s", grid: true },
    marks: [
      Plot.dot(dots, {
        x: "index",
        y: "y",
        r: 2.5,
        fill: { value: (d) => (d.outliers ? "var(--after)" : "var(--before)"), scale: null },
        ariaLabel: (d) => `${d.name}: ${short(d.y)}`,
        title: (d) => `${d.name}\n${short(d.y)}${d.advice ? `\n${d.advice}` : ""}`,
      }),
    ],
  });
}

// What the diagnosis says of a layer, beside its measurements.
function appendDiagnosis(article, name) {
  const value = (report.diagnosis ?? []).find((each) => each.layers.includes(name));
  if (!value) return;
  const { numbers } = value;
  const facts = `channel ratio ${short(number(numbers.input_channel_ratio))}, in-block ratio ${short(number(numbers.input_in_block))}, imbalance ${short(number(numbers.imbalance))}`;
  const text = value.advice ? `${facts}. Recommended: ${value.advice}.` : `${facts}.`;
  article.append("p").attr("class", "remark diagnosed").text(`Diagnosis of the input: ${text}`);
}
