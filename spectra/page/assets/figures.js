// Figures are drawn by plotly when they come into view, and again when what they show has changed.

const figures = new Map(); // element → {build, drawn, stale, seen}
let library = null;

/** plotly, unpacked when the first figure is needed. */
function plotly() {
  library ??= (async () => {
    const packed = Uint8Array.from(atob(byId("library").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script); // runs at once; its hash is in the Content-Security-Policy
    return window.Plotly;
  })();
  return library;
}

const observer = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const figure = figures.get(entry.target);
      if (!figure) continue;
      figure.seen = entry.isIntersecting;
      if (figure.seen && figure.stale) draw(entry.target);
    }
  },
  { rootMargin: "300px" },
);

/** Has an element show what build() returns, {data, layout}, or nothing where it returns null; ready(element) once. */
function figure(element, build, ready = null) {
  figures.set(element, { build, ready, drawn: false, stale: true, seen: false });
  observer.observe(element);
}

function forget(element) {
  observer.unobserve(element);
  if (figures.get(element)?.drawn) window.Plotly.purge(element);
  figures.delete(element);
}

async function draw(element) {
  const Plotly = await plotly();
  const figure = figures.get(element);
  if (!figure || !figure.stale || !element.isConnected) return;
  figure.stale = false;
  const built = figure.build();
  if (built === null) return;
  await Plotly.react(element, built.data, layoutOf(built.layout), CONFIG);
  if (!figure.drawn) {
    figure.drawn = true;
    scalable(element);
    element.on("plotly_afterplot", () => scalable(element));
    figure.ready?.(element);
  }
}

/** Lets print scale a figure that was drawn for the screen. */
function scalable(element) {
  const { width, height } = element._fullLayout;
  element.style.setProperty("--ratio", `${width} / ${height}`);
  for (const svg of element.querySelectorAll("svg.main-svg")) svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
}

/** Every figure anew: those in view now, the others when they are. */
function redraw() {
  const waiting = [];
  for (const [element, figure] of figures) {
    figure.stale = true;
    if (figure.seen) waiting.push(draw(element));
  }
  return Promise.all(waiting);
}

const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };

function layoutOf(own) {
  const c = colours();
  const axis = {
    gridcolor: c.line,
    linecolor: c.line,
    zerolinecolor: c.line,
    tickcolor: c.line,
    fixedrange: true,
    automargin: true,
    tickfont: { color: c.soft, size: 11 },
    title: { font: { color: c.soft, size: 12 }, standoff: 6 },
  };
  const merged = (given) => ({ ...axis, ...given, title: { ...axis.title, ...(given?.title || {}) } });
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hovermode: "closest",
    dragmode: false,
    font: { family: getComputedStyle(document.body).fontFamily, color: c.ink, size: 12 },
    hoverlabel: {
      bgcolor: c.paper,
      bordercolor: c.soft,
      font: { color: c.ink, size: 12 },
      align: "left",
      namelength: -1,
    },
    margin: { l: 8, r: 8, t: 8, b: 8 },
    showlegend: false,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: c.ink, size: 11 } },
    ...own,
    xaxis: merged(own.xaxis),
    yaxis: merged(own.yaxis),
  };
}

const SERIES = [
  // Okabe & Ito 2008, as in the package's own figures; the second is for dark paper
  ["#0072B2", "#56B4E9"],
  ["#D55E00", "#FF8C42"],
  ["#009E73", "#2FCFA0"],
  ["#CC79A7", "#E59AC4"],
  ["#B57F00", "#E6B23C"],
  ["#444444", "#CFCFCF"],
  ["#56B4E9", "#9AD4F5"],
];
const DASHES = ["solid", "dash", "dashdot", "dot", "longdash", "longdashdot"];
const MARKS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "x", "star"];
const look = (place) => ({
  color: SERIES[place % SERIES.length][isDark() ? 1 : 0],
  dash: DASHES[place % DASHES.length],
  symbol: MARKS[place % MARKS.length],
});

/** Shades of similarity: what resembles nothing is like the paper. */
const similarityScale = () =>
  isDark()
    ? [
        [0, "#0f1318"],
        [0.25, "#3b0f70"],
        [0.5, "#8c2981"],
        [0.75, "#de4968"],
        [0.9, "#fe9f6d"],
        [1, "#fcfdbf"],
      ]
    : [
        [0, "#ffffff"],
        [0.1, "#fdebd3"],
        [0.25, "#fe9f6d"],
        [0.5, "#de4968"],
        [0.75, "#8c2981"],
        [0.9, "#3b0f70"],
        [1, "#000004"],
      ];
