"""Writes the notebooks beside it from what is here, and runs them: python examples/build.py [NAME ...]

Notebooks are kept with their outputs. They are written here as plain text, because a notebook's file is no place to read
or review code; edit this file, not them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent

NOTEBOOKS: dict[str, str] = {
    "1_five_minutes_with_tiny": """
# Five minutes with `tiny`

`dsd` asks a text-to-image diffusion model how well a caption explains a picture. `tiny` is such a model that comes with the
library: 32 × 32 pixels, trained on a world of coloured shapes. Nothing is downloaded.
---
import random

import dsd
from dsd.tiny import captions, sketch, world

matcher = dsd.Matcher.from_pretrained("tiny")
scene = sketch.stage(random.Random(4), sketch.read("a red heart left of a white star"))
picture = world.render(scene)
world.render(scene, 240)  # drawn larger for us; the model gets 32 x 32
---
# Which caption fits?
Scores are relative: higher is a better match, and only differences for the same picture mean something.
---
texts = [
    "a red heart left of a white star",
    "a white star left of a red heart",
    "a white heart left of a red star",
    "a blue heart left of a white star",
]
for found in matcher.rank(picture, texts):
    print(f"{found.score:7.3f}  {found.candidate}")
---
# Where does it see each word?
An explanation holds a map for each word, and what the score loses without it.
---
from PIL import Image

found = matcher.explain(picture, texts[0])
sheet = Image.new("RGB", (100 * len(found.words), 100))
for i, heat in enumerate(found.maps):
    shown = Image.fromarray((255 * heat).astype("uint8")).resize((96, 96), Image.Resampling.BICUBIC)
    sheet.paste(shown.convert("RGB"), (100 * i, 0))
print(*(f"{word} {share:+.2f}" for word, share in zip(found.words, found.by_word, strict=True)), sep="   ")
sheet
---
# How good is it?
On held-out scenes of two things; the interval says how far 40 examples can be trusted.
---
from dsd.evaluate import evaluate
from dsd.tasks import world_task

result = evaluate(matcher, world_task("comvg", "test", "easy", 40, seed=0))
{name: round(value, 3) for name, value in result.metrics["accuracy"].items()}
---
# The same on a server
`dsd serve` opens a playground and answers over HTTP; the code changes in one line:

```python
matcher = dsd.Client("http://127.0.0.1:8000")
```
""",
    "2_few_shot_on_your_own_folder": """
# Few-shot learning on your own folder

A folder of pictures and a CSV with the columns `image`, `text` and `label` is all that is needed. Here the folder is made of
scenes of the embedded world; put your own in its place.
---
import csv
import tempfile
from pathlib import Path

from PIL import Image

from dsd.tasks import world_task

folder = Path(tempfile.mkdtemp()) / "mine"
folder.mkdir()
rows = []
for number, example in enumerate(world_task("comvg", "few-shot", "easy", 48, seed=1)):
    for i, image in enumerate(example.images):
        name = f"{number}-{i}.png"
        image.save(folder / name)
        rows += [(name, text, int((i, j) in example.positives)) for j, text in enumerate(example.texts)]
with open(folder / "labels.csv", "w", newline="") as file:
    csv.writer(file).writerows([("image", "text", "label"), *rows])
print(*rows[:4], sep="\\n")
strip = Image.new("RGB", (8 * 68, 64), "white")
for k, name in enumerate(sorted({row[0] for row in rows})[:8]):
    strip.paste(Image.open(folder / name), (68 * k, 0))
strip
---
# Learn
`weights` learns which attention heads to trust, in seconds, on a frozen model; `prompt` learns more and takes longer. Examples
are held out by turns, and what was learned is kept only if it is clearly better there.
---
import dsd
from dsd.learn import FitConfig

examples = dsd.read_manifest(folder / "labels.csv")
matcher = dsd.Matcher.from_pretrained("tiny", score="attention", timesteps=(300, 600))
matcher.fit(examples, config=FitConfig(method="weights", draws=2))
training = matcher.adapter.training
held = training["validation"]
print(f"held-out accuracy: {held['before']:.3f} before, {held['after']:.3f} after; kept: {training['kept']}")
---
# Keep it, and measure on other scenes
---
from dsd.evaluate import evaluate

saved = matcher.save_pretrained(folder / "adapter")
again = dsd.Matcher.from_pretrained("tiny", adapter=saved)
zero = dsd.Matcher.from_pretrained("tiny")
test = world_task("comvg", "test", "easy", 40, seed=0)
for name, judge in (("zero-shot denoising", zero), ("learned weights", again)):
    accuracy = evaluate(judge, test).metrics["accuracy"]
    print(f"{name:20} {accuracy['value']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]")
---
# Probabilities
A learned matcher is calibrated on what was held out, so that its probabilities can be taken at their word.
---
question = next(e for e in test if len(e.texts) > 1)
print(again.probability(question.images[0], question.texts).round(3), question.texts)
question.images[0].resize((192, 192))
""",
    "3_a_benchmark_beside_clip": """
# A benchmark with CLIP side by side

