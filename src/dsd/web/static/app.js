// The page: a picture, captions that are ranked as they are typed, and why.

import { get, post } from "/static/api.js";
import { compareCaptions, compareModels, offerCaptions, offerModels, wireTabs } from "/static/compare.js";
import { $, make, percent, signedNumber, softmax, veil } from "/static/dom.js";
import { mark, showMarks, wireTeaching } from "/static/teach.js";

export const state = {
  models: [],
  model: null,
  source: null, // what was dropped, drawn or chosen: { file } or { image }
  view: null, // what is shown
  image: null, // what the model sees: a PNG as a data URL, at its size
  number: 0, // of the picture, for what is known of it
  scores: new Map(), // model, image and caption => { score }
  chosen: null, // the caption whose words are shown
};

const key = (text, model = state.model) => JSON.stringify([model, state.number, text]);
export const card = (name = state.model) => state.models.find((m) => m.name === name);
export const captions = () => [...new Set($("texts").value.split("\n").map((line) => line.trim()).filter(Boolean))];

export function fail(error) {
  if (error.name === "AbortError") return;
  $("notice").textContent = error.message;
  $("notice").hidden = false;
}

function clearNotice() {
  $("notice").hidden = true;
}

// Models

export async function loadModels(choose) {
  const found = await get("/v1/models");
  state.models = found.models;
  $("teach").hidden = !found.teaches;
  const wanted = choose ?? state.model;
  state.model = card(wanted) ? wanted : state.models.find((m) => m.default).name;
  $("model").replaceChildren(...state.models.map((m) => make("option", { value: m.name, selected: m.name === state.model }, m.name)));
  offerModels();
  describe();
}

function describe() {
  const m = card();
  const score = m.config.score?.kind ?? "score";
  const steps = m.config.score?.timesteps?.length;
  $("model-about").textContent =
    `${m.name}: ${score} score${steps ? ` over ${steps} timesteps` : ""}, pictures at ${m.size ?? "their own"} pixels, ` +
    `${m.adapter ? "taught from examples" : "zero-shot"}, ${m.calibrated ? "calibrated" : "not calibrated"}.`;
  $("calibration").textContent = m.calibrated ? "calibrated probabilities" : "shares, not calibrated";
  $("calibration").title = m.calibrated
    ? "How often such a caption was right on held-out examples"
    : "A softmax over the raw scores: good for the order, not to be taken for probabilities. Teach the model to calibrate it.";
}

async function changeModel(name) {
  clearNotice();
  state.model = name;
  $("model").value = name;
  describe();
  if (state.source) await see(state.source, false);
}

// Pictures

let seeing = 0;
export async function see(source, announce = true) {
  clearNotice();
  const mine = ++seeing; // an answer that comes late is of no use once another picture is asked for
  try {
    let image = source.image;
    if (source.file) {
      const form = new FormData();
      form.append("image", source.file);
      form.append("model", state.model);
      image = (await post("/playground/pictures", form)).image;
    } else {
      image = (await post("/playground/pictures", { image, model: state.model })).image;
    }
    if (mine !== seeing) return;
    state.source = source;
    state.image = image;
    state.number = mine;
  } catch (error) {
    if (mine === seeing) fail(error);
    return;
  }
  if (state.view?.startsWith("blob:")) URL.revokeObjectURL(state.view);
  state.view = source.file ? URL.createObjectURL(source.file) : (source.view ?? state.image);
  const shown = $("image");
  shown.onerror = () => (shown.src = state.image); // formats that this browser does not know
  shown.src = state.view;
  shown.alt = source.alt ?? "Your picture";
  shown.hidden = false;
  $("hint").hidden = true;
  $("heat").classList.remove("on");
  state.chosen = null;
  $("words").replaceChildren();
  $("words-about").textContent = "";
  if (announce) $("status").textContent = "Picture loaded.";
  for (const button of $("scenes").children) button.setAttribute("aria-pressed", String(button.dataset.scene === source.scene));
  await rank();
}

async function takeFile(file) {
  if (file) await see({ file, alt: `Your picture ${file.name ?? ""}`.trim() });
}

let seed = 0;
async function loadScenes(first) {
  try {
    const { scenes } = await get(`/playground/scenes?seed=${seed}&count=12`);
    const buttons = scenes.map((scene, i) =>
      make(
        "button",
        {
          type: "button",
          "aria-label": `Scene ${i + 1}`,
          "aria-pressed": "false",
          "data-scene": `${seed}-${i}`,
          onclick: () => takeScene(scene, `${seed}-${i}`, i),
        },
        make("img", { src: scene.view, alt: "" }),
      ),
    );
    $("scenes").replaceChildren(...buttons);
    if (first) await takeScene(scenes[0], `${seed}-0`, 0);
  } catch (error) {
    fail(error);
  }
}

async function takeScene(scene, name, i) {
  $("texts").value = scene.texts.join("\n");
  await see({ image: scene.image, view: scene.view, scene: name, alt: `Scene ${i + 1} of the world` });
}

async function draw(event) {
  event.preventDefault();
  clearNotice();
  const text = $("draw-text").value.trim() || $("draw-text").placeholder;
  try {
    const drawn = await post("/playground/draw", { text, model: state.model, seed: Math.floor(Math.random() * 2 ** 31) });
    if (!captions().includes(text)) $("texts").value = [text, ...captions()].join("\n");
    await see({ image: drawn.image, view: drawn.view, alt: `Drawn: ${text}` });
    const how = drawn.by === "world" ? "Drawn by the rules of the model's world." : "Drawn by the model itself, so it may be wrong.";
    $("words-about").textContent = how;
  } catch (error) {
    fail(error);
  }
}

// Ranking

