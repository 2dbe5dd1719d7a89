// Tables that sort by their headings, and the one of layers with its filters.

/** A table: columns are {title, value(row), cell(row), left, first}; missing values go last.  Returns its update(). */
function sortable(table, columns, rows, options = {}) {
  const sort = { column: options.column ?? 0, down: options.down ?? true, all: false };
  const heads = columns.map((column, place) => {
    const button = make("button", { type: "button", textContent: column.title });
    button.addEventListener("click", () => {
      sort.down = sort.column === place ? !sort.down : !column.left;
      sort.column = place;
      update();
    });
    return make("th", { scope: "col", className: column.left ? "left" : "" }, button);
  });
  table.tHead.replaceChildren(make("tr", {}, ...heads));
  function ordered() {
    const { value } = columns[sort.column],
      sign = sort.down ? -1 : 1;
    const keyed = rows().map((row, place) => ({ row, place, key: value(row) }));
    const none = (key) => key === null || key === undefined;
    keyed.sort((a, b) => {
      if (none(a.key) || none(b.key)) return none(a.key) - none(b.key) || a.place - b.place;
      const order = typeof a.key === "string" ? a.key.localeCompare(b.key, "en", { numeric: true }) : a.key - b.key;
      return sign * order || a.place - b.place;
    });
    return keyed.map(({ row }) => row);
  }
  function update() {
    heads.forEach((head, place) => {
      head.setAttribute("aria-sort", place !== sort.column ? "none" : sort.down ? "descending" : "ascending");
    });
    const found = ordered();
    const visible = sort.all || !options.most ? found : found.slice(0, options.most);
    table.tBodies[0].replaceChildren(...visible.map((row) => line(row)));
    options.shown?.(found, visible.length, () => {
      sort.all = true;
      update();
    });
    return found;
  }
  function line(row) {
    const cells = columns.map((column, place) => {
      const made = column.cell(row);
      const cell = place === 0 ? make("th", { scope: "row" }) : make("td", { className: column.left ? "left" : "" });
      cell.append(made instanceof Node ? made : String(made));
      return cell;
    });
    const element = make("tr", {}, ...cells);
    options.dress?.(element, row);
    return element;
  }
  return Object.assign(update, { ordered });
}

const LISTED = 60; // layers of the table before somebody asks for more
let updateLayers = () => [];

function drawTable() {
  const report = shown();
  const choice = (id, label, values) =>
    byId(id).replaceChildren(
      make("option", { value: "", textContent: label }),
      ...values.map(([value, text]) => make("option", { value, textContent: text })),
    );
  choice(
    "filter-type",
    "all",
    report.types.map((text, type) => [String(type), text]),
  );
  const statuses = [...new Set(report.layers.map((layer) => layer.status))];
  choice(
    "filter-status",
    "all",
    statuses.map((status) => [status, status.replaceAll("_", " ")]),
  );
  const rows = report.layers.map((layer, number) => ({ layer, number }));
  const count = ({ layer }) => countLayer(report, layer);
  const measure = (name, digits) => ({
    value: ({ layer }) => layer.measures?.[name],
    cell: ({ layer }) => fixed(layer.measures?.[name], digits),
  });
  const columns = [
    {
      title: "Layer",
      left: true,
      value: ({ number }) => number,
      cell: ({ layer, number }) => opener(layer.name, number),
    },
    { title: "Intruders", value: (row) => count(row).most, cell: (row) => hits(count(row), row.layer) },
    {
      title: "At index",
      left: true,
      value: ({ layer }) => flagged(report, layer)[0],
      cell: ({ layer }) => ranges(flagged(report, layer)),
    },
    {
      title: "Lowest cos",
      value: ({ layer }) => lowest(layer)?.[1],
      cell: ({ layer }) => {
        const found = lowest(layer);
        return found ? found[0] + cosineText(found[1]) : MINUS;
      },
    },
    { title: "‖ΔW‖ / ‖W₀‖", ...measure("update_norm_relative", 3) },
    { title: "‖ΔW‖₂ / θ", ...measure("update_over_threshold", 2) },
    { title: "By chance", value: ({ layer }) => layer.chance, cell: ({ layer }) => fixed(layer.chance, 1) },
    { title: "Eff. rank", ...measure("effective_rank", 1) },
    { title: "Rank", value: ({ layer }) => layer.update.rank, cell: ({ layer }) => layer.update.rank ?? MINUS },
    {
      title: "Shape",
      value: ({ layer }) => layer.shape[0] * layer.shape[1],
      cell: ({ layer }) => layer.shape.join(" × "),
    },
    { title: "Status", left: true, value: ({ layer }) => layer.status, cell: ({ layer }) => statusText(layer) },
  ];
  updateLayers = sortable(byId("layers"), columns, () => rows.filter((row) => passes(report, row)), {
    column: 1,
    down: true,
    most: LISTED,
    shown: (found, visible, showAll) => {
      byId("filter-count").textContent = `${found.length} of ${plural(rows.length, "layer")}`;
      const more = byId("more-rows");
      more.hidden = visible >= found.length;
      more.textContent = `Show all ${found.length}`;
      more.onclick = showAll;
    },
  });
  updateLayers();
}

function passes(report, { layer }) {
  const name = byId("filter-name").value.trim().toLowerCase(),
    type = byId("filter-type").value,
    status = byId("filter-status").value;
  return (
    layer.name.toLowerCase().includes(name) &&
    (type === "" || layer.type === Number(type)) &&
    (status === "" || layer.status === status) &&
    (!byId("filter-flagged").checked || countLayer(report, layer).most > 0)
  );
}

/** The indices of a layer's intruders, those that are sure. */
const flagged = (report, layer) => vectorsOf(layer).filter((_, i) => judge(report, layer, i) === YES);

function hits({ least, most }, layer) {
  if (!layer.index) return MINUS;
  return make("span", { className: most ? "hit" : "" }, span(least, most) + (layer.noise && most ? " *" : ""));
}

function statusText(layer) {
  const words = [layer.status.replaceAll("_", " ")];
  if (layer.noise) words.push("base is plain noise");
  return words.join(", ");
}

function opener(name, number) {
  const button = make("button", { type: "button", className: "open", textContent: name });
  button.addEventListener("click", () => openLayer(number, button));
  return button;
}

for (const id of ["filter-name", "filter-type", "filter-status", "filter-flagged"]) {
  byId(id).addEventListener("input", () => updateLayers());
}
