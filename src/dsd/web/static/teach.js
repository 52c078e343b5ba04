// Marks of right and wrong pairs, and a lesson from them.

import { ask, get, post } from "/static/api.js";
import { fail, loadModels, see, state } from "/static/app.js";
import { $, make } from "/static/dom.js";

const marks = []; // { image, view, text, right }
let lesson = null; // { id, name, losses, runs, steps, curve, over }

function marked(image, text) {
  return marks.find((m) => m.image === image && m.text === text)?.right ?? null;
}

// Marks a pair; the same mark again takes it back.
export function mark(image, view, text, right) {
  const at = marks.findIndex((m) => m.image === image && m.text === text);
  const before = at < 0 ? null : marks[at].right;
  if (at >= 0) marks.splice(at, 1);
  if (before !== right) marks.push({ image, view: view.startsWith("blob:") ? image : view, text, right });
  list();
}

function list() {
  $("marks").replaceChildren(
    ...marks.map((m, i) =>
      make(
        "li",
        {},
        make("img", { src: m.view, alt: "" }),
        make("span", { class: `verdict ${m.right ? "yes" : "no"}`, role: "img", "aria-label": m.right ? "right" : "wrong" }, m.right ? "✓" : "✗"),
        make("span", { class: "grow" }, m.text),
        make("button", { type: "button", class: "quiet", "aria-label": `Remove: ${m.text}`, onclick: () => remove(i) }, "Remove"),
      ),
    ),
  );
  showMarks();
}

// The keyboard's focus goes to the next mark, not away with the button.
function remove(i) {
  marks.splice(i, 1);
  list();
  const left = [...$("marks").querySelectorAll("button")];
  (left[i] ?? left.at(-1) ?? $("clear")).focus();
}

// The ranking shows what is marked, in place, so that a button keeps the focus.
export function showMarks() {
  for (const item of $("ranking").children) {
    const verdict = marked(state.image, item.dataset.text);
    item.querySelector(".right").setAttribute("aria-pressed", String(verdict === true));
    item.querySelector(".wrong").setAttribute("aria-pressed", String(verdict === false));
  }
}

async function learn() {
  $("notice").hidden = true;
  $("learn").disabled = true;
  try {
    const started = await post("/playground/lessons", {
      marks: marks.map(({ image, text, right }) => ({ image, text, right })),
      scenes: Number($("lesson-scenes").value) || 0,
      method: $("lesson-method").value,
      score: $("lesson-score").value || null,
      model: state.model,
    });
    lesson = { ...started, losses: [], runs: 1, steps: 1, curve: [], over: false };
    $("stop").hidden = false;
    $("download").hidden = true;
    $("progress").hidden = false;
    $("progress").removeAttribute("value");
    $("lesson").textContent = "Learning…";
    await follow();
  } catch (error) {
    $("lesson").textContent = "";
    fail(error);
  } finally {
    $("learn").disabled = false;
    $("stop").hidden = true;
    $("progress").hidden = true;
  }
}

async function follow() {
  let after = 0;
  let failures = 0;
  while (!lesson.over) {
    let news;
    try {
      news = await get(`/playground/lessons/${lesson.id}?after=${after}`);
      failures = 0;
    } catch (error) {
      if (error.code !== "gone" || ++failures > 5) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000)); // it learns on, whether it can be asked or not
      continue;
    }
    after += news.events.length;
    lesson.over = news.over && !news.events.length;
    for (const event of news.events) await take(event);
    if (news.events.length) drawCurve();
  }
}

async function take(event) {
  if (event.event === "start") {
    Object.assign(lesson, { runs: event.runs, steps: event.steps, examples: event.examples });
    $("lesson").textContent = `Learning from ${event.examples} examples…`; // how far it is, the bar says
  }
  if (event.event === "step") {
    lesson.losses.push([(event.run - 1) * lesson.steps + event.step, event.loss]);
    const done = ((event.run - 1) * lesson.steps + event.step) / (lesson.runs * lesson.steps);
    $("progress").value = Math.min(1, done);
  }
  if (event.event === "failed") throw new Error(event.message);
  if (event.event === "stopped") $("lesson").textContent = "Stopped.";
  if (event.event === "done") {
    lesson.curve = event.curve;
    const share = (v) => `${(100 * v).toFixed(1)} %`;
    $("lesson").textContent = event.kept
      ? `${event.name}: right on ${share(event.before)} of the choices held out before, ${share(event.after)} now ` +
        `(95 % interval ${share(event.low)} to ${share(event.high)}, ${event.held_out} examples). It is in the list of models.`
      : event.held_out < event.fewest
      ? `${event.name}: ${event.held_out} held-out examples cannot show that learning helps, ${event.fewest} might, so ` +
        "what it started from was kept. Mark more."
      : `${event.name}: learning was not clearly better than the score it started from (${share(event.before)} of ` +
        `${event.held_out} held-out examples), so that was kept; its probabilities are calibrated. More marks help.`;
    $("download").hidden = false;
    await loadModels(event.name);
    if (state.source) await see(state.source, false);
  }
}

// Loss step by step (grey), accuracy on held-out choices (blue).
function drawCurve() {
  const [width, height, left, right, top, bottom] = [520, 180, 44, 12, 26, 28];
  const total = lesson.runs * lesson.steps;
  const x = (step) => left + ((width - left - right) * step) / total;
  const y = (share) => height - bottom - (height - top - bottom) * share;
  const parts = [
    make("svg:title", {}, "The course of the lesson"),
    make("svg:line", { class: "axis", x1: left, x2: width - right, y1: y(0), y2: y(0) }),
    make("svg:line", { class: "axis", x1: left, x2: width - right, y1: y(1), y2: y(1) }),
    make("svg:text", { x: left, y: height - 8 }, "step 0"),
    make("svg:text", { x: width - right, y: height - 8, "text-anchor": "end" }, `${total}`),
  ];
  const most = Math.max(1e-6, ...lesson.losses.map(([, loss]) => loss));
  if (lesson.losses.length) {
    const line = lesson.losses.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss / most).toFixed(1)}`).join(" ");
    parts.push(make("svg:polyline", { class: "loss", points: line }));
    parts.push(make("svg:text", { x: left, y: 16 }, `loss (top: ${most.toFixed(2)})`));
  }
  if (lesson.curve.length) {
    const points = lesson.curve.map(({ step, accuracy }) => [x((step * total) / lesson.steps), y(accuracy)]);
    parts.push(make("svg:polyline", { class: "accuracy", points: points.map((p) => p.map((v) => v.toFixed(1)).join(",")).join(" ") }));
    points.forEach(([cx, cy]) => parts.push(make("svg:circle", { class: "point", cx, cy, r: 3.5 })));
    parts.push(make("svg:text", { class: "strong", x: width - right, y: 16, "text-anchor": "end" }, "held-out accuracy (0 to 100 %)"));
  }
  $("curve").replaceChildren(make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img" }, ...parts));
}

async function download() {
  const archive = await get(`/playground/lessons/${lesson.id}/adapter.zip`);
  const url = URL.createObjectURL(archive);
  const link = make("a", { href: url, download: `${lesson.name}.zip` });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

export function wireTeaching() {
  $("learn").addEventListener("click", learn);
  $("stop").addEventListener("click", () => ask("DELETE", `/playground/lessons/${lesson.id}`).catch(fail));
  $("download").addEventListener("click", () => download().catch(fail));
  $("clear").addEventListener("click", () => (marks.splice(0), list()));
}