let pending = null;
async function rank() {
  const texts = captions();
  offerCaptions(texts);
  pending?.abort();
  if (!state.image || !texts.length) return show([]);
  const missing = texts.filter((text) => !state.scores.has(key(text)));
  if (missing.length) {
    pending = new AbortController();
    const signal = pending.signal;
    const names = missing.map((text) => key(text));
    try {
      const found = await post("/v1/score", { images: [state.image], texts: missing, model: state.model }, signal);
      names.forEach((name, i) => state.scores.set(name, found.scores[0][i]));
      clearNotice();
    } catch (error) {
      if (error.name !== "AbortError") show([]); // not what was said of another picture
      return fail(error);
    }
    if (signal.aborted) return;
  }
  show(texts.map((text) => ({ text, score: state.scores.get(key(text)) })).filter((row) => row.score !== undefined));
}

// The scale that turns scores into log-odds comes with a calibrated model; else it is one.
export function sharesOf(scores, name = state.model) {
  const scale = card(name)?.scale ?? 1;
  return softmax(scores.map((s) => scale * s));
}

function show(rows) {
  const shares = rows.length ? sharesOf(rows.map((row) => row.score)) : [];
  rows = rows.map((row, i) => ({ ...row, share: shares[i] })).sort((a, b) => b.score - a.score);
  const calibrated = card()?.calibrated;
  $("ranking").replaceChildren(
    ...rows.map((row) => {
      const bar = make("span");
      bar.style.width = `${100 * row.share}%`;
      const button = (right) =>
        make(
          "button",
          {
            type: "button",
            class: right ? "right" : "wrong",
            "aria-pressed": "false",
            "aria-label": `${right ? "Right" : "Wrong"}: ${row.text}`,
            title: right ? "This caption is right" : "This caption is wrong",
            onclick: () => mark(state.image, state.view, row.text, right),
          },
          right ? "✓" : "✗",
        );
      const item = make(
        "li",
        { class: row.text === state.chosen ? "on" : null, "aria-current": row.text === state.chosen ? "true" : null, "data-text": row.text },
        make("button", { type: "button", class: "say", title: "Show its words", onclick: () => explain(row.text) }, row.text),
        make("div", { class: "marking", role: "group", "aria-label": "Is it right?" }, button(true), button(false)),
        make("div", { class: "bar", "aria-hidden": "true" }, bar),
        make("div", { class: "numbers" }, make("b", {}, (calibrated ? "" : "≈ ") + percent(row.share)), ` ${signedNumber(row.score)}`),
      );
      return item;
    }),
  );
  showMarks();
  if (!rows.length) return;
  $("status").textContent = `Best of ${rows.length}: ${rows[0].text}, ${percent(rows[0].share)}${calibrated ? "" : ", not calibrated"}.`;
  if (card().explains && (state.chosen === null || !rows.some((row) => row.text === state.chosen))) explain(rows[0].text);
}

// Words

let explaining = null;
const explained = new Map();
async function explain(text) {
  state.chosen = text;
  for (const item of $("ranking").children) {
    item.classList.toggle("on", item.dataset.text === text);
    if (item.dataset.text === text) item.setAttribute("aria-current", "true");
    else item.removeAttribute("aria-current");
  }
  explaining?.abort();
  if (!card().explains) return;
  explaining = new AbortController();
  const signal = explaining.signal;
  const name = key(text);
  try {
    if (!explained.has(name)) {
      $("words-about").textContent = "Looking for the words…";
      explained.set(name, await post("/v1/explain", { image: state.image, text, model: state.model }, signal));
    }
  } catch (error) {
    return fail(error);
  }
  if (signal.aborted) return;
  const found = explained.get(name);
  const gains = (found.by_word ?? []).map((v) => Math.max(0, v ?? 0));
  const most = Math.max(1e-9, ...gains);
  const heat = $("heat");
  const off = () => heat.classList.remove("on");
  const buttons = found.words.map((word, i) => {
    const on = () => {
      veil(heat, found.maps[i]);
      heat.classList.add("on");
      const gain = found.by_word?.[i];
      $("words-about").textContent =
        gain === null || gain === undefined ? `“${word}”` : `“${word}”: without it the score is ${Math.abs(gain).toFixed(3)} ${gain >= 0 ? "lower" : "higher"}.`;
    };
    const button = make("button", { type: "button", onmouseenter: on, onfocus: on, onclick: on, onmouseleave: off, onblur: off }, word);
    if (gains.length) button.style.setProperty("--share", gains[i] / most);
    return button;
  });
  $("words").replaceChildren(...buttons);
  $("words-about").textContent = "Hover or focus a word to see where the model finds it. The line under a word is what the score owes it.";
}

// Wiring

function wire() {
  $("model").addEventListener("change", (event) => changeModel(event.target.value));
  $("file").addEventListener("change", (event) => {
    takeFile(event.target.files[0]);
    event.target.value = ""; // the same file can be chosen again
  });
  const stage = $("stage");
  for (const name of ["dragenter", "dragover"])
    document.addEventListener(name, (event) => {
      event.preventDefault();
      stage.classList.add("over");
    });
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && stage.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    stage.classList.remove("over");
    takeFile(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((f) => f.type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    takeFile(file);
  });
  let waiting;
  $("texts").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(rank, 250);
  });
  $("draw").addEventListener("submit", draw);
  $("more").addEventListener("click", () => {
    seed += 1;
    loadScenes(false);
  });
  $("compare-captions").addEventListener("click", () => compareCaptions().catch(fail));
  $("compare-models").addEventListener("click", () => compareModels().catch(fail));
  wireTabs();
  wireTeaching();
}

wire();
try {
  await loadModels();
  await loadScenes(true);
  document.body.dataset.ready = "true";
} catch (error) {
  fail(error);
}
