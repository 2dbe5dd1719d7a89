// Several fine-tunes side by side.

let updateComparison = () => {};

function drawComparison() {
  if (!byId("comparison-part")) return;
  const count = ({ report }) => countLayers(report, report.layers);
  const ratio = ({ most, vectors }) => (vectors ? most / vectors : null); // of nothing, none: it sorts last
  const number = (title, get, digits) => ({
    title,
    value: ({ report }) => get(report),
    cell: ({ report }) => (digits === null ? (get(report) ?? MINUS) : fixed(get(report) ?? null, digits)),
  });
  const columns = [
    { title: "Fine-tune", left: true, value: ({ report }) => report.label, cell: chooser },
    {
      title: "Level",
      left: true,
      value: (row) => ratio(count(row)),
      cell: ({ report }) => levelOf(report) + (report.failed ? ` (${plural(report.failed, "layer")} failed)` : ""),
    },
    { title: "Method", left: true, value: ({ report }) => report.method, cell: ({ report }) => report.method },
    number("Rank", (report) => report.rank, null),
    number("Alpha", (report) => report.alpha, null),
    number("‖ΔW‖/‖W₀‖", (report) => report.size, 3),
    number("‖ΔW‖₂/θ", (report) => report.nearest, 2),
    number("Eff. rank", (report) => report.effectiveRank, 1),
    {
      title: "Intruders",
      value: (row) => count(row).most,
      cell: (row) => make("span", { className: "hit" }, span(count(row).least, count(row).most)),
    },
    { title: "Share", value: (row) => ratio(count(row)), cell: (row) => shareText(count(row)) },
    {
      title: "Layers",
      value: (row) => count(row).layersMost,
      cell: (row) => span(count(row).layersLeast, count(row).layersMost),
    },
    {
      title: "By chance",
      value: ({ report }) => report.chance?.[0],
      cell: ({ report }) => report.chance?.[1] ?? MINUS,
    },
    ...(DATA.reports.some((report) => report.p) ? [number("p", (report) => report.p, 2)] : []),
    {
      title: "Energy",
      value: ({ report }) => report.energy,
      cell: ({ report }) => (report.energy === null ? MINUS : `${fixed(100 * report.energy, 1)}%`),
    },
    ...(DATA.reports.some((report) => report.weights.length)
      ? [
          {
            title: "Free up to",
            value: ({ report }) => report.threshold,
            cell: ({ report }) =>
              report.threshold === null
                ? report.weights.length
                  ? `> ${report.weights.at(-1)[0]}`
                  : MINUS
                : fixed(report.threshold, 2),
          },
        ]
      : []),
  ];
  const rows = DATA.reports.map((report, place) => ({ report, place }));
  updateComparison = sortable(byId("comparison"), columns, () => rows, {
    column: 9,
    down: true,
    dress: (element, { place }) => {
      if (place === state.report) element.className = "chosen";
    },
  });
  updateComparison();
  byId("comparison-note").textContent =
    "Counts leave out layers whose base is plain noise. Level puts the share into a word. Layers: those with any intruder. Counts compare only between updates of similar size. Choose a name to see that fine-tune below." +
    " ‖ΔW‖₂/θ: the largest update of a layer beside the size at which a random one has its first intruder. By chance: the count of random updates with the same singular values, and how far a random total lies from it. Energy: the intruders’ share of Σσ² of the vectors compared." +
    (DATA.reports.some((report) => report.p)
      ? " p near 1 means fewer intruders than size and rank alone would bring."
      : "") +
    (DATA.reports.some((report) => report.weights.length)
      ? " Free up to: the adapter weight at which the first intruder appears."
      : "");
  for (const [id, build] of Object.entries(COMPARED)) {
    const element = byId(id);
    const none =
      (id === "all-overlaps" && !DATA.overlaps.length) ||
      (id === "all-weights" && !DATA.reports.some((report) => report.weights.length));
    element.closest("figure").hidden = none;
    if (!none) figure(element, build, READY[id] ?? null);
  }
}

const shareText = ({ least, most, vectors }) =>
  least === most ? percent(most, vectors) : `${((100 * least) / vectors).toFixed(1)}–${percent(most, vectors)}`;

