// The map of cosines: a panel a module type, a row a layer, a column a singular index.

const ROWS = 300; // of a panel; with more layers, a row is a block of them and shows the lowest cosine of each index
const UNDECIDED = 2; // the value of a cell whose bounds lie on both sides of epsilon

function drawMap() {
  const report = shown(),
    map = byId("map");
  for (const old of map.querySelectorAll(".plot")) forget(old);
  const most = Math.max(1, ...report.layers.map((layer) => vectorsOf(layer).length));
  map.style.setProperty("--facet", `${Math.min(24, Math.max(9.2, 2.2 + 0.42 * most))}rem`);
  map.replaceChildren(...report.facets.map((facet) => panel(report, facet)));
  drawLegend();
}

function panel(report, facet) {
  const rows = blocks(facet);
  const height = rows.length * Math.max(2, Math.min(20, Math.round(420 / rows.length))) + 26;
  const what = facet.title ?? "single layers";
  const plot = make("div", {
    className: "plot",
    tabIndex: 0,
    role: "application",
    "aria-roledescription": "map of cosines",
    "aria-label": `${what}: ${plural(facet.layers.length, "layer")}. Arrow keys move from cell to cell, Enter opens the layer.`,
  });
  plot.style.height = `${height}px`;
  const count = make("small");
  const element = make(
    "div",
    { className: facet.title === null ? "facet wide" : "facet" },
    make("h3", {}, what, count),
    plot,
  );
  const cells = { rows, at: [0, 0] };
  plot.recount = () => {
    const found = countLayers(
      report,
      facet.layers.map((n) => report.layers[n]),
    );
    count.textContent = found.vectors ? `${span(found.least, found.most)} of ${found.vectors}` : "noise-like";
  };
  plot.recount();
  figure(
    plot,
    () => {
      plot.recount();
      return mapFigure(report, rows);
    },
    () => listen(plot, report, cells),
  );
  return element;
}

/** [{label, layers}], one layer each unless there are very many. */
function blocks(facet) {
  const size = Math.ceil(facet.layers.length / ROWS),
    rows = [];
  for (let at = 0; at < facet.layers.length; at += size) {
    const last = Math.min(at + size, facet.layers.length) - 1;
    rows.push({
      label: at === last ? facet.labels[at] : `${facet.labels[at]} … ${facet.labels[last]}`,
      layers: facet.layers.slice(at, last + 1),
    });
  }
  return rows;
}

/** What a cell shows: {layer, place} of the lowest cosine among its layers at this index, or null. */
function cellOf(report, row, index) {
  let best = null;
  for (const layer of row.layers) {
    const place = vectorsOf(report.layers[layer]).indexOf(index);
    if (place < 0) continue;
    const value = shade(report, report.layers[layer], place);
    if (value !== null && (best === null || value < best.value)) best = { layer, place, value };
  }
  return best;
}

/** A vector's place on the colour scale: below epsilon just where it is an intruder, UNDECIDED, or null. */
function shade(report, layer, i) {
  const verdict = judge(report, layer, i),
    epsilon = threshold(report);
  if (verdict === OPEN) return UNDECIDED;
  let value = layer.cosine[i];
  if (value === null) {
    if (flagsOf(layer, i).includes("null_space")) return null;
    value = layer.bounds[i][verdict === YES ? 1 : 0];
  }
  return (verdict === YES ? Math.min(value, epsilon - 1) : Math.max(value, epsilon)) / STEPS;
}

