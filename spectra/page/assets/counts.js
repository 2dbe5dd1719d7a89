// Counting at any epsilon.  A cosine c is stored as floor(c · STEPS), so c < E / STEPS just where it is below E.

const NO = 0,
  YES = 1,
  OPEN = -1;

/** The threshold in use for a report, in STEPS (a fraction, where its own has more decimals). */
const threshold = (report) => (state.epsilon === null ? report.epsilon * STEPS : state.epsilon);

/** Whether vector i of a layer is an intruder: YES, NO, or OPEN where its bounds do not say. */
function judge(report, layer, i, epsilon = state.epsilon) {
  if (epsilon === null || epsilon === (Math.round(report.epsilon * 1e8) * STEPS) / 1e8) {
    return (layer.intruder || []).includes(i) ? YES : NO; // what the audit settled, to the last digit
  }
  const cosine = layer.cosine[i];
  if (cosine !== null) return cosine < epsilon ? YES : NO;
  if (flagsOf(layer, i).includes("null_space")) return NO;
  const [lower, upper] = layer.bounds[i];
  if (upper < epsilon) return YES;
  return lower < epsilon ? OPEN : NO;
}

const flagsOf = (layer, i) => (layer.flags && layer.flags[i]) || [];
const vectorsOf = (layer) => layer.index || [];

/** {least, most} intruders in one layer. */
function countLayer(report, layer, epsilon = state.epsilon) {
  let least = 0,
    open = 0;
  vectorsOf(layer).forEach((_, i) => {
    const verdict = judge(report, layer, i, epsilon);
    if (verdict === YES) least += 1;
    else if (verdict === OPEN) open += 1;
  });
  return { least, most: least + open };
}

const NOTHING = { least: 0, most: 0, layersLeast: 0, layersMost: 0, vectors: 0 };

/** Whether a layer counts: it was compared, and its base is no plain noise, in which anything moves the vectors. */
const isJudged = (layer) => Boolean(layer.index) && !layer.noise;

/** The same over those layers that count, with how many of them have any, and the vectors compared. */
function countLayers(report, layers, epsilon = state.epsilon) {
  return layers.filter(isJudged).reduce((sum, layer) => {
    const { least, most } = countLayer(report, layer, epsilon);
    return {
      least: sum.least + least,
      most: sum.most + most,
      vectors: sum.vectors + vectorsOf(layer).length,
      layersLeast: sum.layersLeast + (least > 0),
      layersMost: sum.layersMost + (most > 0),
    };
  }, NOTHING);
}

/** "3", or "3–5" where bounds leave it open. */
const span = (least, most) => (least === most ? String(least) : `${least}–${most}`);

/** The word for the share of intruders at this epsilon, or two of them. */
function levelOf(report) {
  const { least, most, vectors } = countLayers(report, report.layers);
  if (!vectors) return report.layers.some((layer) => layer.status !== "unchanged") ? DATA.cannotTell : "none";
  const word = (count) => DATA.levels.find(([limit]) => count / vectors <= limit)[1];
  return word(least) === word(most) ? word(least) : `${word(least)} to ${word(most)}`;
}

/** Vector i's cosine as a reader sees it. */
function cosineOf(layer, i) {
  if (layer.cosine[i] !== null) return cosineText(layer.cosine[i]);
  if (flagsOf(layer, i).includes("null_space")) return "null space";
  const [lower, upper] = layer.bounds[i];
  if (lower === 0) return `≤ ${cosineText(upper)}`;
  return upper >= STEPS ? `≥ ${cosineText(lower)}` : `${cosineText(lower)} to ${cosineText(upper)}`;
}

/** The lowest cosine of a layer with the sign of what is known of it: ["", 0.27], ["≤ ", 0.31] or null. */
function lowest(layer) {
  let best = null;
  vectorsOf(layer).forEach((_, i) => {
    const known = layer.cosine[i];
    if (known === null && !(layer.bounds && layer.bounds[i])) return;
    if (known === null && flagsOf(layer, i).includes("null_space")) return;
    const value = known === null ? layer.bounds[i][1] : known;
    if (best === null || value < best[1]) best = [known === null ? "≤ " : "", value];
  });
  return best;
}

/** [[epsilon, least, most], …] at every hundredth; counted once a report. */
function sweep(report) {
  report.sweep ??= [...Array(100).keys()].map((step) => {
    const { least, most } = countLayers(report, report.layers, ((step + 1) * STEPS) / 100);
    return [(step + 1) / 100, least, most];
  });
  return report.sweep;
}