function chooser({ report, place }) {
  const button = make("button", { type: "button", className: "open", textContent: report.label });
  button.addEventListener("click", () => choose(place));
  return button;
}

const curveOf = (report, place, points) => {
  const { color, dash, symbol } = look(place);
  return {
    type: "scatter",
    mode: "lines",
    name: plain(shortened(report.label, 30)),
    x: points.map((point) => point[0]),
    y: points.map((point) => point[1]),
    line: { color, dash, width: 2 },
    marker: { color, symbol, size: 8 },
    hoverinfo: "text",
  };
};

const COMPARED = {
  "all-epsilon": () => {
    const e = threshold(shown()) / STEPS,
      c = colours();
    const data = DATA.reports.flatMap((report, place) => {
      const points = sweep(report),
        text = points.map(([x, least, most]) => `${plain(report.label)}, ε = ${x.toFixed(2)}: ${span(least, most)}`);
      const upper = {
        ...curveOf(
          report,
          place,
          points.map(([x, , most]) => [x, most]),
        ),
        hovertext: text,
      };
      const open = points.some(([, least, most]) => least !== most);
      const lower = {
        ...curveOf(
          report,
          place,
          points.map(([x, least]) => [x, least]),
        ),
        hovertext: text,
        showlegend: false,
        opacity: 0.6,
      };
      return open ? [upper, lower] : [upper];
    });
    return {
      data,
      layout: {
        height: 340,
        showlegend: true,
        shapes: [
          { type: "line", x0: e, x1: e, yref: "paper", y0: 0, y1: 1, line: { color: c.soft, width: 1, dash: "dash" } },
        ],
        xaxis: { range: [0, 1], title: { text: "ε" } },
        yaxis: { rangemode: "tozero", title: { text: "intruders" } },
      },
    };
  },
  "all-size": () => ({
    data: DATA.reports.map((report, place) => {
      const found = countLayers(report, report.layers);
      return {
        ...curveOf(report, place, [[report.size, found.most]]),
        mode: "markers",
        marker: { ...curveOf(report, place, []).marker, size: 12 },
        error_y: {
          type: "data",
          symmetric: false,
          array: [0],
          arrayminus: [found.most - found.least],
          visible: found.most > found.least,
        },
        hovertext: [
          `${plain(report.label)}: ${span(found.least, found.most)} intruders, ‖ΔW‖ / ‖W₀‖ ${fixed(report.size, 3)}`,
        ],
      };
    }),
    layout: {
      height: 340,
      showlegend: true,
      xaxis: { rangemode: "tozero", title: { text: "mean ‖ΔW‖ / ‖W₀‖" } },
      yaxis: { rangemode: "tozero", title: { text: "intruders" } },
    },
  }),
  "all-types": () => {
    const types = [...new Set(DATA.reports.flatMap((report) => groupsByType(report).map((group) => group.label)))];
    const groups = DATA.reports.map((report) => new Map(groupsByType(report).map((group) => [group.label, group])));
    const cell = (type, place) => groups[place].get(type);
    return grid(
      types,
      (type, place) => {
        const found = cell(type, place);
        return found ? found.most / found.vectors : null;
      },
      (type, place) => {
        const found = cell(type, place);
        return found ? `${plain(DATA.reports[place].label)}<br>${groupText(found)}` : "";
      },
      ".0%",
    );
  },
  "all-layers": () => {
    const names = allNames();
    const places = DATA.reports.map((report) => new Map(report.layers.map((layer) => [layer.name, layer])));
    const found = (name, place) => {
      const layer = places[place].get(name);
      return layer?.index ? countLayer(DATA.reports[place], layer) : null;
    };
    return grid(
      names,
      (name, place) => found(name, place)?.most ?? null,
      (name, place) => {
        const count = found(name, place);
        return count
          ? `${plain(DATA.reports[place].label)}<br>${plain(name)}<br>${span(count.least, count.most)} intruders`
          : "";
      },
      "d",
    );
  },
  "all-weights": () => ({
    data: DATA.reports.flatMap((report, place) =>
      report.weights.length
        ? [
            {
              ...curveOf(report, place, report.weights),
              mode: "lines+markers",
              hovertext: report.weights.map(([weight, count]) => `${plain(report.label)}, s = ${weight}: ${count}`),
            },
          ]
        : [],
    ),
    layout: {
      height: 340,
      showlegend: true,
      xaxis: { type: "log", title: { text: "s; 1 is the adapter as it is" }, dtick: Math.log10(2) },
      yaxis: { rangemode: "tozero", title: { text: "intruders" } },
    },
  }),
  "all-overlaps": () => {
    const labels = DATA.reports.map((report) => report.label);
    const pair = (a, b) => DATA.overlaps.find((one) => (one.a === a && one.b === b) || (one.a === b && one.b === a));
    return grid(
      labels,
      (label, place) => pair(labels.indexOf(label), place)?.overlap ?? null,
      (label, place) => {
        const found = pair(labels.indexOf(label), place);
        return found
          ? `${plain(label)} and ${plain(labels[place])}<br>${found.overlap} (random directions: ${found.random})`
          : "";
      },
      ".2f",
      1,
    );
  },
};