Baselines keep the same protocol as the matcher, so that everything that measures one measures the other, on the same
examples. `clip-tiny` is a small CLIP that comes with the library, trained on captions of the same world as `tiny`; it stands
in for the real ones, which `baseline("clip", model="openai/clip-vit-base-patch32")` loads where the hub can be reached. What
is measured here says something about these two small models, and nothing about their large relatives. How far `clip-tiny` was
trained stands in `dsd/tiny/clip_weights/training.json`.
---
import dsd
from dsd.baselines import baseline
from dsd.tasks import world_task

methods = {
    "dsd, denoising": dsd.Matcher.from_pretrained("tiny"),
    "CLIP (clip-tiny)": baseline("clip", model="clip-tiny"),
    "caption length": baseline("caption-length"),
    "chance": baseline("chance"),
}
examples = world_task("winoground", "test", "standard", 40, seed=0)
print(*examples[0].texts, sep="\\n")
---
from PIL import Image

pair = Image.new("RGB", (404, 200), "white")
for i, image in enumerate(examples[0].images):
    pair.paste(image.resize((200, 200)), (204 * i, 0))
pair
---
# Same words, other order
Winoground asks which of two captions of the same words belongs to which of two pictures. `text` and `image` are the two
choices, and `group` counts only if all four are right.
---
from dsd.evaluate import evaluate
from dsd.report import format_interval, table

results = {name: evaluate(method, examples) for name, method in methods.items()}
columns = ("text", "image", "group")
rows = [{"method": n, **{c: format_interval(r.metrics[c]) for c in columns}} for n, r in results.items()]
print(table(rows, ("method", *columns)))
---
# Is the difference real?
The same examples were answered by both, so they can be compared in pairs.
---
from dsd.metrics import outcomes, paired_difference

a, b = (outcomes(examples, results[name].scores) for name in ("dsd, denoising", "CLIP (clip-tiny)"))
{name: round(float(value), 4) for name, value in paired_difference(a, b).items()}
""",
    "4_best_of_n": """
# Best of N generations

The model that draws can also judge: generate several pictures for a caption with the stock pipeline, and let the matcher pick.
---
import logging
import warnings

import torch
from diffusers import StableDiffusionPipeline

import dsd
from dsd.backbone.hub import resolve

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
matcher = dsd.Matcher.from_pretrained("tiny")
pipeline = StableDiffusionPipeline.from_pretrained(
    resolve("tiny"), safety_checker=None, torch_dtype=torch.float32
)
pipeline.set_progress_bar_config(disable=True)
---
caption = "a red circle left of a blue square"
pictures = pipeline(
    caption,
    num_images_per_prompt=8,
    num_inference_steps=20,
    guidance_scale=4.0,
    generator=torch.Generator().manual_seed(1),
).images
ranked = matcher.rank(caption, pictures)
[(found.index, round(found.score, 3)) for found in ranked]
---
# Best first
The order is the matcher's. It is of the same model as the pictures, so it shares its blind spots: a second model is a fairer
judge where one can be had.
---
from PIL import Image

strip = Image.new("RGB", (len(ranked) * 100, 96), "white")
for k, found in enumerate(ranked):
    strip.paste(pictures[found.index].resize((96, 96), Image.Resampling.NEAREST), (100 * k, 0))
strip
---
# Does picking help?
Among captions that say something else, how often does the first picture of a caption win for its own, and how often the best
of four? A score of the matcher itself would flatter it, so `clip-tiny` judges, which took no part in drawing or picking.
---
from dsd.baselines import baseline

judge = baseline("clip", model="clip-tiny")
captions = [
    "a red circle left of a blue square",
    "a green star above a white heart",
    "a yellow moon right of a pink cross",
    "a purple diamond below an orange triangle",
]
first, best = [], []
for i, caption in enumerate(captions):
    drawn = pipeline(
        caption, num_images_per_prompt=4, num_inference_steps=15, guidance_scale=4.0, generator=torch.Generator().manual_seed(i)
    ).images
    for kept, chosen in ((first, drawn[0]), (best, drawn[matcher.rank(caption, drawn)[0].index])):
        scores = judge.score([chosen], captions).scores[0]
        kept.append(int(scores.argmax() == i))
print(f"own caption wins: {sum(first)} of {len(first)} first pictures, {sum(best)} of {len(best)} picked ones")
""",
}


def cells(text: str) -> list[nbformat.NotebookNode]:
    """Cells of a notebook's text: parts between ``---``; those that begin with ``#`` and a space and hold prose are it."""
    found = []
    for part in text.strip().split("\n---\n"):
        prose = part.lstrip().startswith("# ")
        found.append(nbformat.v4.new_markdown_cell(part) if prose else nbformat.v4.new_code_cell(part))
    for i, cell in enumerate(found):
        cell["id"] = f"cell-{i}"
    return found


def build(name: str) -> Path:
    """Writes one notebook and runs it."""
    notebook = nbformat.v4.new_notebook(cells=cells(NOTEBOOKS[name]))
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran, which differs each time
        if cell.cell_type == "code":  # loading bars are of no interest
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    path = FOLDER / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


if __name__ == "__main__":
    for wanted in sys.argv[1:] or NOTEBOOKS:
        print(build(wanted))
