// One layer in a dialog: its verdicts, its cosines, its similarity matrix, its numbers.

const dialog = byId("layer");
let returnTo = null;
let opened = null;

function openLayer(number, from = null) {
  if (from) returnTo = from;
  opened = number;
  closeFigures();
  const report = shown(),
    layer = report.layers[number];
  const order = updateLayers.ordered ? updateLayers.ordered().map((row) => row.number) : [];
  const at = order.indexOf(number);
  const step = (by, label, sign) => {
    const button = make("button", {
      type: "button",
      textContent: sign,
      "aria-label": label,
      disabled: at < 0 || order[at + by] === undefined,
    });
    button.addEventListener("click", () => {
      openLayer(order[at + by]);
      (dialog.querySelector(`[aria-label="${label}"]:not(:disabled)`) ?? dialog.querySelector(".close")).focus();
    });
    return button;
  };
  const close = make("button", { type: "button", className: "close", textContent: "Close" });
  close.addEventListener("click", () => dialog.close());
  const parts = layer.index
    ? [verdictOf(report, layer), pictures(report, layer, number), vectorTable(report, layer)]
    : [];
  dialog.replaceChildren(
    make(
      "header",
      {},
      make("h2", { id: "layer-name", textContent: layer.name }),
      step(-1, "Previous layer", "←"),
      step(1, "Next layer", "→"),
      close,
    ),
    make("div", { className: "body" }, ...parts, factsOf(layer), notesOf(layer)),
  );
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  history.replaceState(null, "", `#layer-${state.report}-${number}`);
}

function closeFigures() {
  for (const old of dialog.querySelectorAll(".plot")) forget(old);
}

dialog.addEventListener("close", () => {
  closeFigures();
  opened = null;
  history.replaceState(null, "", location.pathname + location.search);
  if (returnTo?.isConnected) returnTo.focus();
  returnTo = null;
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});

function verdictOf(report, layer) {
  const { least, most } = countLayer(report, layer),
    e = threshold(report) / STEPS;
  const where = flagged(report, layer);
  const text = `${span(least, most)} of its ${layer.index.length} leading singular vectors ${most === 1 ? "is an intruder" : "are intruders"} at ε = ${short(e)}`;
  return make("p", { className: "lead" }, text + (where.length ? `, at index ${ranges(where)}.` : "."));
}

function pictures(report, layer, number) {
  const profile = make("div", {
    className: "plot profile",
    role: "img",
    "aria-label": "Largest cosine of each vector; the table below has the numbers",
  });
  figure(profile, () => profileFigure(report, layer));
  const parts = [make("figure", {}, make("figcaption", {}, "Largest |cos| with the base, by index"), profile)];
  if (report.matrices[number]) {
    const matrix = make("div", { className: "plot matrix", role: "img", "aria-label": "Similarity matrix" });
    figure(matrix, () => matrixFigure(report, number));
    parts.push(make("figure", {}, make("figcaption", {}, "Similarity matrix"), matrix));
  } else {
    const command = "spectra plot similarity TUNED --include NAME -o FILE.pdf";
    parts.push(
      make(
        "figure",
        {},
        make("figcaption", {}, "Similarity matrix"),
        make("p", {}, "Not in this file. To draw it: ", make("bdi", {}, command)),
      ),
    );
  }
  return make("div", { className: "pair" }, ...parts);
}

