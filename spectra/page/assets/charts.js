// Counts by depth, module type, index and epsilon, of the fine-tune that is shown.

function drawCharts() {
  for (const [id, build] of Object.entries(CHARTS)) {
    const element = byId(id);
    if (!figures.has(element)) figure(element, build, id === "by-epsilon" ? choosesEpsilon : null);
  }
}

const CHARTS = {
  "by-depth": () => bars(groupsByDepth(shown()), "block"),
  "by-type": () => sideways(groupsByType(shown())),
  "by-index": () => bars(groupsByIndex(shown()), "index, 0 the largest singular value"),
  "by-epsilon": () => curve(),
};

/** [{label, least, most, vectors}] of the model's blocks, in order. */
function groupsByDepth(report) {
  return report.depths.map(({ label, layers }) => ({
    label,
    ...countLayers(
      report,
      layers.map((n) => report.layers[n]),
    ),
  }));
}

function groupsByType(report) {
  return report.types
    .map((label, type) => ({
      label,
      ...countLayers(
        report,
        report.layers.filter((layer) => layer.type === type),
      ),
    }))
    .filter((group) => group.vectors);
}

function groupsByIndex(report) {
  const groups = [];
  for (const layer of report.layers.filter(isJudged)) {
    vectorsOf(layer).forEach((index, i) => {
      const group = (groups[index] ??= { label: String(index), least: 0, most: 0, vectors: 0 });
      const verdict = judge(report, layer, i);
      group.vectors += 1;
      group.least += verdict === YES;
      group.most += verdict !== NO;
    });
  }
  return groups.filter(Boolean);
}

const groupText = (group) => `${plain(group.label)}: ${span(group.least, group.most)} of ${group.vectors} vectors`;

/** Two traces of bars: what is sure, and on top what bounds leave open. */
function stacked(groups, horizontal, value) {
  const c = colours();
  const trace = (amount, color) => {
    const lengths = groups.map(amount),
      places = groups.map((_, place) => place);
    return {
      type: "bar",
      orientation: horizontal ? "h" : "v",
      x: horizontal ? lengths : places,
      y: horizontal ? places : lengths,
      marker: { color },
      hoverinfo: "text",
      hovertext: groups.map(groupText),
      textposition: "none",
    };
  };
  const traces = [trace((group) => value(group, group.least), c.intruder)];
  if (groups.some((group) => group.most > group.least)) {
    traces.push(trace((group) => value(group, group.most - group.least), c.perhaps));
  }
  return traces;
}

/** At most so many ticks with names. */
function named(groups, most, length) {
  const every = Math.ceil(groups.length / most);
  const vals = groups.map((_, place) => place).filter((place) => place % every === 0);
  return { tickvals: vals, ticktext: vals.map((place) => plain(shortened(groups[place].label, length))) };
}

function bars(groups, title) {
  const wide = groups.length * Math.max(...groups.map((group) => group.label.length), 1) < 60;
  return {
    data: stacked(groups, false, (_, count) => count),
    layout: {
      barmode: "stack",
      bargap: groups.length < 8 ? 0.5 : 0.25,
      height: 240,
      xaxis: { ...named(groups, wide ? 32 : 12, 20), showgrid: false, title: { text: title } },
      yaxis: { rangemode: "tozero", title: { text: "intruders" }, ...whole(groups) },
    },
  };
}

/** Whole numbers on an axis of counts, and room where all are zero. */
function whole(groups) {
  const most = Math.max(0, ...groups.map((group) => group.most));
  return most < 6 ? { dtick: 1, range: [0, Math.max(1, most) * 1.08] } : {};
}

function sideways(groups) {
  const ordered = [...groups].sort((a, b) => a.most / a.vectors - b.most / b.vectors);
  const most = Math.max(0, ...ordered.map((group) => group.most / group.vectors));
  return {
    data: stacked(ordered, true, (group, count) => count / group.vectors),
    layout: {
      barmode: "stack",
      bargap: 0.25,
      height: Math.max(240, 60 + 20 * Math.min(ordered.length, 40)),
      xaxis: {
        tickformat: ".0%",
        rangemode: "tozero",
        title: { text: "of the vectors compared" },
        ...(most ? {} : { range: [0, 0.1] }),
      },
      yaxis: { ...named(ordered, 40, 26), showgrid: false, range: [-0.5, ordered.length - 0.5] },
    },
  };
}

function curve() {
  const report = shown(),
    c = colours(),
    points = sweep(report),
    e = threshold(report) / STEPS;
  const x = points.map((point) => point[0]);
  const line = (values, more) => ({
    type: "scatter",
    mode: "lines",
    x,
    y: values,
    line: { color: c.intruder, width: 2, shape: "hv" },
    hoverinfo: "text",
    hovertext: points.map(
      (point) =>
        `ε = ${point[0].toFixed(2)}: ${plural(point[1], "intruder").replace(/^\S+/, span(point[1], point[2]))}`,
    ),
    ...more,
  });
  const data = [
    line(
      points.map((point) => point[1]),
      {},
    ),
  ];
  if (points.some((point) => point[1] !== point[2])) {
    data.push(
      line(
        points.map((point) => point[2]),
        { fill: "tonexty", fillcolor: `${c.perhaps}44`, line: { color: c.perhaps, width: 1.5, shape: "hv" } },
      ),
    );
  }
  return {
    data,
    layout: {
      height: 240,
      shapes: [
        { type: "line", x0: e, x1: e, yref: "paper", y0: 0, y1: 1, line: { color: c.ink, width: 1, dash: "dash" } },
      ],
      xaxis: { range: [0, 1], title: { text: "ε (choose a point to count there)" } },
      yaxis: { rangemode: "tozero", title: { text: "intruders" } },
    },
  };
}

function choosesEpsilon(element) {
  element.on("plotly_click", ({ points }) => setEpsilon(Math.round(points[0].x * 100) * (STEPS / 100)));
}
