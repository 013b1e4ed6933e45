"use strict";
const facts = JSON.parse(document.getElementById("facts").textContent);
const labels = ["background", ...facts.classes];
const at = (id) => document.getElementById(id);

/** An element; text is set as text, children that are strings too. */
function el(tag, properties = {}, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in found && typeof value !== "string") found[name] = value;
    else found.setAttribute(name, value);
  }
  found.append(...children);
  return found;
}
function svg(tag, properties = {}, ...children) {
  const found = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) found.setAttribute(name, value);
  found.append(...children);
  return found;
}
const percent = (value) => value === null || Number.isNaN(value) ? "–" : (100 * value).toFixed(2);
const number = (value, digits = 4) => String(Number(value.toPrecision(digits)));
const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
function duration(seconds) {
  if (seconds < 100) return `${number(seconds, 3)} s`;
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60);
  return minutes < 100 ? `${minutes} min ${whole % 60} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// Okabe and Ito's, distinct to the colour-blind too, and a wine red; names stand beside them
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#882255"]
  .map((text) => [1, 3, 5].map((place) => parseInt(text.slice(place, place + 2), 16)));
function furtherColour(label) {
  const hue = (label * 137.508) % 360, light = [0.45, 0.62, 0.76][label % 3];
  const part = (shift) => {
    const place = (shift + hue / 30) % 12;
    const reach = 0.65 * Math.min(light, 1 - light);  // of this saturation
    return Math.round(255 * (light - reach * Math.max(-1, Math.min(place - 3, 9 - place, 1))));
  };
  return [part(0), part(8), part(4)];
}
/** Of an image's labels: each its own, the same in all images unless another one has it here. */
function colours(labels) {
  const free = new Set(COLOURS.keys()), found = new Map([[255, [255, 255, 255]]]);
  for (const label of labels) {
    const wanted = (label - 1) % COLOURS.length, chosen = free.has(wanted) ? wanted : [...free][0];
    found.set(label, chosen === undefined ? furtherColour(label) : COLOURS[chosen]);
    free.delete(chosen);
  }
  return found;
}
const rgb = (colour) => `rgb(${colour.join(" ")})`;
const HEAT = [[0, 0, 4], [51, 10, 95], [120, 28, 109], [187, 55, 84], [237, 105, 37], [252, 181, 25], [252, 255, 164]];
const heat = Array.from({ length: 256 }, (_, value) => {
  const place = value / 255 * (HEAT.length - 1), low = Math.min(HEAT.length - 2, Math.floor(place)), part = place - low;
  return HEAT[low].map((from, channel) => from + part * (HEAT[low + 1][channel] - from));
});
const DASHES = ["none", "8 3", "2 3", "8 3 2 3", "14 4", "5 5"];
const stageColour = (index) => `var(--stage-${index % 6})`;

// ---- counts: what `ribfast eval` sums, of the images that are shown

/** Varints: of each key those predicted and those right, then true background, by thresholds below -> above each. */
function unpack(text, keys, thresholds) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const rows = [];
  let place = 0;
  for (let row = 0; row < 2 * keys + 1; row++) {
    const above = new Float64Array(thresholds + 1);
    for (let bin = 0; bin <= thresholds; bin++) {
      let shift = 1, byte;
      do {
        byte = bytes[place++];
        above[bin] += (byte & 127) * shift;
        shift *= 128;
      } while (byte & 128);
    }
    for (let bin = thresholds - 1; bin >= 0; bin--) above[bin] += above[bin + 1];
    rows.push(above.subarray(1));
  }
  return rows;
}
const layerOf = (own, step) => Math.min(step, own.counts.length) - 1;
const unpacked = new Map();
function rowsOf(image, stage, layer) {
  const { counts, keys } = facts.images[image].stages[stage], key = `${image} ${stage} ${layer}`;
  if (!unpacked.has(key)) unpacked.set(key, unpack(counts[layer], keys.length, facts.stages[stage].thresholds.length));
  return unpacked.get(key);
}
class Sums {
  constructor() {
    [this.right, this.predicted, this.true] = [0, 1, 2].map(() => new Float64Array(labels.length));
  }
  /** False where there is no mask to count against, or nothing to count. */
  add(image, stage, step = state.steps[stage]) {
    const { true: pixels, stages } = facts.images[image], own = stages[stage];
    if (!pixels || !(own.keys || own.pixels)) return false;
    let total = 0, background = 0;
    for (const [label, found] of pixels) {
      this.true[label] += found;
      total += found;
      if (label === 0) background = found;
    }
    if (own.pixels) {
      for (const [label, right, predicted] of own.pixels) {
        this.right[label] += right;
        this.predicted[label] += predicted;
      }
      return true;
    }
    const index = state.thresholds[stage];
    const rows = own.keys.length ? rowsOf(image, stage, layerOf(own, step)) : [];
    let foreground = 0;
    own.keys.forEach((key, row) => {
      this.predicted[key + 1] += rows[2 * row][index];
      this.right[key + 1] += rows[2 * row + 1][index];
      foreground += rows[2 * row][index];
    });
    this.predicted[0] += total - foreground;
    this.right[0] += background - (rows.length ? rows[2 * own.keys.length][index] : 0);
    return true;
  }
  iou(label) {
    const union = this.predicted[label] + this.true[label] - this.right[label];
    return union ? this.right[label] / union : NaN;
  }
  miou() {
    const ious = labels.map((_, label) => this.iou(label)).filter((iou) => !Number.isNaN(iou));
    return ious.length ? ious.reduce((sum, iou) => sum + iou, 0) / ious.length : NaN;
  }
}
/** An image's own mIoU, or IoU of the class that is chosen. */
function scoreOf(image, stage, step = state.steps[stage]) {
  const sums = new Sums();
  if (!sums.add(image, stage, step)) return NaN;
  return state.label < 0 ? sums.miou() : sums.iou(state.label + 1);
}

// ---- what is chosen

function startOf(stage) {
  const { thresholds, evaluation } = stage;
  const wanted = evaluation?.reported.threshold ?? stage.threshold ?? 0.25;
  return thresholds.reduce((best, value, index) =>
    Math.abs(value - wanted) < Math.abs(thresholds[best] - wanted) ? index : best, 0);
}
const mapStages = facts.stages.flatMap((stage, index) => stage.kind === "maps" ? [index] : []);
const withMostSteps = (best, index) => facts.stages[index].steps > facts.stages[best].steps ? index : best;
const PAGE = 24;  // cards that are there before more are asked for
const state = {
  stage: mapStages.length ? mapStages.reduce(withMostSteps) : -1,
  thresholds: facts.stages.map(startOf),
  steps: facts.stages.map((stage) => stage.steps),
  label: -1,
  order: "data",
  cards: PAGE,
};
/** What the chosen stage's maps are shown beside: the first stage's, or its own after the first step; null: nothing. */
function compared() {
  if (state.stage < 0) return null;
  if (state.stage !== mapStages[0]) return { stage: mapStages[0], step: facts.stages[mapStages[0]].steps };
  return facts.stages[state.stage].steps > 1 ? { stage: state.stage, step: 1 } : null;
}
const threshold = (stage) => facts.stages[stage].thresholds[state.thresholds[stage]];

// ---- the tables and the curves

/** A table's row; labels: what a narrow screen, which stacks the cells, shows before each. */
function row(tag, cells, labels = []) {
  return el("tr", { role: "row" }, ...cells.map((cell, index) => {
    let found = el("td", { role: "cell" });
    if (tag === "th") found = el("th", { scope: "col", role: "columnheader" });
    else if (!index) found = el("th", { scope: "row", role: "rowheader" });
    if (labels[index]) found.setAttribute("data-label", labels[index]);
    found.append(...[cell].flat());
    return found;
  }));
}
const everyStage = [...facts.stages, ...facts.elsewhere];
const points = (value) => (value < 0 ? "−" : "+") + Math.abs(100 * value).toFixed(2);
function drawStages() {
  const { judged, confidence } = facts;
  const anyJudged = everyStage.some(({ evaluation }) => evaluation);
  const anyGain = facts.stages.some(({ gain }) => gain);
  const measures = anyJudged ? ["mIoU", ...(anyGain ? ["gain"] : []), "threshold", "precision", "recall"] : [];
  const head = ["Stage", ...measures, "images", "time", "images / s"];
  const mean = (values) => {
    const there = values.filter((value) => value !== null);
    return there.length ? there.reduce((sum, value) => sum + value, 0) / there.length : null;
  };
  const between = (found, write) => found && found.low !== null
    ? [el("small", {}, `${write(found.low)} to ${write(found.high)}`)] : [];
  const rows = everyStage.map((stage, index) => {
    const by = stage.command ? `${stage.kind}, ribfast ${stage.command}` : stage.kind;
    const name = el("span", { class: "named" }, swatch(stageColour(index)), stage.name);
    const cells = [[name, el("small", {}, by)]], found = stage.evaluation;
    if (anyJudged && !found) {
      cells.push(...measures.map(() => "–"));
    } else if (anyJudged) {
      cells.push([el("b", {}, percent(found.reported.miou)), ...between(found.interval, percent)]);
      if (anyGain) cells.push(stage.gain ? [points(stage.gain.miou), ...between(stage.gain, points)] : "–");
      const { threshold, chosen } = found.reported;
      const where = el("small", {}, chosen === "here" ? "the best here" : "chosen elsewhere");
      cells.push(threshold === undefined ? "–" : [number(threshold), where]);
      cells.push(percent(mean(found.precision)), percent(mean(found.recall)));
    }
    const beside = [stage.split ? [`of ${stage.split}`] : [], stage.failed ? [`${stage.failed} failed`] : []].flat();
    cells.push([stage.images.toLocaleString("en"), ...beside.map((text) => el("small", {}, text))]);
    cells.push(...(stage.seconds === null ? ["–", "–"] : [duration(stage.seconds), number(stage.rate, 3)]));
    return row("td", cells, head);
  });
  at("stages").append(el("thead", {}, row("th", head)), el("tbody", {}, ...rows));
  const notes = [];
  if (judged) {
    notes.push(`In percent, of ${count(judged, "image")} with a mask, as ribfast eval counts.`);
    notes.push("Precision and recall are means over labels.");
    if (confidence !== null) notes.push(`Below mIoU its ${number(100 * confidence)} % interval over images.`);
    if (anyGain) {
      const paired = confidence === null ? "" : ", its interval from resamples of the same images for both";
      notes.push(`The gain is in points over ${facts.stages[0].name}${paired}.`);
    }
  } else {
    notes.push("The data have no masks: there is no mIoU.");
  }
  if (everyStage.some((stage) => stage.evaluation?.reported.chosen === "here"))
    notes.push("The best threshold here is chosen on these same images, so optimistic.");
  if (facts.left_out) {
    const which = `${count(facts.left_out, "image")} that could not be read, or that a stage failed on,`;
    notes.push(`Of ${which} no stage is counted here: failures.jsonl says why.`);
  }
  for (const { name, evaluation } of everyStage) {
    if (evaluation?.reported.chosen === "here" && evaluation.best.at_end) {
      notes.push(`${name}'s best may lie beyond ${number(evaluation.best.threshold)}, the end of the thresholds: `
        + "give --thresholds.");
    }
  }
  if (everyStage.some((stage) => stage.evaluation?.unsure))
    notes.push("Pixels that masks leave open count as background.");
  at("stages-note").textContent = notes.join(" ");
}
function drawTrainings() {
  at("trainings-section").hidden = !facts.trainings.length;
  const head = ["Training", "network", "steps", "loss", "time", "images / s"];
  const rows = facts.trainings.map(({ name, command, network, batch, steps, loss, seconds, rate }) => row("td", [
    [name, ...(command ? [el("small", {}, `ribfast ${command}`)] : [])],
    network ?? "–",
    [steps.toLocaleString("en"), ...(batch ? [el("small", {}, `of ${count(batch, "image")}`)] : [])],
    [number(loss, 3), el("small", {}, "in the last tenth")],
    seconds === null ? "–" : duration(seconds),
    rate === null ? "–" : number(rate, 3),
  ], head));
  at("trainings").append(el("thead", {}, row("th", head)), el("tbody", {}, ...rows));
}
function drawLegend(list, entries) {
  list.replaceChildren(...entries.map(([mark, text]) => el("li", {}, mark, text)));
}
const swatch = (colour) => {
  const found = el("span", { class: "swatch", "aria-hidden": "true" });
  found.style.background = colour;
  return found;
};
let placeOf = null;  // where a threshold lies in the chart
function drawCurves() {
  const { stages } = facts, chart = at("chart");
  if (!facts.judged || !mapStages.length) {
    at("curves").hidden = true;
    return;
  }
  const width = Math.max(280, chart.clientWidth), height = Math.max(200, Math.min(340, width * 0.45));
  const left = 40, right = width - 12, top = 10, bottom = height - 40;
  const thresholds = mapStages.flatMap((index) => stages[index].thresholds);
  const low = Math.min(...thresholds), high = Math.max(...thresholds);
  const mious = stages.flatMap(({ evaluation: { mious: own, reported } }) => own ?? [reported.miou ?? []].flat());
  const least = Math.min(...mious), most = Math.max(...mious);
  const step = [0.01, 0.02, 0.05, 0.1, 0.2].find((size) => (most - least) / size <= 6) ?? 0.25;
  const from = Math.floor(least / step) * step, to = Math.max(from + step, Math.ceil(most / step) * step);
  const x = placeOf = (value) => left + (right - left) * (high > low ? (value - low) / (high - low) : 0.5);
  const y = (value) => bottom - (bottom - top) * (value - from) / (to - from);
  const parts = [];
  for (let value = from; value < to + step / 2; value += step) {
    parts.push(svg("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }));
    parts.push(svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, String(Math.round(100 * value))));
  }
  const ticks = width < 480 ? 4 : 6;
  for (let tick = 0; tick <= ticks; tick++) {
    const value = low + (high - low) * tick / ticks;
    parts.push(svg("text", { x: x(value), y: bottom + 18, "text-anchor": "middle" }, number(value, 3)));
  }
  const said = "threshold of the background (mIoU in %)";
  parts.push(svg("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, said));
  parts.push(svg("line", { class: "now", id: "now", y1: top, y2: bottom }));
  stages.forEach((stage, index) => {
    const { mious: own, reported } = stage.evaluation;
    if (reported.miou === null) return;
    const points = own?.map((miou, place) => `${x(stage.thresholds[place]).toFixed(1)} ${y(miou).toFixed(1)}`);
    const line = points ? `M${points.join("L")}` : `M${left} ${y(reported.miou)}H${right}`;
    const path = svg("path", { d: line, "stroke-dasharray": DASHES[index % 6] });
    path.style.stroke = stageColour(index);
    parts.push(path);
    if (!own) return;
    const mark = svg("circle", { cx: x(reported.threshold), cy: y(reported.miou), r: 4.5 });
    mark.style.fill = stageColour(index);
    parts.push(mark);
  });
  const reached = stages.map(({ name, evaluation: { reported } }) => {
    const where = reported.threshold === undefined ? "(masks)" : `at ${number(reported.threshold)}`;
    return `${name} ${percent(reported.miou)} ${where}`;
  });
  const alternative = `mIoU by threshold: ${reached.join("; ")}`;
  const frame = { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": alternative };
  chart.replaceChildren(svg("svg", frame, ...parts));
  drawLegend(at("chart-legend"), reached.map((text, index) => {
    const path = svg("path", { d: "M0 6H30", "stroke-dasharray": DASHES[index % 6] });
    path.style.stroke = stageColour(index);
    return [svg("svg", { width: 30, height: 12, "aria-hidden": "true" }, path), text];
  }));
  drawNow();
}
/** The line at the threshold that the slider is at. */
function drawNow() {
  if (!placeOf || state.stage < 0) return;
  for (const end of ["x1", "x2"]) at("now").setAttribute(end, placeOf(threshold(state.stage)));
}
function drawCurveTable() {
  if (at("curves").hidden) return;
  const grid = [...new Set(mapStages.flatMap((index) => facts.stages[index].thresholds))].sort((a, b) => a - b);
  const rows = grid.map((value) => row("td", [number(value), ...mapStages.map((index) => {
    const place = facts.stages[index].thresholds.indexOf(value);
    return place < 0 ? "–" : percent(facts.stages[index].evaluation.mious[place]);
  })]));
  const head = row("th", ["threshold", ...mapStages.map((index) => facts.stages[index].name)]);
  at("curve-table").append(el("thead", {}, head), el("tbody", {}, ...rows));
}
/** The class table, which its heads sort: once from the largest (a name: from A), again the other way, again as it was. */
function drawBars() {
  const stages = everyStage.filter(({ evaluation }) => evaluation);
  at("bars").hidden = !stages.length;
  if (!stages.length) return;
  const colour = (stage) => stageColour(everyStage.indexOf(stage));
  const cell = (value, stage) => {
    const inner = el("span");
    inner.style.width = `${100 * (value ?? 0)}%`;
    inner.style.background = colour(stage);
    return [percent(value), el("span", { class: "bar", "aria-hidden": "true" }, inner)];
  };
  const found = labels.flatMap((name, label) => {
    const ious = stages.map((stage) => stage.evaluation.ious[label]);
    return ious.every((iou) => iou === null) ? [] : [{ name, values: [name, ...ious] }];
  });
  for (const one of found) {
    one.row = row("td", [one.name, ...one.values.slice(1).map((iou, index) => cell(iou, stages[index]))]);
  }
  const mean = row("td", ["mean", ...stages.map((stage) => cell(stage.evaluation.reported.miou, stage))]);
  const body = el("tbody"), buttons = ["Class", ...stages.map(({ name }) => name)].map((text) => (
    el("button", { type: "button", title: `Sort by ${text}` }, el("span", {}, text))));
  const head = row("th", buttons.map((button, column) => {
    const split = stages[column - 1]?.split;
    return split ? [button, el("small", { title: split }, `of ${split}`)] : button;
  }));
  let sorted = -1, turned = 0;
  const sort = (column) => {
    turned = column === sorted ? (turned + 1) % 3 : 1;
    sorted = column;
    const sign = (turned === 1) === (column === 0) ? 1 : -1;
    const rank = ({ values }) => values[column] ?? -1;  // of a class that is neither there nor predicted
    const order = (one, other) => sign * (rank(one) < rank(other) ? -1 : rank(one) > rank(other) ? 1 : 0);
    body.replaceChildren(...(turned ? [...found].sort(order) : found).map((one) => one.row));
    [...head.cells].forEach((one, index) => {
      if (index === column && turned) one.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      else one.removeAttribute("aria-sort");
    });
  };
  buttons.forEach((button, column) => button.addEventListener("click", () => sort(column)));
  body.append(...found.map((one) => one.row));
  at("bar-table").append(el("thead", {}, head), body, el("tfoot", {}, mean));
}
function drawConfiguration() {
  const runs = [...everyStage, ...facts.trainings];
  if (facts.run) runs.unshift({ name: "the run", command: "run", run: facts.run });
  at("configuration").append(...runs.map(({ name, command, run }) => {
    const text = run ? el("pre", { tabindex: "0" }, run) : el("p", { class: "note" }, "Its folder has no config.json.");
    return el("details", {}, el("summary", {}, command ? `${name}: ribfast ${command}` : name), text);
  }));
}

// ---- the gallery

/** By createImageBitmap: an image element decodes for a frame of the page, which may be dropped, and then fails. */
async function decode(kind, text, [height, width] = []) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const picture = await createImageBitmap(new Blob([bytes], { type: `image/${kind}` }));
  const canvas = el("canvas");
  canvas.width = width ?? picture.width;
  canvas.height = height ?? picture.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  picture.close();
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}
async function decodeGrey(text) {
  const found = await decode("png", text), grey = new Uint8Array(found.length / 4);
  for (let place = 0; place < grey.length; place++) grey[place] = found[4 * place];
  return grey;
}
/** Each step's maps, of their differences to those of the step before, modulo 256. */
function summed(maps, layers) {
  const size = maps.length / layers;
  for (let place = size; place < maps.length; place++) maps[place] += maps[place - size];
  return maps;
}
/** The plane's values at the picture's pixels, between centres. */
function enlarge(plane, [mapHeight, mapWidth], [height, width]) {
  const out = new Float32Array(height * width), columns = [];
  for (let x = 0; x < width; x++) {
    const place = Math.min(mapWidth - 1, Math.max(0, (x + 0.5) * mapWidth / width - 0.5)), low = Math.floor(place);
    columns.push([low, Math.min(mapWidth - 1, low + 1), place - low]);
  }
  for (let y = 0; y < height; y++) {
    const place = Math.min(mapHeight - 1, Math.max(0, (y + 0.5) * mapHeight / height - 0.5)), low = Math.floor(place);
    const upper = low * mapWidth, lower = Math.min(mapHeight - 1, low + 1) * mapWidth, part = place - low;
    for (let x = 0; x < width; x++) {
      const [left, right, share] = columns[x];
      const above = plane[upper + left] + share * (plane[upper + right] - plane[upper + left]);
      const below = plane[lower + left] + share * (plane[lower + right] - plane[lower + left]);
      out[y * width + x] = above + part * (below - above);
    }
  }
  return out;
}

class Card {
  constructor(index) {
    this.index = index;
    this.facts = facts.images[index];
    this.near = false;
    const { name, classes, size } = this.facts, chips = el("ul", { class: "legend", "aria-label": "Classes" });
    const found = new Set(this.facts.stages.flatMap((own) => own.found ?? []));
    for (const [label] of this.facts.true ?? []) found.add(label);
    const others = facts.classes.map((_, key) => key).filter((key) => found.has(key + 1) && !classes.includes(key));
    this.colours = colours([...classes, ...others].map((key) => key + 1));
    const chip = (key, said = "") => [swatch(rgb(this.colours.get(key + 1))), facts.classes[key] + said];
    const entries = [...classes.map((key) => chip(key)), ...others.map((key) => chip(key, ", in a mask only"))];
    drawLegend(chips, entries.length ? entries : [["", "no classes"]]);
    this.figures = new Map();
    const pictures = el("div", { class: "pictures" });
    for (const [key, said] of this.kinds()) {
      const canvas = el("canvas", { role: "img", "aria-label": `${said} of ${name}` });
      [canvas.height, canvas.width] = [1, 1];
      canvas.style.aspectRatio = `${size[1]} / ${size[0]}`;
      const [text, score] = [el("span", {}, said), el("b")];
      const button = el("button", { type: "button", "aria-haspopup": "dialog", title: "Enlarge" }, canvas);
      button.addEventListener("click", () => enlargePicture(this, key));
      const element = el("figure", { "data-kind": key }, button, el("figcaption", {}, text, score));
      pictures.append(element);
      this.figures.set(key, { element, canvas, text, score });
    }
    this.element = el("article", { "aria-label": name }, el("header", {}, el("h3", {}, name), chips), pictures);
  }
  kinds() {
    const kinds = [["photo", "photograph"]];
    if (facts.judged) kinds.push(["truth", "ground truth"]);
    if (state.stage >= 0) {
      if (mapStages.length > 1 || facts.stages[mapStages[0]].steps > 1)
        kinds.push(["first", "first map"], ["first-mask", "its mask"]);
      kinds.push(["map", "map after the step"], ["mask", "mask at the threshold"]);
    }
    facts.stages.forEach((stage, index) => stage.kind === "masks" && kinds.push([`masks-${index}`, stage.name]));
    return kinds;
  }
  /** Pictures are decoded where they come into view, and let go where they leave it. */
  async show(near) {
    this.near = near;
    if (!near) {
      this.pixels = null;
      for (const { canvas } of this.figures.values()) [canvas.height, canvas.width] = [1, 1];
      return;
    }
    if (this.pixels) return;
    let found;
    try {
      found = await this.decoded();
    } catch (error) {  // a browser short of memory, say
      console.warn(`${this.facts.name}: ${error}; tried again in a second`);
      setTimeout(() => this.near && this.show(true), 1000);
      return;
    }
    if (!this.near || this.pixels) return;
    const [pixels, known, maps, masks] = found;
    this.pixels = { photo: pixels, maps };
    this.draw("photo", (out) => out.set(pixels));
    if (known) this.drawLabels("truth", known);
    masks.forEach((mask, index) => mask && this.drawLabels(`masks-${index}`, mask));
    this.paint();
  }
  decoded() {
    const { photo, truth, stages, size } = this.facts;
    return Promise.all([
      decode("jpeg", photo, size),
      truth && decodeGrey(truth),
      Promise.all(stages.map(async (own) => own.maps && summed(await decodeGrey(own.maps), own.counts.length))),
      Promise.all(stages.map((own) => own.labels && decodeGrey(own.labels))),
    ]);
  }
  /** What the sliders change. */
  paint() {
    this.caption();
    if (!this.pixels || state.stage < 0) return;
    const other = compared();
    if (other) this.paintMaps("first", "first-mask", other.stage, other.step);
    this.paintMaps("map", "mask", state.stage, state.steps[state.stage]);
  }
  /** A stage's maps after a step, and their mask. */
  paintMaps(kind, maskKind, stage, step) {
    const own = this.facts.stages[stage], [height, width] = this.facts.size, found = new Uint8Array(height * width);
    if (!own.keys?.length) {
      this.draw(kind, (out) => out.fill(0));
      if (own.keys) this.drawLabels(maskKind, found);
      else this.draw(maskKind, (out) => out.fill(0));
      return;
    }
    const planes = this.planes(own, stage, layerOf(own, step)), limit = 255 * threshold(stage);
    this.drawHeat(kind, planes, own.keys);
    for (let place = 0; place < found.length; place++) {
      let best = limit;
      for (let key = 0; key < planes.length; key++) {
        if (planes[key][place] > best) {
          best = planes[key][place];
          found[place] = own.keys[key] + 1;
        }
      }
    }
    this.drawLabels(maskKind, found);
  }
  planes(own, stage, layer) {
    const area = own.map_size[0] * own.map_size[1], maps = this.pixels.maps[stage];
    return own.keys.map((_, key) => {
      const first = (layer * own.keys.length + key) * area;
      return enlarge(maps.subarray(first, first + area), own.map_size, this.facts.size);
    });
  }
  draw(kind, fill) {
    const figure = this.figures.get(kind);
    if (!figure) return;
    const { canvas } = figure, [height, width] = this.facts.size;
    if (canvas.width !== width || canvas.height !== height) [canvas.height, canvas.width] = [height, width];
    const context = canvas.getContext("2d"), image = context.createImageData(width, height);
    fill(image.data);
    context.putImageData(image, 0, 0);
  }
  grey(place) {
    const { photo } = this.pixels;
    return 0.3 * photo[4 * place] + 0.59 * photo[4 * place + 1] + 0.11 * photo[4 * place + 2];
  }
  /** The class that is asked for if the image holds it, else the largest map. */
  drawHeat(kind, planes, keys) {
    const chosen = keys.includes(state.label) ? [planes[keys.indexOf(state.label)]] : planes;
    this.draw(kind, (out) => {
      for (let place = 0; place < out.length / 4; place++) {
        let value = 0;
        for (const plane of chosen) value = Math.max(value, plane[place]);
        const warm = heat[Math.round(value)], grey = this.grey(place);
        for (let channel = 0; channel < 3; channel++) out[4 * place + channel] = 0.3 * grey + 0.7 * warm[channel];
        out[4 * place + 3] = 255;
      }
    });
  }
  drawLabels(kind, found) {
    const width = this.facts.size[1];
    this.draw(kind, (out) => {
      for (let place = 0; place < found.length; place++) {
        const label = found[place], grey = this.grey(place), own = this.colours.get(label);
        const stripe = label === 255 && (place % width + Math.floor(place / width)) % 6 < 3;
        for (let channel = 0; channel < 3; channel++) {
          out[4 * place + channel] = own && (label !== 255 || stripe) ? 0.3 * grey + 0.7 * own[channel] : 0.45 * grey;
        }
        out[4 * place + 3] = 255;
      }
    });
  }
  caption() {
    const set = (kind, text, score) => {
      const figure = this.figures.get(kind);
      if (!figure) return;
      figure.text.textContent = text;
      figure.score.textContent = score === undefined || Number.isNaN(score) ? "" : percent(score);
      figure.canvas.setAttribute("aria-label", `${text} of ${this.facts.name}`);
    };
    facts.stages.forEach((stage, index) => {
      if (stage.kind === "masks") set(`masks-${index}`, stage.name, scoreOf(this.index, index));
    });
    if (facts.judged && !this.facts.truth) set("truth", "no ground truth");
    if (state.stage < 0) return;
    const describe = (kind, maskKind, stage, step) => {
      const { name, steps } = facts.stages[stage], own = this.facts.stages[stage];
      if (!own.keys?.length) {
        set(kind, own.keys ? `${name}: no classes, no map` : `${name}: no map`);
        set(maskKind, own.keys ? `${name}: background` : `${name}: no map`, scoreOf(this.index, stage, step));
        return;
      }
      const made = own.counts.length, stopped = step >= made && made < steps;
      const after = stopped ? `, stopped after ${made}` : steps > 1 ? ` after step ${step}` : "";
      set(kind, name + after);
      set(maskKind, `${name} above ${number(threshold(stage))}`, scoreOf(this.index, stage, step));
    };
    const other = compared();
    for (const kind of ["first", "first-mask"]) {
      if (this.figures.has(kind)) this.figures.get(kind).element.hidden = !other;
    }
    if (other) describe("first", "first-mask", other.stage, other.step);
    describe("map", "mask", state.stage, state.steps[state.stage]);
  }
}

const cards = facts.images.map((_, index) => new Card(index));
let shown = cards;
const nearby = new IntersectionObserver((entries) => {
  for (const entry of entries) cards[cardOf.get(entry.target)].show(entry.isIntersecting);
}, { rootMargin: "400px 0px" });
const cardOf = new Map(cards.map((card, index) => [card.element, index]));

/** Which cards are there, and in which order. */
function arrange() {
  const [order, stage] = state.order.split(" ");
  shown = cards.filter(({ facts: { classes } }) => state.label < 0 || classes.includes(state.label));
  if (order === "name") shown.sort((a, b) => a.facts.name < b.facts.name ? -1 : 1);
  if (stage !== undefined) {
    const sign = order === "best" ? -1 : 1, scores = new Map();
    for (const card of shown) {
      const score = sign * scoreOf(card.index, Number(stage));
      scores.set(card, Number.isNaN(score) ? 2 : score);  // last
    }
    shown.sort((a, b) => scores.get(a) - scores.get(b));
  }
  state.cards = PAGE;
  drawCards();
}
function drawCards() {
  const left = shown.length - state.cards;
  at("cards").replaceChildren(...shown.slice(0, state.cards).map((card) => card.element));
  at("more").hidden = left <= 0;
  at("more").textContent = `Show ${Math.min(PAGE, left)} more of ${shown.length}`;
}
/** As many pictures beside one another as leave the fewest places empty. */
function drawColumns() {
  const pictures = [...cards[0]?.figures.values() ?? []].filter(({ element }) => !element.hidden).length;
  const width = at("cards").clientWidth, most = Math.max(2, Math.floor(width / (width < 500 ? 112 : 170)));
  let columns = Math.min(most, pictures);
  const empty = (wide) => (wide - pictures % wide) % wide;
  for (let fewer = columns; fewer >= Math.max(2, most / 2); fewer--) {
    if (empty(fewer) < empty(columns)) columns = fewer;
  }
  at("cards").style.setProperty("--columns", columns);
}

// ---- one picture, enlarged

let large = null;
function enlargePicture(card, kind) {
  const { canvas, text, score } = card.figures.get(kind), to = at("large-picture");
  large = { card, kind };
  [to.height, to.width] = [canvas.height, canvas.width];
  to.getContext("2d").drawImage(canvas, 0, 0);
  at("large-title").textContent = [card.facts.name, text.textContent, score.textContent].filter(Boolean).join(" · ");
  to.style.setProperty("--ratio", canvas.width / canvas.height);
  if (!at("large").open) at("large").showModal();
}
/** To the card's next picture, or the one before. */
function turn(by) {
  const kinds = [...large.card.figures].filter(([, { element }]) => !element.hidden).map(([kind]) => kind);
  enlargePicture(large.card, kinds[(kinds.indexOf(large.kind) + by + kinds.length) % kinds.length]);
}
function drawLive() {
  const judged = shown.filter((card) => card.facts.true).length;
  const chosen = state.label < 0 ? "" : facts.classes[state.label];
  const images = count(facts.judged ? judged : shown.length, "image");
  const lead = el("span", { class: "lead", title: chosen });
  if (facts.judged) lead.append("mIoU", ...(chosen ? [" (", el("span", { class: "cut" }, chosen), ")"] : []), " of ");
  lead.append(images);
  const parts = [lead];
  if (judged) {
    facts.stages.forEach((stage, index) => {
      const sums = new Sums();
      for (const card of shown) sums.add(card.index, index);
      const early = state.steps[index] < stage.steps ? `, step ${state.steps[index]}` : "";
      const where = stage.kind === "maps" ? ` at ${number(threshold(index))}${early}` : "";
      const own = chosen ? ` (${percent(sums.iou(state.label + 1))})` : "";
      const value = el("b", { "data-stage": String(index) }, percent(sums.miou()));
      parts.push(el("span", {}, `${stage.name} `, value, `${own}${where}`));
    });
  }
  at("live").replaceChildren(...parts);
}
function drawSample() {
  const { stages, images, total } = facts, notes = [];
  if (images.length < total) {
    const worst = facts.judged ? `the worst and the best of ${stages.at(-1).name}, the others ` : "";
    notes.push(`${images.length} of ${total.toLocaleString("en")} images: ${worst}spread evenly.`,
      "The tables above are of all images; the numbers below of those shown here.");
  }
  const open = stages.some(({ kind }) => kind === "masks") ? "masks leave open" : "";
  const out = facts.judged ? "the ground truth leaves out" : "";
  if (open || out) notes.push(`Hatched is what ${[out, open].filter(Boolean).join(" and ")}.`);
  if (facts.judged) {
    const of = state.label < 0 ? "mIoU" : `IoU of ${facts.classes[state.label]}`;
    notes.push(`The number below a picture is that image's own ${of}.`);
  }
  at("sample").textContent = notes.join(" ");
}
function drawTools() {
  if (state.stage < 0) return;
  const { thresholds, steps } = facts.stages[state.stage];
  at("threshold").max = thresholds.length - 1;
  at("threshold").value = state.thresholds[state.stage];
  at("threshold-value").textContent = number(threshold(state.stage));
  at("threshold").setAttribute("aria-valuetext", number(threshold(state.stage)));
  at("step").max = steps;
  at("step").value = state.steps[state.stage];
  at("step").disabled = steps < 2;
  const said = steps < 2 ? "final map alone" : `${state.steps[state.stage]} of ${steps}`;
  at("step-value").textContent = said;
  at("step").setAttribute("aria-valuetext", said);
}
let waiting = false;
/** Once a frame, however fast a slider is moved. */
function redraw() {
  drawTools();
  drawNow();
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    drawLive();
    for (const card of shown.slice(0, state.cards)) card.near ? card.paint() : card.caption();
    drawColumns();
  });
}
function rearrange() {
  drawSample();
  arrange();
  redraw();
}

function begin() {
  const { stages, images, total } = facts;
  document.title = at("title").textContent = facts.title;
  at("summary").textContent = `${count(total, "image")}, ${count(facts.classes.length, "class", "classes")}, `
    + count(everyStage.length, "stage");
  const { machine } = facts, cuda = machine?.cuda.length ? [...new Set(machine.cuda)].join(", ") : null;
  const on = machine ? ` on ${cuda ? `${cuda}, ` : ""}${machine.processor}, ${count(machine.threads, "thread")}, `
    + `torch ${machine.torch}` : "";
  at("made").textContent = `Made ${facts.made} by ribfast ${facts.ribfast}${on}.`;
  drawStages();
  drawTrainings();
  drawCurves();
  drawCurveTable();
  drawBars();
  drawConfiguration();
  at("stage").append(...mapStages.map((index) => el("option", { value: String(index) }, stages[index].name)));
  at("class").append(el("option", { value: "-1" }, `all (${images.length})`));
  facts.classes.forEach((name, key) => {
    const held = images.filter(({ classes }) => classes.includes(key)).length;
    if (held) at("class").append(el("option", { value: String(key) }, `${name} (${held})`));
  });
  at("order").append(el("option", { value: "data" }, "as in the data"), el("option", { value: "name" }, "by name"));
  if (facts.judged) {
    for (const kind of ["worst", "best"]) {
      stages.forEach(({ name }, index) => {
        at("order").append(el("option", { value: `${kind} ${index}` }, `${kind} of ${name} first`));
      });
    }
  }
  for (const id of ["threshold-label", "step-label"]) at(id).hidden = state.stage < 0;
  at("stage").parentElement.hidden = mapStages.length < 2;
  at("stage").value = String(state.stage);
  const listen = (id, event, act) => at(id).addEventListener(event, () => act(Number(at(id).value)));
  listen("stage", "change", (value) => { state.stage = value; redraw(); });
  listen("class", "change", (value) => { state.label = value; rearrange(); });
  at("order").addEventListener("change", () => { state.order = at("order").value; rearrange(); });
  listen("threshold", "input", (value) => { state.thresholds[state.stage] = value; redraw(); });
  listen("step", "input", (value) => { state.steps[state.stage] = value; redraw(); });
  for (const id of ["threshold", "step"]) listen(id, "change", () => state.order.includes(" ") && rearrange());
  at("more").addEventListener("click", () => {
    state.cards += PAGE;
    drawCards();
    redraw();
  });
  at("large-before").addEventListener("click", () => turn(-1));
  at("large-after").addEventListener("click", () => turn(1));
  at("large").addEventListener("keydown", ({ key }) => {
    if (key === "ArrowLeft" || key === "ArrowRight") turn(key === "ArrowLeft" ? -1 : 1);
  });
  at("large").addEventListener("click", (event) => event.target === at("large") && at("large").close());  // beside it
  at("tools").addEventListener("submit", (event) => event.preventDefault());
  rearrange();
  for (const card of cards) nearby.observe(card.element);
  new ResizeObserver(drawCurves).observe(at("chart"));
  new ResizeObserver(drawColumns).observe(at("cards"));
}
begin();