function profileFigure(report, layer) {
  const c = colours(),
    e = threshold(report) / STEPS;
  const verdicts = layer.index.map((_, i) => judge(report, layer, i));
  const middle = layer.index.map((_, i) => {
    if (layer.cosine[i] !== null) return layer.cosine[i] / STEPS;
    return flagsOf(layer, i).includes("null_space") ? null : (layer.bounds[i][0] + layer.bounds[i][1]) / 2 / STEPS;
  });
  const half = layer.index.map((_, i) =>
    layer.cosine[i] === null && layer.bounds?.[i] ? (layer.bounds[i][1] - layer.bounds[i][0]) / 2 / STEPS : 0,
  );
  const colour = { [YES]: c.intruder, [NO]: c.known, [OPEN]: c.perhaps };
  const rule = (y, dash) => ({
    type: "line",
    xref: "paper",
    x0: 0,
    x1: 1,
    y0: y,
    y1: y,
    line: { color: c.soft, width: 1, dash },
  });
  const label = (y, text) => ({
    xref: "paper",
    x: 1,
    xanchor: "right",
    y,
    yanchor: "bottom",
    text,
    showarrow: false,
    font: { size: 11, color: c.soft },
  });
  const floor = layer.floor === undefined ? [] : [layer.floor];
  return {
    data: [
      {
        type: "scatter",
        mode: half.some(Boolean) ? "markers" : "lines+markers",
        x: layer.index,
        y: middle,
        hoverinfo: "text",
        line: { color: c.line, width: 1.5 },
        error_y: { type: "data", array: half, color: c.soft, thickness: 1.5, width: 4, visible: half.some(Boolean) },
        marker: {
          color: verdicts.map((one) => colour[one]),
          size: 10,
          symbol: verdicts.map((one) => (one === YES ? "triangle-down" : one === OPEN ? "circle-open" : "circle")),
        },
        text: layer.index.map((index, i) => `index ${index}: ${cosineOf(layer, i)}`),
      },
    ],
    layout: {
      height: 300,
      shapes: [rule(e, "dash"), ...floor.map((y) => rule(y, "dot"))],
      annotations: [label(e, `ε = ${short(e)}`), ...floor.map((y) => label(y, "random direction"))],
      xaxis: { title: { text: "index" }, zeroline: false, ...(layer.index.length <= 20 ? { dtick: 1 } : {}) },
      yaxis: { range: [0, 1.05], zeroline: false },
    },
  };
}

/** The (rows, columns) |cos| of a matrix, from a byte an entry. */
function shadesOf({ rows, columns, shades }) {
  const bytes = Uint8Array.from(atob(shades), (letter) => letter.charCodeAt(0));
  return [...Array(rows).keys()].map((row) =>
    Array.from(bytes.subarray(row * columns, (row + 1) * columns), (shade) => shade / 255),
  );
}

function matrixFigure(report, number) {
  const c = colours(),
    layer = report.layers[number],
    z = shadesOf(report.matrices[number]);
  const columns = report.matrices[number].columns,
    rows = z.length;
  const marks = flagged(report, layer).filter((index) => index < columns);
  const axis = { showgrid: false, zeroline: false, ticks: "outside", ticklen: 3, nticks: 5 };
  return {
    data: [
      {
        type: "heatmap",
        z,
        zmin: 0,
        zmax: 1,
        colorscale: similarityScale(),
        showscale: false,
        hovertemplate: "base %{y}, tuned %{x}: |cos| %{z:.2f}<extra></extra>",
      },
      {
        type: "scatter",
        mode: "markers",
        x: marks,
        y: marks.map(() => -0.5 - rows * 0.04),
        hoverinfo: "skip",
        marker: { symbol: "triangle-down", size: 8, color: c.intruder },
      },
    ],
    layout: {
      margin: { l: 8, r: 8, t: 8, b: 8 },
      xaxis: { ...axis, range: [-0.5, columns - 0.5], title: { text: "tuned" }, showline: true, mirror: true },
      yaxis: {
        ...axis,
        range: [rows - 0.5, -0.5 - rows * 0.08],
        title: { text: "base" },
        showline: true,
        mirror: true,
      },
    },
  };
}

function vectorTable(report, layer) {
  const words = { [YES]: "intruder", [NO]: "", [OPEN]: "cannot be told" };
  const heads = ["Index", "Max |cos|", "Verdict", "σ", "Most like base vector", "In base's top 90 %", "Remarks"];
  const rows = layer.index.map((index, i) => {
    const verdict = judge(report, layer, i);
    const cells = [
      cosineOf(layer, i),
      words[verdict],
      short(layer.sigma[i]),
      layer.baseIndex[i] ?? MINUS,
      fixed(layer.capture[i], 2),
      flagsOf(layer, i).join(", ").replaceAll("_", " "),
    ];
    return make(
      "tr",
      {},
      make("th", { scope: "row", textContent: String(index) }),
      ...cells.map((text, place) =>
        make("td", {
          textContent: String(text),
          className: place === 1 || place === 5 ? (verdict === YES && place === 1 ? "left hit" : "left") : "",
        }),
      ),
    );
  });
  const head = heads.map((text, place) =>
    make("th", { scope: "col", textContent: text, className: [2, 6].includes(place) ? "left" : "" }),
  );
  return make(
    "div",
    { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Singular vectors" },
    make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)),
  );
}

