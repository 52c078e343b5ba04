"""Runs of learning: what is held out when, the same result however the work is shared, stopped or logged."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dsd import adapt, prompts, weighing
from dsd.adapt import fit
from dsd.adapters import Adapter, fingerprint
from dsd.backbone import TextStates, load_backbone
from dsd.contracts import AdapterError, Example, ModelError, OptionError
from dsd.learn import FitConfig, Learner, Team, checkpointed
from dsd.lesson import Negatives, _Without
from dsd.matcher import Matcher
from dsd.prompts import PromptConfig
from dsd.records import Log
from dsd.scorer import Scorer
from dsd.scores import ScoreConfig
from looks import looks_as
from models import picture, toy

Pipe = Callable[..., str]
SCORE = ScoreConfig("attention", (20, 100))
QUICK = FitConfig(steps=4, batch=4, check_every=2, folds=3, learning_rate=0.02, jitter=10)
PROMPT = PromptConfig(rank=2, tokens=3)
IN_TEXT = replace(PROMPT, words=("red",))


def scorer(pipe: Pipe, config: ScoreConfig = SCORE) -> Scorer:
    return Scorer(load_backbone(pipe()), config)


def change(scorer: Scorer) -> float:
    """What changes more is better, for only the steps count here."""
    return 1 / (1 + sum(float(v.abs().sum()) for v in prompts.state(scorer.backbone.denoiser).values()))


def gap(a: Adapter, b: Adapter) -> float:
    """The largest difference between what two adapters learned."""
    assert a.state.keys() == b.state.keys()
    assert a.state
    return max(float((a.state[n] - b.state[n]).abs().max()) for n in a.state)


# What is held out


def test_examples_are_held_out_by_turns() -> None:
    examples = toy(10)
    turns = QUICK.turns(examples, None)
    assert len(turns) == 3
    assert sorted(e.id for t in turns for e in t.held_out) == sorted(e.id for e in examples)
    for turn in turns:
        assert {e.id for e in turn.examples} == {e.id for e in examples} - {e.id for e in turn.held_out}


def test_examples_are_held_out_once_if_asked() -> None:
    (turn,) = replace(QUICK, validation=0.25).turns(toy(8), None)
    assert (len(turn.examples), len(turn.held_out)) == (6, 2)
    (turn,) = QUICK.turns(toy(8), toy(3, 1))
    assert (len(turn.examples), len(turn.held_out)) == (8, 3)


def test_all_examples_teach_in_the_end(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run for each part held out, which sees the others alone, and one on all, as long as was best."""
    looks_as(monkeypatch, change)
    seen: list[tuple[list[str], int]] = []
    step = Learner.step

    def spy(self: Learner) -> float:
        if self.done == 0:
            seen.append((sorted(e.id for e in self.examples), 0))
        seen[-1] = seen[-1][0], self.done + 1
        return step(self)

    monkeypatch.setattr(Learner, "step", spy)
    examples = toy(6)
    adapter = fit(scorer(pipe), examples, config=QUICK, prompt=PROMPT)
    turns = QUICK.turns(examples, None)
    everything = sorted(e.id for e in examples)
    assert [names for names, _ in seen] == [*(sorted(e.id for e in t.examples) for t in turns), everything]
    assert [steps for _, steps in seen] == [4, 4, 4, 4]
    training = adapter.training
    assert (training["examples"], training["validation_examples"], training["turns"]) == (6, 6, 3)
    assert [p["step"] for p in training["curve"]] == [0, 2, 4]
    assert training["calibration"]["held_out"] == 6


def test_a_rule_is_learned_without_validation_examples(pipe: Pipe) -> None:
    """And its probabilities on pictures that were never seen are as sure as held-out examples had it."""
    made = scorer(pipe)
    config = replace(QUICK, steps=20, batch=8, check_every=4, learning_rate=3e-2)
    adapter = fit(made, toy(16), config=config, prompt=PromptConfig(rank=4))
    assert adapter.training["kept"]
    assert adapter.training["validation"]["after"] > 0.8
    fresh = toy(30, 5)
    scores = np.stack([made.predict(e.pairs) for e in fresh])
    assert np.mean([s.argmax() == e.positives[0][1] for s, e in zip(scores, fresh, strict=True)]) > 0.8


