"""Visual question answering as matching: He et al.'s files, and VQAv2's own with the owners' soft accuracy.

The soft accuracy of an answer is ``min(n / 3, 1)`` for the ``n`` of nine people who gave it, averaged over leaving out
each of the ten who were asked (Antol et al. 2015, Goyal et al. 2017).
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from dsd.contracts import OptionError
from dsd.tasks.files import Row, read_csv, read_json, read_lines, row, text
from dsd.tasks.manifest import Where, show
from dsd.tasks.reading import Reading, draw, plain
from dsd.tasks.retrieval import Caption, choose

_NEGATIVES = tuple(f"neg_sentence_{k}" for k in range(1, 10))
_STATEMENT = re.compile(r"([^*]+)\*The question is asking about (yes or no|others|numbers): (.*)")
_PEOPLE = 10
_YES_NO = ("yes", "no")
_POPULAR = 10
"""Wrong answers are drawn from so many times as many of the most given ones."""

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)
_CONTRACTIONS = {
    word[:k] + word[k + 1 :]: word for word in _APOSTROPHES.split() for k, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}
"""Of each word that lacks one of its apostrophes, the word; the last is the owners' slip, kept for the same figures."""


def vqa_other(reading: Reading) -> None:
    """A COCO image and a question with its answer, among nine with other answers (He et al. 2023).

    Tags say what is asked for, going by the right answer.
    """
    (path,) = reading.files
    part = "train" if reading.split == "train" else "val"
    for number, entry in enumerate(read_csv(path, ("sentence", "pos_image_id", *_NEGATIVES)), 1):
        right = entry.text("sentence")
        image = reading.image(entry.where, _coco(part, entry.whole("pos_image_id")))
        texts = [right, *(entry.text(key) for key in _NEGATIVES)]
        answer = right.rpartition("?")[2].strip().lower()
        kind = "yes/no" if answer in _YES_NO else "number" if answer.isdigit() else "other"
        reading.add(entry.where, str(number), [image], texts, [(0, 0)], [kind])


def vqa_binary(reading: Reading, seed: int, candidates: int) -> None:
    """A yes-no question with its answer as a statement, and a COCO image among others (He et al. 2023)."""
    (path,) = reading.files
    found: list[Caption] = []
    for where, line in read_lines(path):
        match = _STATEMENT.fullmatch(line.strip())
        if match is None:
            where.fail(show(line), "IMAGE*The question is asking about KIND: TEXT", "download the file again")
        image, kind, said = match.groups()
        if kind == "yes or no":
            found.append(Caption(where, str(where.line), image, text(where, said, "text")))
    choose(reading, found, "image", seed, candidates)


def vqa_v2(reading: Reading, seed: int, candidates: int) -> None:
    """A COCO image and a question with several answers, whose credits are the owners' soft accuracies.

    A yes-no question has these two answers. Another has the one that most people gave, and wrong ones that nobody gave,
    drawn from those that are most given to questions which begin alike, or else to those of the same answer type.
    """
    if candidates < 2:
        raise OptionError(f"got {candidates} candidates, expected at least 2")
    asked, told = (Where(str(path)) for path in reading.files)
    questions: dict[int, Row] = {}
    for question in row(asked, read_json(reading.files[0])).rows("questions"):
        number = question.whole("question_id")
        if number in questions:
            question.where.fail(f"question_id {number} again", "each once", "remove one of them")
        questions[number] = question
    entries = row(told, read_json(reading.files[1])).rows("annotations")
    popular = _popular(entries, candidates * _POPULAR)
    for entry in entries:
        number, kind, begins = entry.whole("question_id"), entry.text("answer_type"), entry.text("question_type")
        if number not in questions:
            entry.where.fail(f"question_id {number}", "one of the questions' file", "take both files of one split")
        if entry.whole("image_id") != questions[number].whole("image_id"):
            entry.where.fail("another image than the question's", "the same", "take both files of one split")
        people = [answer.text("answer") for answer in entry.rows("answers")]
        if len(people) != _PEOPLE:
            entry.where.fail(f"{len(people)} answers", f"{_PEOPLE}", "download the file again")
        answers = list(_YES_NO)
        if kind != "yes/no":
            best = entry.text("multiple_choice_answer")
            rng = random.Random(f"{reading.name} {reading.split} {seed} {number}")
            taken = {normalise(answer) for answer in (*people, best)}
            answers = [best]
            for pool in (popular[kind, begins], popular[kind, ""]):
                answers += draw(rng, pool, candidates - len(answers), normalise, taken)
                taken.update(map(normalise, answers))
            if len(answers) < candidates:
                entry.where.fail(f"{len(answers)} candidates", f"{candidates}", "ask for fewer candidates")
        credit = [soft_accuracy(answer, people) for answer in answers]
        if not max(credit):
            reading.leave_out(entry.where, "none of its candidates was given by anyone", str(number))
            continue
        asks = questions[number].text("question")
        reading.add(
            entry.where,
            str(number),
            [reading.image(entry.where, _coco(reading.split, entry.whole("image_id")))],
            [f"{asks} {answer}" for answer in answers],
            [(0, t) for t, worth in enumerate(credit) if worth == max(credit)],
            [kind, begins],
            credit,
        )


def normalise(answer: str) -> str:
    """An answer as VQAv2's evaluation compares it: punctuation, capitals, articles, number words, lost apostrophes.

    As the owners' code has it: a mark is dropped where it touches a space anywhere, or where digits hold a comma, and
    else becomes a space; a full stop goes unless a digit follows.
    """
    kept = answer.replace("\n", " ").replace("\t", " ").strip()
    thousands = re.search(r"\d,\d", kept) is not None
    out = kept
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if thousands or f"{mark} " in kept or f" {mark}" in kept else " ")
    words = (_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", out).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """What an answer is worth, 0..1, by the answers that people gave; normalised where those differ, as is theirs.

    Args:
        people: One answer each, two or more.
    """
    given = [other.replace("\n", " ").replace("\t", " ").strip() for other in people]
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    if len(set(given)) > 1:
        answer, given = normalise(answer), [normalise(other) for other in given]
    same = given.count(answer)
    return sum(min(1.0, (same - (other == answer)) / 3) for other in given) / len(given)


def _popular(entries: Sequence[Row], count: int) -> Mapping[tuple[str, str], list[str]]:
    """The answers most given, by answer type and how the question begins, and by answer type alone ("")."""
    counts: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for entry in entries:
        best = entry.text("multiple_choice_answer")
        if plain(best):
            kind = entry.text("answer_type")
            counts[kind, entry.text("question_type")][best] += 1
            counts[kind, ""][best] += 1
    ordered = {
        key: [answer for answer, _ in sorted(found.items(), key=lambda item: (-item[1], item[0]))[:count]]
        for key, found in counts.items()
    }
    return defaultdict(list, ordered)


def _coco(part: str, number: int) -> str:
    return f"COCO_{part}2014_{number:012d}.jpg"