const MEASURES = {
  update_norm_relative: "‖ΔW‖ / ‖W₀‖",
  update_norm_spectral_relative: "‖ΔW‖₂ / σ₁",
  update_over_threshold: "‖ΔW‖₂ / θ",
  values_over_threshold: "Singular values of ΔW above θ",
  effective_rank: "Effective rank of ΔW",
  stable_rank: "Stable rank of ΔW",
  rank_90: "Rank for 90 % of ‖ΔW‖²",
  rank_99: "Rank for 99 %",
  rho_k: "ΔW within the base's top",
  principal_overlap: "Top subspace kept",
  spectrum_shift: "Shift of the spectrum",
  intruder_energy_share: "Intruders' share of energy",
};

function factsOf(layer) {
  const update = layer.update;
  const rows = [
    ["Status", statusText(layer)],
    ["Module type", shown().types[layer.type]],
    ["Shape", `${layer.shape.join(" × ")} (${layer.role})`],
    [
      "Update",
      [
        update.kind.replaceAll("_", " "),
        update.rank && `rank ${update.rank}`,
        update.alpha && `alpha ${short(update.alpha)}`,
        update.scaling && `scaling ${short(update.scaling)}`,
      ]
        .filter(Boolean)
        .join(", "),
    ],
    ["Values in it", update.parameters?.toLocaleString("en")],
    ...Object.entries(MEASURES).map(([key, title]) => [
      title,
      layer.measures?.[key] === undefined ? null : short(layer.measures[key]),
    ]),
    ["A random direction", layer.floor],
    [
      "Random updates",
      layer.chance === undefined
        ? null
        : `${short(layer.chance)} intruders on average${layer.p ? `, p = ${short(layer.p)}` : ""}`,
    ],
    ["Free up to weight", layer.threshold],
    ["Decided by", layer.decidedBy?.join(", ")],
    ["Engine", layer.engine],
    ["Residual", layer.residual && layer.residual.toExponential(1)],
  ];
  const cells = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return make(
    "dl",
    { className: "facts" },
    ...cells.flatMap(([what, value]) => [
      make("dt", { textContent: what }),
      make("dd", { textContent: String(value) }),
    ]),
  );
}

function notesOf(layer) {
  const notes = [
    layer.error,
    ...(layer.layerFlags ?? []).map((flag) => flag.replaceAll("_", " ")),
    ...(layer.notes ?? []),
  ].filter(Boolean);
  return notes.length ? make("ul", {}, ...notes.map((textContent) => make("li", { textContent }))) : null;
}

function drawMatrices() {
  const report = shown(),
    home = byId("matrices");
  for (const old of home.querySelectorAll(".plot")) forget(old);
  const numbers = Object.keys(report.matrices)
    .map(Number)
    .sort((a, b) => (report.layers[b].intruder ?? []).length - (report.layers[a].intruder ?? []).length || a - b);
  const all = report.layers.filter((layer) => (layer.intruder ?? []).length).length;
  byId("matrices-part").hidden = all === 0 && !numbers.length;
  byId("matrices-note").textContent =
    numbers.length < all
      ? `${numbers.length} of the ${all} flagged layers are here, those with the most intruders; --matrices N puts others in, and spectra plot similarity draws any layer.`
      : `All ${plural(all, "flagged layer")}, those with the most intruders first.`;
  home.replaceChildren(
    ...numbers.map((number) => {
      const layer = report.layers[number],
        name = make("button", { type: "button", textContent: layer.name });
      name.addEventListener("click", () => openLayer(number, name));
      const plot = make("div", {
        className: "plot matrix",
        role: "img",
        "aria-label": `Similarity matrix of ${layer.name}`,
      });
      const count = make("small");
      figure(plot, () => {
        const found = countLayer(report, layer),
          where = flagged(report, layer);
        count.textContent =
          plural(found.most, "intruder").replace(/^\S+/, span(found.least, found.most)) +
          (where.length ? ` at index ${ranges(where)}` : "");
        return matrixFigure(report, number);
      });
      return make("div", {}, name, count, plot);
    }),
  );
}