function mapFigure(report, rows) {
  const c = colours(),
    most = Math.max(...rows.flatMap((row) => row.layers.map((n) => vectorsOf(report.layers[n]).length)));
  const indices = [...Array(most).keys()];
  const cells = rows.map((row) => indices.map((index) => cellOf(report, row, index)));
  const e = threshold(report) / STEPS / UNDECIDED;
  const scale = [
    [0, c.intruder],
    [e, c.intruderWeak],
    [e, c.known],
    [1 / UNDECIDED, c.knownWeak],
    [1 / UNDECIDED, c.perhaps],
    [1, c.perhaps],
  ];
  const every = Math.ceil(rows.length / 24);
  const ticks = rows.map((_, place) => place).filter((place) => place % every === 0);
  return {
    data: [
      {
        type: "heatmap",
        z: cells.map((row) => row.map((cell) => (cell === null ? null : cell.value))),
        x: indices,
        y: rows.map((_, place) => place),
        zmin: 0,
        zmax: UNDECIDED,
        colorscale: scale,
        showscale: false,
        xgap: most > 30 ? 0 : 1,
        ygap: rows.length > 80 ? 0 : 1,
        hoverinfo: "text",
        hoverongaps: false,
        text: cells.map((row) =>
          row.map((cell) => (cell === null ? "" : describe(report, cell).map(plain).join("<br>"))),
        ),
      },
    ],
    layout: {
      margin: { l: 4, r: 2, t: 2, b: 18 },
      xaxis: {
        range: [-0.5, most - 0.5],
        showgrid: false,
        zeroline: false,
        ticks: "",
        tickmode: "linear",
        dtick: most > 12 ? 10 : most > 5 ? 3 : 1,
      },
      yaxis: {
        range: [rows.length - 0.5, -0.5],
        showgrid: false,
        zeroline: false,
        ticks: "",
        tickvals: ticks,
        ticktext: ticks.map((place) => plain(shortened(rows[place].label, 44))),
      },
    },
  };
}

/** What is said of a cell, in lines. */
function describe(report, { layer: number, place }) {
  const layer = report.layers[number];
  const words = { [YES]: "intruder", [NO]: "no intruder", [OPEN]: "cannot be told at this ε: only bounds are known" };
  const lines = [
    layer.name,
    `index ${layer.index[place]}: max |cos| ${cosineOf(layer, place)}, ${words[judge(report, layer, place)]}`,
    `σ = ${short(layer.sigma[place])}`,
  ];
  const base = layer.baseIndex[place];
  if (base !== null) lines.push(`most like base vector ${base}`);
  if (layer.noise) lines.push("its base is plain noise");
  return lines;
}

function listen(plot, report, cells) {
  plot.on("plotly_click", ({ points }) => {
    const [row, index] = points[0].pointIndex ?? [points[0].y, points[0].x];
    const cell = cellOf(report, cells.rows[row], index);
    if (cell) openLayer(cell.layer, plot);
  });
  const columns = () => plot.data[0].x.length;
  const show = () => {
    const [row, index] = cells.at,
      cell = cellOf(report, cells.rows[row], index);
    byId("map-status").textContent = cell ? describe(report, cell).join(", ") : "no vector";
    window.Plotly.Fx.hover(plot, { xval: index, yval: row }, "xy");
  };
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  plot.addEventListener("focus", () => {
    if (plot.matches(":focus-visible")) show();
  });
  plot.addEventListener("blur", () => window.Plotly.Fx.unhover(plot));
  plot.addEventListener("keydown", (event) => {
    if (event.key in moves) {
      const limit = [cells.rows.length, columns()];
      cells.at = cells.at.map((value, axis) => Math.min(limit[axis] - 1, Math.max(0, value + moves[event.key][axis])));
      show();
    } else if (event.key === "Enter" || event.key === " ") {
      const cell = cellOf(report, cells.rows[cells.at[0]], cells.at[1]);
      if (cell) openLayer(cell.layer, plot);
    } else return;
    event.preventDefault();
  });
}

function drawLegend() {
  const c = colours(),
    e = (100 * threshold(shown())) / STEPS;
  const ramp = make("span", { className: "ramp" });
  ramp.style.background = `linear-gradient(90deg, ${c.intruder} 0%, ${c.intruderWeak} ${e}%, ${c.known} ${e}%, ${c.knownWeak} 100%)`;
  const parts = [make("span", {}, "resembles nothing (0)", ramp, "(1) as it was")];
  if (shown().layers.some((layer) => layer.cosine?.includes(null))) {
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = c.perhaps;
    parts.push(make("span", {}, swatch, "bounds do not say"));
  }
  if (shown().facets.some((facet) => facet.layers.length > ROWS)) {
    parts.push(make("span", {}, "a row is several layers; its cells are the lowest cosines among them"));
  }
  byId("legend").replaceChildren(...parts);
}
