"use strict";
// The records, what is shown of them, and the few words in which elements are made.  Everything below shares this
// file's names; names from files only ever reach the page as textContent, or through plain() where plotly draws them.

const DATA = JSON.parse(document.getElementById("data").textContent);
const STEPS = DATA.steps;

// epsilon is null where each report's own counts, else a whole number of STEPS.
const state = { report: 0, epsilon: null };
const shown = () => DATA.reports[state.report];

const byId = (id) => document.getElementById(id);

/** An element with properties (those of ARIA and data by their attribute's name) and children; strings become text. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name.includes("-") || name === "role" || name === "scope") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", $: "&#36;" };

/** A name as plotly shall draw it: plotly reads a little HTML, entities and TeX between dollars in labels. */
const plain = (text) => String(text).replace(/[&<>$]/g, (mark) => ENTITIES[mark]);

const MINUS = "–";
const fixed = (value, digits) => (value === null || value === undefined ? MINUS : value.toFixed(digits));
const short = (value) => (value === null || value === undefined ? MINUS : String(Number(value.toPrecision(4))));
const percent = (part, whole, digits = 1) => (whole ? `${((100 * part) / whole).toFixed(digits)}%` : MINUS);
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const cosineText = (steps) => (steps / STEPS).toFixed(3);
const shortened = (text, most) => (text.length > most ? `…${text.slice(1 - most)}` : text);

/** [0, 1, 2, 5] as "0–2, 5". */
function ranges(numbers) {
  const spans = [];
  for (const number of numbers) {
    const last = spans[spans.length - 1];
    if (last && number === last[1] + 1) last[1] = number;
    else spans.push([number, number]);
  }
  return spans.map(([a, b]) => (a === b ? a : `${a}–${b}`)).join(", ");
}

/** The colours as the style sheet has them now. */
function colours() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    paper: colour("paper"),
    ink: colour("ink"),
    soft: colour("soft"),
    line: colour("line"),
    accent: colour("accent"),
    intruder: colour("intruder"),
    intruderWeak: colour("intruder-weak"),
    perhaps: colour("perhaps"),
    known: colour("known"),
    knownWeak: colour("known-weak"),
    raised: colour("raised"),
  };
}

const isDark = () => getComputedStyle(document.documentElement).colorScheme.includes("dark");