def test_shuffled_labels_give_chance(pipe: Pipe) -> None:
    """No leakage from what is held out into what is learned: held-out accuracy stays near a half."""
    found = []
    for seed in range(3):
        examples = toy(16, seed, shuffled=True)
        config = replace(QUICK, steps=12, check_every=12, learning_rate=3e-2, seed=seed)
        curve = fit(scorer(pipe), examples, config=config, prompt=PromptConfig(rank=4)).training["curve"]
        found.append(curve[-1]["accuracy"])
    assert 0.25 < np.mean(found) < 0.75


# Shared work


def gradients(pipe: Pipe, config: FitConfig, score: ScoreConfig) -> dict[str, torch.Tensor]:
    """Of the second step, for in the first most are zero."""
    made = scorer(pipe, score)
    prompts.attach(made.backbone.denoiser, IN_TEXT, config.seed)
    with checkpointed(made.backbone.denoiser, config.gradient_checkpointing):
        learner = Learner(made, toy(6), config, Team())
        learner.step()
        learner.step()
    named = prompts.parameters(made.backbone.denoiser)
    return {name: p.grad for name, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("kind", ["attention", "denoising"])
@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 3}, {"gradient_checkpointing": True}], ids=str)
def test_what_saves_memory_changes_nothing(pipe: Pipe, options: dict[str, Any], kind: str) -> None:
    """Up to rounding, which the small differences between a random model's scores make a thousandth of."""
    score = ScoreConfig(kind, SCORE.timesteps)
    plain = gradients(pipe, QUICK, score)
    saving = gradients(pipe, replace(QUICK, **options), score)
    assert plain.keys() == saving.keys()
    largest = max(float(g.abs().max()) for g in plain.values())
    assert largest > 0
    assert max(float((plain[n] - saving[n]).abs().max()) for n in plain) < 0.01 * largest


@pytest.mark.parametrize(("rows", "expected"), [(256, [4]), (8, [2, 2]), (3, [1, 1, 1, 1])])
def test_a_batch_goes_in_parts_that_fit(pipe: Pipe, rows: int, expected: list[int]) -> None:
    made = Scorer(load_backbone(pipe()), SCORE, batch_size=rows)
    prompts.attach(made.backbone.denoiser, IN_TEXT)
    learner = Learner(made, [replace(e, texts=(f"{i}", f"no {i}")) for i, e in enumerate(toy(6))], QUICK, Team())
    batch = [("", learner._draw(i, 0)) for i in range(4)]  # four rows each: two of its own, one text, one picture
    assert [len(part) for part in learner._parts(batch)] == expected


