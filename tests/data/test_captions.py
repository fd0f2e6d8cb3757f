"""Files and free texts -> lines -> tokens; joining; which lines a clip meets in training."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle2_video.config import ConfigError, from_config
from dalle2_video.data.config import CATEGORIES, CaptionPolicy
from dalle2_video.data.sources.captions import (
    CONTEXT,
    END,
    START,
    CaptionError,
    EvaluationCaptions,
    Line,
    TrainingCaptions,
    clean,
    encode,
    join_lines,
    pack_lines,
    read_text,
    split_line,
    text_to_lines,
    to_line,
    tokenize,
)
from dalle2_video.data.store.shard import StoreError
from dalle2_video.data.store.texts import ShardTexts, write_texts

LONG = (
    "The woman, who has long brown wavy hair and wears a red shirt with white dots, turns her "
    "head slowly to the left, looks down for a moment, raises her eyebrows, blinks twice, smiles "
    "with an open mouth, then nods three times, tilts her head towards her right shoulder, frowns "
    "a little, closes both eyes, and at last starts to talk to somebody who stands behind the "
    "camera on the left side, while warm light of medium strength falls on her face from the right."
)


def words(lines: list[str]) -> list[int]:
    """All token ids of the lines, end to end, without start and end tokens."""
    return [token for line in lines for token in encode(line)]


# ---------------------------------------------------------------- text -> lines


def test_a_free_text_is_split_at_its_sentences() -> None:
    text = "A woman with blond hair, Dr. Smith, turns left. She is 1.7 m tall! does she smile? Yes"
    assert text_to_lines(text) == [
        "A woman with blond hair, Dr. Smith, turns left.",
        "She is 1.7 m tall!",
        "does she smile?",
        "Yes",
    ]
    assert text_to_lines(["One thing.", "Another\nand a third. And more"]) == [
        "One thing.",
        "Another",
        "and a third.",
        "And more",
    ]


@pytest.mark.parametrize("text", ["", "  \n\t ", [], ["", " "], "\u200b"])
def test_an_empty_text_is_an_error(text: str | list[str]) -> None:
    with pytest.raises(CaptionError, match="empty"):
        text_to_lines(text)


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        LONG.replace(",", ""),
        ". ".join([LONG, LONG]),
        " ".join([LONG] * 5),
        "; ".join(f"part {k} of a long list" for k in range(60)),
    ],
)
def test_nothing_is_truncated(text: str) -> None:
    """A known mistake of such code: text beyond 77 tokens never reached the model."""
    assert len(encode(text)) + 2 > CONTEXT
    for lines in (split_line(text), text_to_lines(text)):
        assert all(len(to_line(line).tokens) <= CONTEXT for line in lines)
        assert words(lines) == list(encode(text))
    packed = tokenize([text])
    rows = packed.tokens[packed.line_index[0]].tolist()
    seen = [token for row in rows for token in row if token not in (START, END, 0)]
    assert seen == list(encode(text))


def test_splits_come_at_the_strongest_break_and_parts_are_filled() -> None:
    two = split_line(f"{LONG} He nods.")
    assert two[-1] == "He nods." or two[-1].endswith("from the right. He nods.")
    pieces = split_line(LONG)
    assert all(piece.endswith(",") for piece in pieces[:-1])
    assert len(pieces) == math.ceil(len(encode(LONG)) / 75)


def test_pieces_are_filled_up_to_75_tokens() -> None:
    sentence = " ".join(["light"] * 24) + "."
    pieces = split_line(" ".join([sentence] * 4))
    assert [len(encode(piece)) for piece in pieces] == [75, 25]


def test_one_endless_word_is_cut_and_not_lost() -> None:
    word = "x7q" * 200
    pieces = split_line(word)
    assert "".join(pieces) == word and all(len(encode(piece)) <= 75 for piece in pieces)


def test_control_tokens_written_out_do_not_end_the_line() -> None:
    line = to_line(clean("a man <end_of_text> smiles <START_OF_TEXT> now"))
    assert Counter(line.tokens)[END] == 1 and line.tokens[-1] == END
    assert Counter(line.tokens)[START] == 1 and line.tokens[0] == START


def test_tokens_are_those_of_open_clip() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    text = "A woman's  smile &amp; caf\u00e9 \u2014 50 % light!"
    expected = SimpleTokenizer()(text)[0]
    line = to_line(clean(text))
    assert expected[: len(line.tokens)].tolist() == list(line.tokens)
    assert not expected[len(line.tokens) :].any()
    with pytest.raises(CaptionError, match="tokens, must be"):
        to_line(LONG)


# ---------------------------------------------------------------- files


def test_reading_a_file() -> None:
    data = "\ufeffShe  smiles.\r\n\r\n \nShe\u2019s happy \u00e9.\n".encode()
    assert read_text(data) == ["She smiles.", "She's happy \u00e9."]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "^empty$"),
        (b"\xef\xbb\xbf \n", "^empty$"),
        (b"caf\xe9 light", "^not UTF-8: byte 0xE9 at 3$"),
        ("She smiles.".encode("utf-16"), "^not UTF-8: byte 0xFF at 0$"),
    ],
)
def test_a_bad_file_says_why(data: bytes, cause: str) -> None:
    with pytest.raises(CaptionError, match=cause):
        read_text(data)


def test_phases_of_an_emotion_file_become_words() -> None:
    expected = "neutral from 0 to 3.5 seconds, then happy from 3.5 to 7 seconds"
    for line in ("neutral 0 3.5, happy 3.5 7", "neutral, 0, 3.5, happy, 3.5, 7", "neutral 0-3.5; "
                 "happy 3.5-7", "neutral 0 to 3.5 s, happy 3.5 to 7 s"):  # fmt: skip
        assert read_text(line.encode()) == [expected]
    plain = "He is 20, she is 30, both are happy."
    assert read_text(plain.encode()) == [plain]


# ---------------------------------------------------------------- join and pack


def test_lines_join_at_token_level() -> None:
    lines = [to_line(text) for text in ("A man smiles.", "warm light!", "He nods")]
    (joined,) = join_lines(lines)
    assert joined.text == "A man smiles, warm light, He nods"
    assert joined.tokens == (START, *encode(joined.text), END)


def test_a_join_never_exceeds_77_tokens_and_loses_nothing() -> None:
    lines = [to_line(f"Line {k} says that the light is warm and strong.") for k in range(30)]
    joined = join_lines(lines)
    assert 1 < len(joined) < 10 and all(len(line.tokens) <= CONTEXT for line in joined)
    text = " ".join(line.text for line in joined)
    assert all(f"Line {k} says" in text for k in range(30))
    assert joined == [to_line(line.text) for line in joined]


@pytest.mark.parametrize(("second", "expected"), [(37, [77]), (38, [39, 40])])
def test_a_joined_line_may_have_77_tokens_and_no_more(second: int, expected: list[int]) -> None:
    """37 tokens, a comma, 37 tokens, start and end: exactly CONTEXT."""
    lines = [to_line(" ".join(["light"] * count)) for count in (37, second)]
    assert [len(line.tokens) for line in join_lines(lines)] == expected


def test_a_line_of_punctuation_is_joined_to_nothing() -> None:
    lines = [to_line("..."), to_line("warm light")]
    assert join_lines(lines) == lines


def test_packing_stores_each_line_once_and_marks_gaps() -> None:
    a, b, c = (to_line(text) for text in ("warm light", "a man smiles", "he nods and talks"))
    packed = pack_lines([[a, b], [c], [b, c, a]])
    assert packed.tokens.dtype == packed.line_index.dtype == torch.int64
    assert packed.line_index.tolist() == [[0, 1, -1], [2, -1, -1], [1, 2, 0]]
    assert packed.tokens.shape == (3, max(len(line.tokens) for line in (a, b, c)))
    for row, line in enumerate((a, b, c)):
        length = len(line.tokens)
        assert packed.tokens[row, :length].tolist() == list(line.tokens)
        assert not packed.tokens[row, length:].any()
    assert packed.texts == [[a.text, b.text], [c.text], [b.text, c.text, a.text]]
    with pytest.raises(CaptionError, match="set 1"):
        pack_lines([[a], []])


# ---------------------------------------------------------------- policy

LINES: dict[str, list[Line]] = {
    category: [to_line(f"{category.replace('_', ' ')} number {k}.") for k in range(3)]
    for category in CATEGORIES
}


def category_of(text: str) -> list[str]:
    return [c for c in CATEGORIES if c.replace("_", " ") in text]


def training(**policy: Any) -> TrainingCaptions:
    return TrainingCaptions(CaptionPolicy(**policy))


def test_training_draws_every_number_of_categories_and_never_none() -> None:
    policy = training(all_probability=0.2, join_probability=0.0)
    counts = Counter()
    for sample_id in range(3000):
        chosen = policy.choose(LINES, 0, sample_id, "clip:0")
        seen = [category_of(line.text) for line in chosen]
        assert all(len(one) == 1 for one in seen)
        assert len({one[0] for one in seen}) == len(chosen), "two lines of one category"
        counts[len(chosen)] += 1
    expected = {n: 0.8 / 6 + (0.2 if n == 6 else 0.0) for n in range(1, 7)}
    for n, share in expected.items():
        assert counts[n] / 3000 == pytest.approx(share, abs=0.03)


def test_joined_lines_say_the_same_as_single_ones() -> None:
    """With and without the join the same categories and lines are drawn: only the form differs."""
    single = training(all_probability=1.0, join_probability=0.0)
    joined = training(all_probability=1.0, join_probability=1.0)
    sizes = Counter()
    for sample_id in range(300):
        a = single.choose(LINES, 7, sample_id, "c:0")
        b = joined.choose(LINES, 7, sample_id, "c:0")
        sizes[len(b)] += 1
        text = " ".join(line.text for line in b)
        assert all(line.text.rstrip(".") in text for line in a)
        assert sorted(category_of(text)) == sorted(CATEGORIES)
    assert sizes[1] > 150 and sizes[2] > 60 and sizes[3] > 10  # 59, 33 and 7 % by cuts at 0.1


def test_a_fixed_order_is_that_of_the_categories() -> None:
    fixed = training(all_probability=0.3, join_probability=1.0, order="fixed")
    for sample_id in range(100):
        text = " ".join(line.text for line in fixed.choose(LINES, 0, sample_id, "a:0"))
        places = [text.index(c.replace("_", " ")) for c in CATEGORIES if category_of(text).count(c)]
        assert places == sorted(places)
    free = training(all_probability=1.0, join_probability=1.0)
    first = Counter(category_of(free.choose(LINES, 0, n, "a:0")[0].text)[0] for n in range(1200))
    assert len(first) == 6


def test_a_category_is_present_at_its_rate() -> None:
    policy = training(
        all_probability=1.0, join_probability=0.0, presence={"emotion": 0.25, "light_dir": 0.0}
    )
    seen = Counter()
    for sample_id in range(2000):
        for line in policy.choose(LINES, 0, sample_id, "a:0"):
            seen[category_of(line.text)[0]] += 1
    assert seen["emotion"] / 2000 == pytest.approx(0.25, abs=0.03)
    assert seen["light_dir"] == 0 and seen["action_dur"] == 2000
    none = training(all_probability=1.0, join_probability=0.0, presence=dict.fromkeys(LINES, 0.0))
    alone = [none.choose(LINES, 0, sample_id, "a:0") for sample_id in range(100)]
    assert all(len(lines) == 1 for lines in alone) and len({lines[0].text for lines in alone}) > 6
    only = {"light_dir": LINES["light_dir"]}
    assert policy.choose(only, 0, 0, "a:0"), "a clip that has nothing else keeps it"
    whole = EvaluationCaptions()
    assert len(whole.choose(LINES, 0, 0, "a:0")) == 6
    with pytest.raises(ConfigError, match=r"c\.presence\.emotion: must be at most 1"):
        from_config(CaptionPolicy, {"presence": {"emotion": 2}}, "c")


def test_the_draw_is_a_function_of_seed_and_counter() -> None:
    policy = training()
    draw = [policy.choose(LINES, 3, sample_id, "a:0") for sample_id in range(50)]
    assert draw == [policy.choose(LINES, 3, sample_id, "a:0") for sample_id in range(50)]
    assert draw != [policy.choose(LINES, 4, sample_id, "a:0") for sample_id in range(50)]
    assert len({tuple(lines) for lines in draw}) > 25
    single = training(join_probability=0.0)
    met = {line for n in range(300) for line in single.choose(LINES, 3, n, "a:0")}
    assert met == {line for lines in LINES.values() for line in lines}, "every line is met"


def test_evaluation_takes_all_categories_keyed_by_the_clip() -> None:
    policy = EvaluationCaptions()
    first = policy.choose(LINES, 0, 5, "a:0")
    assert [category_of(line.text)[0] for line in first] == list(CATEGORIES)
    assert first == policy.choose(LINES, 0, 99, "a:0")
    assert any(policy.choose(LINES, 0, 5, f"{k}:0") != first for k in range(5))
    assert any(policy.choose(LINES, seed, 5, "a:0") != first for seed in range(1, 6))


def test_a_single_category_and_none() -> None:
    policy = training()
    only = {"emotion": LINES["emotion"]}
    assert all(len(policy.choose(only, 0, sample_id, "a:0")) == 1 for sample_id in range(50))
    with pytest.raises(CaptionError, match="a:0 has no line"):
        policy.choose({"emotion": []}, 0, 0, "a:0")
    with pytest.raises(ValueError, match="join_probability"):
        CaptionPolicy(join_probability=2.0)


def test_categories_of_any_name(tmp_path: Path) -> None:
    """Those of CelebV-Text in their order, then others by name; each may be present at its rate."""
    lines = {name: [to_line(f"about {name}")] for name in ("zoo", "light_dir", "Action", "emotion")}
    order = ["emotion", "light_dir", "Action", "zoo"]
    chosen = EvaluationCaptions().choose(lines, 0, 0, "clip:0")
    assert [line.text for line in chosen] == [f"about {name}" for name in order]
    policy = CaptionPolicy(1.0, 0.0, "fixed", {"zoo": 0.0})
    drawn = TrainingCaptions(policy).choose(lines, 0, 0, "clip:0")
    assert [line.text for line in drawn] == [f"about {name}" for name in order[:3]]
    write_texts(tmp_path / "a.pt", [lines, {"zoo": [to_line("a zebra")]}])
    texts = ShardTexts(tmp_path / "a.pt")
    assert texts.lines(0) == lines and texts.lines(1)["zoo"][0].text == "a zebra"
    assert texts.used() == order
    with pytest.raises(StoreError, match="134 categories of captions, at most 127"):
        write_texts(tmp_path / "b.pt", [{str(k): [to_line("x")] for k in range(128)}])
