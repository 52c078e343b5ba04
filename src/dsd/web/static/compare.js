// Two captions of one picture, or two models on the same captions.

import { post } from "/static/api.js";
import { captions, card, sharesOf, state } from "/static/app.js";
import { $, make, percent, signed, signedNumber } from "/static/dom.js";

export function wireTabs() {
  const tabs = [$("tab-captions"), $("tab-models")];
  const choose = (chosen) => {
    for (const tab of tabs) {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      $(tab.getAttribute("aria-controls")).hidden = !on;
    }
    chosen.focus();
  };
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft" || event.key === "ArrowRight") choose(tabs[1 - i]);
    });
  });
}

function offer(select, values, wanted) {
  const before = select.value;
  const chosen = values.includes(before) ? before : wanted;
  select.replaceChildren(...values.map((value) => make("option", { value, selected: value === chosen }, value)));
}

export function offerCaptions(texts) {
  offer($("caption-a"), texts, texts[0]);
  offer($("caption-b"), texts, texts[1] ?? texts[0]);
}

export function offerModels() {
  const names = state.models.map((m) => m.name);
  offer($("model-a"), names, names.find((name) => !card(name).adapter) ?? names[0]);
  offer($("model-b"), names, names.findLast((name) => card(name).adapter) ?? names.at(-1));
}

export async function compareCaptions() {
  const [a, b] = [$("caption-a").value, $("caption-b").value];
  if (!state.image || !a || !b) throw new Error("Choose a picture and type two captions first.");
  $("difference").replaceChildren(make("p", { class: "small" }, "Comparing…"));
  let found;
  try {
    found = await post("/v1/compare", { images: [state.image], texts: [a, b], model: state.model });
  } catch (error) {
    $("difference").replaceChildren();
    throw error;
  }
  const canvas = make("canvas", { class: "on", "aria-hidden": "true" });
  signed(canvas, found.map);
  const winner = found.difference >= 0 ? "A" : "B";
  const told = make(
    "div",
    { class: "told" },
    make("p", {}, make("b", { class: winner === "A" ? "a-text" : "b-text" }, `Caption ${winner}`), ` fits better by ${Math.abs(found.difference).toFixed(3)}.`),
    make("p", { class: "small" }, "Orange: where A explains the picture better. Blue: where B does."),
    ...found.changes.map((change) =>
      make(
        "p",
        { class: "change" },
        make("span", { class: "a-text" }, change.a || "nothing"),
        "against",
        make("span", { class: "b-text" }, change.b || "nothing"),
        make("span", { class: "small" }, `${change.share >= 0 ? "for A" : "for B"}, ${Math.abs(change.share).toFixed(3)}`),
      ),
    ),
  );
  const figure = make("figure", { class: "stage" }, make("img", { src: state.view, alt: "Where the two captions differ" }), canvas);
  $("difference").replaceChildren(figure, told);
}

export async function compareModels() {
  const names = [$("model-a").value, $("model-b").value];
  const texts = captions();
  if (!state.image || !texts.length) throw new Error("Choose a picture and type captions first.");
  const columns = await Promise.all(
    names.map(async (model) => {
      const { image } = await post("/playground/pictures", { image: state.source.image ?? state.image, model });
      const found = await post("/v1/score", { images: [image], texts, model });
      return { scores: found.scores[0], shares: sharesOf(found.scores[0], model) };
    }),
  );
  const best = columns.map((column) => column.scores.indexOf(Math.max(...column.scores)));
  const row = (text, i) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, text),
      ...columns.map((column, k) =>
        make("td", { class: best[k] === i ? "best" : null }, `${best[k] === i ? "✓ " : ""}${card(names[k]).calibrated ? "" : "≈ "}${percent(column.shares[i])} (${signedNumber(column.scores[i])})`),
      ),
    );
  const head = make("tr", {}, make("th", { scope: "col" }, "Caption"), ...names.map((name) => make("th", { scope: "col" }, name)));
  const same = best[0] === best[1] ? "Both choose the same caption." : "They choose different captions.";
  $("models-table").replaceChildren(
    make("p", { class: "small" }, `${same} ≈ marks shares of raw scores, which are not calibrated.`),
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...texts.map(row))),
  );
}
