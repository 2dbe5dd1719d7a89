// What is shown, at which epsilon, in which colours.

const epsilonText = (e) => (Math.abs(e * 100 - Math.round(e * 100)) < 1e-6 ? e.toFixed(2) : short(e));

function recount() {
  const report = shown(),
    e = threshold(report),
    found = countLayers(report, report.layers);
  byId("epsilon-value").textContent = epsilonText(e / STEPS);
  const exact = found.least === found.most;
  const number = make("b", {
    textContent: exact ? String(found.most) : `at least ${found.least}, at most ${found.most}`,
  });
  const layers = `in ${span(found.layersLeast, found.layersMost)} of ${plural(report.layers.filter(isJudged).length, "layer")}`;
  byId("recount").replaceChildren(
    DATA.reports.length > 1 ? make("bdi", {}, report.label) : "",
    " ",
    number,
    ` ${found.most === 1 ? "intruder" : "intruders"} (${shareText(found)}) ${layers}; level: `,
    make("span", {}, levelOf(report)),
    exact ? "" : ". Of some cosines only bounds are known.",
  );
  byId("reset").disabled = state.epsilon === null;
}

function setEpsilon(steps) {
  state.epsilon = steps;
  byId("epsilon").value = threshold(shown()) / STEPS;
  byId("epsilon").setAttribute("aria-valuetext", `epsilon ${short(threshold(shown()) / STEPS)}`);
  recount();
  drawLegend();
  updateLayers();
  updateComparison();
  redraw();
}

/** Shows another of the fine-tunes. */
function choose(place) {
  state.report = place;
  for (const part of document.querySelectorAll("[data-report]")) part.hidden = Number(part.dataset.report) !== place;
  if (byId("report")) byId("report").value = String(place);
  drawMap();
  drawTable();
  drawCharts();
  drawMatrices();
  byId("map-part").hidden = byId("charts-part").hidden = !shown().layers.some((layer) => layer.index);
  setEpsilon(state.epsilon);
}

let frame = null;
byId("epsilon").addEventListener("input", (event) => {
  const steps = Math.round(Number(event.target.value) * 100) * (STEPS / 100);
  frame ??= requestAnimationFrame(() => {
    frame = null;
    setEpsilon(Math.round(Number(byId("epsilon").value) * 100) * (STEPS / 100));
  });
  byId("epsilon-value").textContent = epsilonText(steps / STEPS);
});
byId("reset").addEventListener("click", () => setEpsilon(null));
byId("report")?.addEventListener("input", (event) => choose(Number(event.target.value)));

const THEMES = { "": ["◐", "System"], light: ["○", "Light"], dark: ["●", "Dark"] };

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  const [sign, word] = THEMES[theme];
  byId("theme").querySelector("[aria-hidden]").textContent = sign;
  byId("theme").querySelector(".word").textContent = word;
  byId("theme").setAttribute("aria-label", `Colours: ${theme || "as the system has them"}`);
  drawLegend();
  return redraw();
}

byId("theme").addEventListener("click", () => {
  const order = Object.keys(THEMES),
    now = document.documentElement.dataset.theme ?? "";
  setTheme(order[(order.indexOf(now) + 1) % order.length]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawLegend();
  redraw();
});

// Paper is white and shows everything: what was not in view is drawn, what is folded is opened.
let before = null;
window.addEventListener("beforeprint", () => {
  before = {
    theme: document.documentElement.dataset.theme ?? "",
    folded: [...document.querySelectorAll("details:not([open])")],
  };
  for (const part of before.folded) part.open = true;
  setTheme("light");
  if (window.Plotly) for (const element of figures.keys()) if (figures.get(element).stale) draw(element);
});
window.addEventListener("afterprint", () => {
  if (before === null) return;
  for (const part of before.folded) part.open = false;
  setTheme(before.theme);
  before = null;
});

for (const part of document.querySelectorAll("main > section[data-short]")) {
  document.querySelector("header.top nav").append(make("a", { href: `#${part.id}`, textContent: part.dataset.short }));
}
drawComparison();
const share = (report) => {
  const { most, vectors } = countLayers(report, report.layers);
  return most / (vectors || 1);
};
choose(DATA.reports.map(share).reduce((worst, one, place, all) => (one > all[worst] ? place : worst), 0));
const asked = /^#layer-(\d+)-(\d+)$/.exec(location.hash);
if (asked && DATA.reports[asked[1]]?.layers[asked[2]]) {
  choose(Number(asked[1]));
  openLayer(Number(asked[2]));
}