const allNames = () => [
  ...new Set(DATA.reports.flatMap((report) => report.layers.filter((layer) => layer.index).map((layer) => layer.name))),
];

/** A heat map with a row a name and a column a fine-tune. */
function grid(rows, value, text, format, most = null) {
  const c = colours(),
    z = rows.map((row) => DATA.reports.map((_, place) => value(row, place)));
  const few = rows.length <= 24,
    every = Math.ceil(rows.length / 30);
  const marked = rows.map((_, place) => place).filter((place) => place % every === 0);
  const top = most ?? Math.max(1e-9, ...z.flat().filter((one) => one !== null));
  const names = new Map(allNames().map((name, place, all) => [name, place]));
  const label = (row) => (names.has(row) ? row.split(".").slice(-3).join(".") : row);
  return {
    data: [
      {
        type: "heatmap",
        z,
        x: DATA.reports.map((_, place) => place),
        y: rows.map((_, place) => place),
        zmin: 0,
        zmax: top,
        showscale: false,
        colorscale: [
          [0, c.raised],
          [1e-6, c.knownWeak],
          [0.35, c.intruderWeak],
          [1, c.intruder],
        ],
        xgap: 1,
        ygap: few ? 1 : 0,
        hoverinfo: "text",
        hoverongaps: false,
        text: rows.map((row) => DATA.reports.map((_, place) => text(row, place))),
      },
    ],
    layout: {
      height: Math.max(340, Math.min(560, 80 + rows.length * 18)),
      annotations:
        few && DATA.reports.length <= 12
          ? z.flatMap((line, y) =>
              line
                .map((one, x) =>
                  one === null
                    ? null
                    : {
                        x,
                        y,
                        text:
                          format === ".0%"
                            ? `${Math.round(100 * one)}%`
                            : format === "d"
                              ? String(one)
                              : one.toFixed(2),
                        showarrow: false,
                        font: { size: 11, color: one > 0.6 * top ? c.paper : c.ink },
                      },
                )
                .filter(Boolean),
            )
          : [],
      xaxis: {
        tickvals: DATA.reports.map((_, place) => place),
        ticktext: DATA.reports.map((report) => plain(shortened(report.label, 18))),
        showgrid: false,
        zeroline: false,
        tickangle: DATA.reports.length > 3 ? -40 : 0,
      },
      yaxis: {
        tickvals: marked,
        ticktext: marked.map((place) => plain(shortened(label(rows[place]), 26))),
        showgrid: false,
        zeroline: false,
        range: [rows.length - 0.5, -0.5],
      },
    },
  };
}

const READY = {
  "all-layers": (element) =>
    element.on("plotly_click", ({ points }) => {
      const [row, place] = points[0].pointIndex,
        name = allNames()[row];
      const number = DATA.reports[place].layers.findIndex((layer) => layer.name === name);
      if (number >= 0) {
        choose(place);
        openLayer(number, element);
      }
    }),
};