def test_learning_with_little_memory(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts get smaller until they fit, and the step is the same; where one example is too much, it says so."""
    made = Scorer(load_backbone(pipe()), SCORE, batch_size=8)
    prompts.attach(made.backbone.denoiser, IN_TEXT)
    room, predict = 4, made.backbone.predict_noise

    def tight(noised: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(noised) > room:
            raise torch.OutOfMemoryError("out of memory")
        return predict(noised, *rest)

    monkeypatch.setattr(made.backbone, "predict_noise", tight)
    learner = Learner(made, toy(6), replace(QUICK, negatives=0, image_negatives=0), Team())
    loss = learner.step()
    assert made.batch_size == 4
    plenty = Scorer(load_backbone(pipe()), SCORE)
    prompts.attach(plenty.backbone.denoiser, IN_TEXT)
    same = Learner(plenty, toy(6), replace(QUICK, negatives=0, image_negatives=0), Team()).step()
    assert loss == pytest.approx(same, rel=1e-3)
    room = 1
    with pytest.raises(ModelError, match="too little memory to learn from 1 examples at once"):
        learner.step()


def test_a_model_that_cannot_compute_again() -> None:
    with pytest.raises(ModelError, match="leave that option out"), checkpointed(torch.nn.Linear(1, 1), True):
        pass


def write(folder: Path, examples: Sequence[Example]) -> Path:
    """A manifest of examples of one picture."""
    lines = []
    for e in examples:
        Image.Image.save(e.images[0], folder / f"{e.id}.png")  # type: ignore[arg-type]
        positives = [list(p) for p in e.positives]
        lines.append({"id": e.id, "images": [f"{e.id}.png"], "texts": list(e.texts), "positives": positives})
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def launched(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment of one of several processes, as a launcher makes it."""
    found = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        found |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return found


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


RANKED = """
import os, sys
from pathlib import Path

from dsd.cli import main

if __name__ == "__main__":
    Path(__file__).with_name(f"rank-{os.environ.get('RANK', '0')}").touch()  # who took part
    sys.exit(main())
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """On the CPU, where `accelerate launch` starts but one; an odd batch, so that one has more to do.

    A random model would not do: rounding is a thousandth of the differences between its scores.
    """
    manifest = write(tmp_path, toy(15))
    script = tmp_path / "ranked.py"
    script.write_text(RANKED)
    dsd = [str(script), "fit", str(manifest), "--model", "tiny", "--device", "cpu"]
    dsd += ["--score", "attention", "--timesteps", "100", "--max-steps", "20"]
    dsd += ["--folds", "2", "--method", "prompt+tokens", "--patience", "9"]
    dsd += ["--format", "json", "--log", str(tmp_path / "log.jsonl")]
    found, port = [], free_port()
    for name, ranks in (("one", 1), ("two", 2)):
        running = [
            subprocess.Popen(
                [sys.executable, *dsd, "--out", str(tmp_path / name)],
                env=launched(rank, ranks, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        printed = [process.communicate(timeout=300) for process in running]
        assert [process.returncode for process in running] == [0] * ranks, printed
        assert [bool(out) for out, _ in printed] == [True, False][:ranks]
        found.append((json.loads(printed[0][0]), Adapter.load(tmp_path / name)))
        assert {path.name for path in tmp_path.glob("rank-*")} == {"rank-0", *(["rank-1"] if name == "two" else [])}
    (one, first), (two, second) = found
    assert one["kept"]
    assert two["kept"]
    assert gap(first, second) < 1e-4
    assert [p["loss"] for p in one["curve"]] == pytest.approx([p["loss"] for p in two["curve"]], abs=1e-4)
    runs = [json.loads(line)["run"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [runs.count(k) for k in (1, 2)] == [20, 20]
    # and then all examples, for as long as was best for those held out
    assert runs.count(3) == max(two["curve"], key=lambda p: (p["accuracy"], -p["loss"]))["step"]
    assert not list(tmp_path.glob("*.checkpoint"))


def test_mixed_precision_that_needs_scaling_is_refused() -> None:
    class Half:
        mixed_precision, num_processes, process_index = "fp16", 1, 0

    with pytest.raises(OptionError, match="expected no or bf16"):
        Team(Half())  # type: ignore[arg-type]


# Stops


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "denoising"])
def test_killed_fits_go_on(pipe: Pipe, tmp_path: Path, kind: str) -> None:
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run(
        [sys.executable, str(script), pipe(), str(tmp_path), "3", kind], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["same"], found["kept"]) == (3, True)
    assert max(found["killed_after"]) > 0


def test_a_fit_stopped_in_its_last_run_goes_on(pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks_as(monkeypatch, change)
    whole = fit(scorer(pipe), toy(6), config=QUICK, prompt=PROMPT, log=tmp_path / "whole.jsonl")
    given: dict[str, Any] = {
        "config": QUICK,
        "prompt": PROMPT,
        "checkpoint": tmp_path / "c",
        "log": tmp_path / "l.jsonl",
    }
    step, taken = Learner.step, 0

    def until(self: Learner) -> float:
        nonlocal taken
        if taken == 3 * 4 + 3:
            raise KeyboardInterrupt
        taken += 1
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", until)
        with pytest.raises(KeyboardInterrupt):
            fit(scorer(pipe), toy(6), **given)
    assert len((tmp_path / "l.jsonl").read_text().splitlines()) == 15
    again = fit(scorer(pipe), toy(6), **given, resume=True)
    assert gap(whole, again) == 0
    assert again.training == whole.training
    assert (tmp_path / "l.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


# Logs


def test_log_has_every_step(pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks_as(monkeypatch, change)
    log = tmp_path / "new" / "log.jsonl"
    log.parent.mkdir()
    log.write_text('{"of another": "fit"}\n')
    fit(scorer(pipe), toy(6), config=QUICK, prompt=PROMPT, log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["run"], line["step"]) for line in lines] == [(run, s) for run in (1, 2, 3, 4) for s in (1, 2, 3, 4)]
    assert {"run", "step", "loss", "learning_rate", "gradient_norm"} == set(lines[0])
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_log_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"run": 1, "step": 1}\n{"run": 1, "step": 2}\n{"run": 1, "st')
    Log(path, 1, 1).write(2, loss=0.5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_log_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot be written"):
        Log(tmp_path / "file" / "log.jsonl", 1, 0)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(OptionError, match="pip install tensorboard"):
        Log(tmp_path / "board", 1, 0)


# Soft tokens


def check_on_disk(pipe: Pipe, adapter: Adapter, made: Scorer, example: Example, folder: Path, text: str) -> None:
    """An adapter of ``made`` scores the same once it was loaded, and is refused as a LoRA for what is in the text."""
    again = Adapter.load(adapter.save(folder / "a"))
    fresh = load_backbone(pipe())
    again.attach(fresh)
    found = Scorer(fresh, again.score, weights=again.weights).predict(example.pairs)
    assert np.array_equal(found, made.predict(example.pairs))
    with pytest.raises(AdapterError, match=text):
        again.export(folder / "lora")


def test_tokens_join_every_caption(pipe: Pipe) -> None:
    made = scorer(pipe)
    pairs = toy(1)[0].pairs
    bare, before = made.predict(pairs), fingerprint(made.backbone)
    prompts.attach(made.backbone.denoiser, PromptConfig(tokens=3, projections=()))
    assert list(prompts.parameters(made.backbone.denoiser)) == [prompts.TOKENS]
    assert fingerprint(made.backbone) == before
    states = prompts.prompted(made.backbone.denoiser, made.texts(["cat"])[0])
    plain = made.texts(["cat"])[0]
    assert states.states.shape[1] == plain.states.shape[1] + 3
    assert torch.equal(states.states[:, :-3], plain.states)
    assert states.own.sum() == plain.own.sum() + 3
    assert states.words == plain.words
    with_tokens = made.predict(pairs)
    assert np.abs(with_tokens - bare).max() > 1e-3
    alone = np.concatenate([made.predict([pair]) for pair in pairs])
    assert np.abs(with_tokens - alone).max() < 1e-5
    with prompts.disabled(made.backbone.denoiser):
        assert np.array_equal(made.predict(pairs), bare)
    prompts.detach(made.backbone.denoiser)
    assert np.array_equal(made.predict(pairs), bare)
    assert not hasattr(made.backbone.denoiser, prompts.TOKENS)


class Ranked(NamedTuple):
    rank: tuple[float, ...]


@pytest.mark.parametrize("method", ["tokens", "prompt+tokens", "prompt+tokens+heads", "prompt+tokens+weights"])
def test_tokens_survive_the_disk(pipe: Pipe, tmp_path: Path, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        looks_as(patch, change)
        patch.setattr(weighing.Weighed, "judged_by", lambda self, _: Ranked((float(self.adapter.prompts is not None),)))
        made = scorer(pipe)
        adapter = fit(made, toy(8), config=replace(QUICK, method=method, draws=1), prompt=PromptConfig(rank=2))
    assert adapter.prompts is not None
    assert adapter.prompts.tokens == adapt.SOFT_TOKENS
    assert len(adapter.state[prompts.TOKENS]) == adapt.SOFT_TOKENS
    assert (len(adapter.state) == 1) == (method == "tokens")
    check_on_disk(pipe, adapter, made, toy(1, 9)[0], tmp_path, "soft tokens")


def test_tokens_of_another_width_are_refused(pipe: Pipe) -> None:
    adapter = Adapter(None, SCORE, PromptConfig(tokens=2, projections=()), {prompts.TOKENS: torch.zeros(2, 7)})
    backbone = load_backbone(pipe())
    with pytest.raises(AdapterError, match="got shape"):
        adapter.attach(backbone)
    assert not prompts.parameters(backbone.denoiser)


# Words

NEW = ("grue", "bleen")


def named(count: int, seed: int = 0) -> list[Example]:
    """As toys, in words that say nothing of colours."""
    return [replace(e, texts=tuple(f"a {word} square" for word in NEW)) for e in toy(count, seed)]


@pytest.mark.parametrize("method", ["words", "prompt+words", "words+heads", "words+weights"])
def test_words_learn_what_they_mean(pipe: Pipe, tmp_path: Path, method: str) -> None:
    config = FitConfig(method, steps=30, batch=8, check_every=15, folds=2, learning_rate=0.02, jitter=10, draws=1)
    made = scorer(pipe)
    adapter = fit(made, named(16), config=config, prompt=PromptConfig(rank=2, words=NEW))
    assert adapter.prompts is not None
    assert adapter.prompts.words == NEW
    learned = {f"{prompts.WORDS}.{word}" for word in NEW}
    assert learned <= adapter.state.keys()
    assert (learned == adapter.state.keys()) == ("prompt" not in method)
    right = [int(np.argmax(made.predict(e.pairs))) == e.positives[0][1] for e in named(20, 7)]
    assert np.mean(right) > 0.9
    check_on_disk(pipe, adapter, made, named(1, 9)[0], tmp_path, "learned words")


def test_other_words_stay_as_they_are(pipe: Pipe) -> None:
    """Nothing is learned in steps in which none of the words is said."""
    made = scorer(pipe)
    prompts.attach(made.backbone.denoiser, PromptConfig(projections=(), words=("grue",)))
    config = replace(QUICK, method="words", steps=8, batch=1, negatives=0, image_negatives=0)
    config = replace(config, temperature=100)  # no choice is won yet
    learner = Learner(made, [*toy(7), *named(1, 3)], config, Team())
    changed = []
    for _ in range(8):
        before = prompts.state(made.backbone.denoiser)["soft_words.grue"]
        learner.step()
        changed.append(not torch.equal(prompts.state(made.backbone.denoiser)["soft_words.grue"], before))
    assert sum(changed) == 1


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("prompt", NEW, "got method 'prompt' and grue, bleen to learn"),
        ("prompt+words", (), "got method 'prompt.words' and no words"),
        ("words", ("grue", "mauve"), "got mauve to learn, which no caption has"),
    ],
)
def test_words_that_cannot_be_learned(pipe: Pipe, method: str, words: tuple[str, ...], message: str) -> None:
    made = scorer(pipe)
    with pytest.raises(OptionError, match=message):
        fit(made, named(4), config=replace(QUICK, method=method), prompt=PromptConfig(words=words))
    assert not prompts.parameters(made.backbone.denoiser)


@pytest.mark.parametrize("method", ["", "weights+prompt", "heads+weights", "prompt+prompt", "prompt+", "magic"])
def test_methods_that_there_are_not(method: str) -> None:
    with pytest.raises(OptionError, match="several in this order"):
        FitConfig(method)


# Negatives


def test_pictures_of_others_join_as_wrong(pipe: Pipe) -> None:
    examples = [replace(e, texts=(f"text {i}", f"wrong {i}")) for i, e in enumerate(toy(6))]
    drawn = Negatives(examples, 1, 2, 0).join(2, random.Random(0))
    right = examples[2].texts[examples[2].positives[0][1]]
    own, text_choice, image_choice = drawn.choices
    assert own.rows == (0, 1)
    assert [drawn.images[r] for r in text_choice.rows] == [(2, 0), (2, 0)]
    assert [drawn.texts[r] for r in image_choice.rows] == [right] * 3
    assert all(drawn.images[r][0] != 2 for r in image_choice.rows[1:])
    assert image_choice.right == (True, False, False)


def test_what_is_right_of_the_same_picture_is_no_swap() -> None:
    shown = toy(1)[0].images
    said = ("a red dog chases a cat", "a red cat chases a dog", "a fox")
    chases, chased = (Example(f"{k}", shown, (said[k], said[2]), ((0, 0),)) for k in (0, 1))
    seen = ("a red dog sees a cat", "a red cat sees a dog")
    others = [replace(e, texts=(text, "a fox")) for e, text in zip(toy(2, 1), seen, strict=True)]
    for seed in range(20):
        assert said[1] not in Negatives([chases, chased, *others], 0, 0, 3).join(0, random.Random(seed)).texts
    assert any(
        said[1] in Negatives([chases, *others], 0, 0, 3).join(0, random.Random(seed)).texts for seed in range(20)
    )


def test_pictures_that_share_a_caption_are_no_negatives() -> None:
    assert len(Negatives(toy(6), 0, 2, 0).join(0, random.Random(0)).choices) == 1


def test_examples_that_share_a_picture_lend_no_negatives() -> None:
    """What another says of the same picture may be right of it."""
    one, other = picture(1), picture(2)
    first = Example("first", (one,), ("a dog", "a cat"), ((0, 0),))
    second = Example("second", (one.copy(), other), ("a red ball", "a blue ball"), ((0, 0), (1, 0)))
    for rng in (random.Random(k) for k in range(20)):
        drawn = Negatives([first, second, *toy(2)], 2, 2, 0).join(0, rng)
        assert not {"a red ball", "a blue ball"} & set(drawn.texts)
        assert all(i != 1 for i, _ in drawn.images)
    alone = Negatives([first, second], 1, 1, 0).join(0, random.Random(0))
    assert alone.texts == first.texts


@given(st.lists(st.integers(0, 30), max_size=12, unique=True), st.integers(0, 2**32))
def test_a_pool_without_some_is_drawn_from_as_a_copy_would_be(places: list[int], seed: int) -> None:
    whole = list(range(100, 131))
    copied = [x for i, x in enumerate(whole) if i not in places]
    seen = _Without(whole, places)
    assert list(seen) == copied == seen[:]
    assert seen[-1] == copied[-1]
    count = min(3, len(copied))
    assert random.Random(seed).sample(seen, count) == random.Random(seed).sample(copied, count)
    with pytest.raises(IndexError):
        seen[len(copied)]


def test_examples_that_ask_in_one_direction_get_a_negative_of_each_kind() -> None:
    def rows(*shape: int, right: tuple[tuple[int, int], ...]) -> int:
        """How many pairs a first example of so many images and texts brings to a step."""
        images, texts = shape
        first = Example("a", tuple(picture(k) for k in range(images)), tuple("abcd"[:texts]), right)
        drawn = Negatives([first, *toy(4)], None, None, 0).join(0, random.Random(0))
        assert len(drawn.images) == len(drawn.texts)
        return len(drawn.texts)

    assert rows(2, 1, right=((0, 0),)) == 2 + 1 + 1
    assert rows(1, 2, right=((0, 0),)) == 2 + 1 + 1
    assert rows(2, 1, right=((0, 0), (1, 0))) == 2 + 2 + 2
    assert rows(2, 2, right=((0, 0), (1, 1))) == 4
    # the second picture has no caption, so that nothing is asked of it
    assert rows(2, 2, right=((0, 0), (0, 1))) == 4 + 2 + 2


def test_some_of_many_candidates_take_part() -> None:
    """The right ones always, others anew each time, and every choice among those that take part."""
    texts = tuple(f"text {k}" for k in range(10))
    pictures = tuple(picture(k) for k in range(3))
    examples = [Example("a", pictures, texts, ((1, 6), (2, 0)))]
    negatives = Negatives(examples, 0, 0, 0, candidates=4)
    seen: set[str] = set()
    for seed in range(20):
        drawn = negatives.join(0, random.Random(seed))
        assert len(drawn.texts) == 3 * 4
        said = drawn.texts[:4]
        assert {"text 6", "text 0"} <= set(said)
        assert drawn.texts == said * 3
        assert [k for _, k in drawn.images] == [0] * 4 + [1] * 4 + [2] * 4
        for choice in drawn.choices:
            found = [(drawn.images[r][1], drawn.texts[r]) for r in choice.rows]
            assert choice.right == tuple(pair in {(1, "text 6"), (2, "text 0")} for pair in found)
        seen |= set(said)
    assert seen == set(texts)
    assert len(Negatives(examples, 0, 0, 0).join(0, random.Random(0)).texts) == 30


def test_the_empty_caption_is_passed_once_an_image(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    made = scorer(pipe, ScoreConfig("denoising", SCORE.timesteps))
    predict = made.backbone.predict_noise

    def count(noised: torch.Tensor, timesteps: torch.Tensor, text: TextStates) -> torch.Tensor:
        rows.append(len(noised))
        return predict(noised, timesteps, text)

    monkeypatch.setattr(made.backbone, "predict_noise", count)
    prompts.attach(made.backbone.denoiser, PromptConfig(rank=1))
    examples = [Example(str(i), (picture(i),), ("a", "b", "c"), ((0, 0),)) for i in range(2)]
    Learner(made, examples, replace(QUICK, batch=2, negatives=0, image_negatives=0), Team()).step()
    prompts.detach(made.backbone.denoiser)
    assert sum(rows) == 2 * (2 * 3 + 2)  # to measure the spread, and to learn


# What is taught


def test_attention_is_taught_along_with_denoising(pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If asked for, in units of its spread; the zero-shot score that it must beat is denoising alone."""
    zero = ScoreConfig("denoising", SCORE.timesteps)
    examples, made = toy(12), scorer(pipe, zero)
    pairs = [pair for e in examples for pair in e.pairs]
    attention = Scorer(made.backbone, SCORE).predict(pairs).reshape(-1, 2)
    denoising = made.predict(pairs).reshape(-1, 2)
    first: list[np.ndarray] = []

    def look(scorer: Scorer) -> float:
        first.append(scorer.predict(pairs))
        return change(scorer)

    with monkeypatch.context() as patch:
        looks_as(patch, look)
        adapter = fit(made, examples, config=replace(QUICK, validation=0.5, mix=("attention",)))
    assert np.array_equal(first[0].reshape(-1, 2), denoising)
    assert adapter.score.kind == "mixture"
    assert adapter.score.weights is not None
    spreads = [np.sqrt(np.mean((s - s.mean(1, keepdims=True)) ** 2)) for s in (denoising, attention)]
    assert adapter.score.weights["denoising"] == 1
    assert adapter.score.weights["attention"] == pytest.approx(spreads[0] / spreads[1], rel=1e-3)
    again = Adapter.load(adapter.save(tmp_path / "a"))
    fresh = load_backbone(pipe())
    again.attach(fresh)
    assert np.array_equal(Scorer(fresh, again.score).predict(pairs), made.predict(pairs))


def test_denoising_is_added_as_it_is_without_prompts(
    pipe: Pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default: attention is taught by itself, in fewer passes, and the bare model's denoising score joins it."""
    zero = ScoreConfig("denoising", (200, 500, 800))
    examples, made = toy(12), scorer(pipe, zero)
    pairs = [pair for e in examples for pair in e.pairs]
    bare = made.predict(pairs)
    with monkeypatch.context() as patch:
        looks_as(patch, change)
        adapter = fit(made, examples, config=replace(QUICK, validation=0.5))
    assert adapter.training["kept"]
    assert adapter.score == replace(
        zero, kind="attention", timesteps=(200, 800), bare=zero, bare_weight=adapter.score.bare_weight
    )
    assert adapter.score.passes == 5
    assert adapter.score.bare_weight > 0
    attached = load_backbone(pipe())
    adapter.attach(attached)
    taught = Scorer(attached, ScoreConfig("attention", (200, 800))).predict(pairs)
    assert float(np.abs(taught - Scorer(load_backbone(pipe()), made.score.config).predict(pairs)).max()) > 1e-4
    assert np.allclose(made.predict(pairs), taught + adapter.score.bare_weight * bare, atol=1e-4)
    assert np.array_equal(made.predict_parts(pairs)[1]["bare denoising"], bare)
    again = Matcher.from_pretrained(pipe(), adapter=adapter.save(tmp_path / "a"))
    assert again.score_config == adapter.score
    assert np.array_equal(again.predict(pairs), made.predict(pairs))
    assert np.array_equal(again.forget().predict(pairs), bare)


def test_a_bare_score_is_a_zero_shot_one() -> None:
    zero = ScoreConfig("denoising", (200, 500))
    both = ScoreConfig("attention", (200,), bare=zero, bare_weight=2.0)
    assert ScoreConfig.from_dict(json.loads(json.dumps(both.to_dict()))) == both
    assert (both.passes, both.empty_passes, zero.passes, zero.empty_passes) == (3, 2, 2, 2)
    assert "bare_weight" not in zero.to_dict()
    with pytest.raises(OptionError, match="zero-shot"):
        ScoreConfig("attention", (200,), bare=both)


def test_what_is_taught_can_be_chosen(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    looks_as(monkeypatch, change)
    zero = ScoreConfig("denoising", SCORE.timesteps)
    config = replace(QUICK, validation=0.5)
    assert fit(scorer(pipe, zero), toy(12), config=replace(config, mix=())).score == zero
    assert fit(scorer(pipe), toy(12), config=config).score == SCORE
    made = fit(scorer(pipe), toy(12), config=replace(config, mix=("attention-mass",), method="prompt+heads"))
    assert made.score.kind == "weighted"
    with pytest.raises(OptionError, match="to mix"):
        FitConfig(mix=("nonesuch",))
