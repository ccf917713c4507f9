"""Hold the tokenizers to tiktoken, to a naive trainer, and to their own promises."""

import json
import pickle
import tracemalloc
from collections import Counter
from itertools import pairwise

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from llmlib import resources, tokenization
from llmlib.tokenization import GPT2_PATTERN, BPETokenizer, WordTokenizer, gpt2_tokenizer, train_bpe

ENDOFTEXT = "<|endoftext|>"
STORY = (
    "the cat sat on the mat. the cat's hat, the rat's mat; that's that.\n\n  12 cats sat, 12 rats sat.\n" * 5
)

# Few letters make many pairs that meet; whitespace of every kind; then all of Unicode but the surrogates.
dense = st.text(alphabet="aab \n\t'st1é")
spaces = st.text(alphabet=" \n\r\t\x0b\x1c\x85\xa0\u2003\u3000a.")
any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
crowded = st.lists(st.sampled_from(["<a>", "<b", "a", "b", "<", " ", "  ", "\n"])).map("".join)
texts = st.lists(
    dense | spaces | any_text | st.sampled_from([ENDOFTEXT, "Hello,", "I'll", "it's", "  "])
).map("".join)


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def reference():
    ranks = data_gym_to_mergeable_bpe_ranks(
        str(resources.path("gpt2-merges")), str(resources.path("gpt2-vocab"))
    )
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={ENDOFTEXT: 50256}
    )


@pytest.fixture(scope="module")
def trained():
    return train_bpe(STORY, 280)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(tokenization, "_CHUNK_CHARS", 3)


def naive_merges(text, n_merges, special_tokens=()):
    """Count all pairs anew before each merge."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    parts = regex.split("|".join(map(regex.escape, longest_first)), text) if special_tokens else [text]
    words = [[bytes([b]) for b in w.encode()] for part in parts for w in regex.findall(GPT2_PATTERN, part)]
    merges = []
    while len(merges) < n_merges:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


# The word tokenizer


def test_word_tokenizer_round_trip():
    tokenizer = WordTokenizer("The cat (a cat's cat) sat, well-fed.", ["<|endoftext|>"])
    text = "a cat's cat (The cat), well-fed."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert list(tokenizer.vocab) == [*sorted(tokenizer.vocab.keys() - {ENDOFTEXT}), ENDOFTEXT]
    assert list(tokenizer.vocab.values()) == list(range(len(tokenizer.vocab)))
    assert tokenizer.encode(f"cat{ENDOFTEXT}cat") == [tokenizer.vocab[w] for w in ("cat", ENDOFTEXT, "cat")]


def test_word_tokenizer_unknown_word():
    with pytest.raises(ValueError, match=r"the word 'dog' is not in the vocabulary.*<\|unk\|>"):
        WordTokenizer("a cat").encode("a dog")
    tokenizer = WordTokenizer("a cat", ["<|unk|>"])
    assert tokenizer.decode(tokenizer.encode("a dog")) == "a <|unk|>"


def test_word_tokenizer_rejects_an_unknown_id():
    with pytest.raises(ValueError, match="the ID -1 is not in the vocabulary of 2 words"):
        WordTokenizer("a cat").decode([0, -1])


# GPT-2's vocabulary, beside tiktoken


def test_gpt2_known_texts(gpt2):
    assert gpt2.encode("Akwirw ier") == [33901, 86, 343, 86, 220, 959]
    assert gpt2.encode("Hello,") == [15496, 11]
    assert gpt2.encode(f"a{ENDOFTEXT}", allowed_special={ENDOFTEXT}) == [64, 50256]
    assert gpt2.vocab_size == 50257


@settings(max_examples=400)
@given(text=texts)
def test_gpt2_equals_tiktoken(gpt2, reference, text):
    assert gpt2.encode(text) == reference.encode_ordinary(text)
    assert gpt2.encode(text, "all") == reference.encode(text, allowed_special="all")
    assert gpt2.decode(gpt2.encode(text)) == text


def test_letters_numbers_and_spaces_are_those_of_tiktoken():
    """tiktoken and regex know one version of Unicode: all of planes 0 and 1, a sample of the rest.

    Each pair is a token, so that tiktoken returns one ID exactly where its pattern keeps the pair together.
    """
    points = [*range(0x20000), *range(0x20000, 0x110000, 7)]
    characters = [chr(c) for c in points if not 0xD800 <= c < 0xE000]
    pairs = [beginning + c for beginning in "a1\n" for c in characters]
    ranks = {bytes([b]): b for b in range(256)}
    for pair in pairs:
        ranks.setdefault(pair.encode(), len(ranks))
    encoding = tiktoken.Encoding("pairs", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    pattern = regex.compile(GPT2_PATTERN)
    apart = [p for p in pairs if (len(pattern.findall(p)) == 1) != (len(encoding.encode_ordinary(p)) == 1)]
    assert not apart, (
        f"{len(apart)} pairs, the first {apart[0]!r}: pin a regex with tiktoken's version of Unicode"
    )


def test_gpt2_to_tiktoken(gpt2, reference):
    ours = gpt2.to_tiktoken()
    assert ours._mergeable_ranks == reference._mergeable_ranks
    assert ours.encode(ENDOFTEXT, allowed_special="all") == [50256]


@given(ids=st.lists(st.integers(0, 50256)))
def test_decoding_any_ids_equals_tiktoken(gpt2, reference, ids):
    assert gpt2.decode(ids) == reference.decode(ids)


def test_a_long_pretoken(gpt2, reference):
    assert gpt2.encode("ab" * 20_000) == reference.encode_ordinary("ab" * 20_000)
    assert gpt2.decode(gpt2.encode("a" * 100_000)) == "a" * 100_000


# Training


@given(text=texts, n_merges=st.integers(0, 12))
def test_training_equals_counting_anew(text, n_merges):
    assert train_bpe(text, 256 + n_merges, ()).merges == naive_merges(text, n_merges)


@given(text=st.text(alphabet="<ab> "), n_merges=st.integers(0, 12))
def test_training_never_merges_across_special_tokens(text, n_merges):
    special_tokens = ("<a>", "<a><b>", "b<")
    tokenizer = train_bpe(text, 259 + n_merges, special_tokens)
    assert tokenizer.merges == naive_merges(text, n_merges, special_tokens)


def test_ties_go_to_the_greater_pair():
    assert train_bpe("ab ac", 258, ()).merges == [(b"a", b"c"), (b"a", b"b")]
    assert train_bpe("ax axy axyy", 258, ()).merges == [(b"a", b"x"), (b"ax", b"y")]


def test_vocabulary_layout(trained):
    assert [trained.vocab[i] for i in range(256)] == [bytes([b]) for b in range(256)]
    assert trained.special_tokens == {"<pad>": 256, "<unk>": 257, "<bos>": 258, "<eos>": 259}
    assert [trained.vocab[260 + i] for i in range(20)] == [left + right for left, right in trained.merges]
    assert trained.vocab_size == 280
    assert train_bpe("aaaa", 1000, ()).vocab_size == 258  # aa, aaaa, and no pair is left


@given(text=crowded | texts, size=st.integers(1, 8), pieces=st.lists(st.integers(0, 9)))
def test_chunks_change_nothing(text, size, pieces):
    """Chunks of any size, from texts cut anywhere, hold the pre-tokens and special tokens of the whole."""
    special_tokens = ("<a>", "<a><b", "b<")

    def pretokens(chunk):
        parts = tokenization._split_at_special(chunk, special_tokens)
        split = [regex.findall(GPT2_PATTERN, part) if i % 2 == 0 else [part] for i, part in enumerate(parts)]
        return [pretoken for group in split for pretoken in group]

    cuts = sorted(i for i in pieces if i < len(text))
    blocks = [text[i:j] for i, j in pairwise([0, *cuts, len(text)])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "_CHUNK_CHARS", size)
        chunks = list(tokenization._chunks(blocks))
    assert "".join(chunks) == text
    assert [p for chunk in chunks for p in pretokens(chunk)] == pretokens(text)


def test_chunks_are_small():
    lines = [f"line {i}<eos> of a long text\n\n" for i in range(100_000)]
    chunks = list(tokenization._chunks(lines))
    assert "".join(chunks) == "".join(lines)
    assert max(map(len, chunks)) < 2 * tokenization._CHUNK_CHARS


def test_training_from_file_and_processes(tmp_path, small_chunks):
    text = STORY + "a  \n \n\r\n b<eos>  c<eos> é\n\n\n" * 20
    file = tmp_path / "text.txt"
    file.write_bytes(text.encode())
    expected = train_bpe([text], 320).merges
    assert expected == naive_merges(text, 60, ("<pad>", "<unk>", "<bos>", "<eos>"))
    assert train_bpe(file, 320).merges == expected
    assert train_bpe(text.splitlines(keepends=True), 320, n_workers=2).merges == expected


@settings(max_examples=50)
@given(text=dense, n_merges=st.integers(0, 30), other=texts)
def test_trained_tokenizer_equals_tiktoken(text, n_merges, other):
    tokenizer = train_bpe(text * 2, 260 + n_merges)
    encoding = tokenizer.to_tiktoken()
    assert tokenizer.encode(text + other) == encoding.encode_ordinary(text + other)
    assert tokenizer.decode(tokenizer.encode(text + other)) == text + other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"vocab_size": 259},
            "vocab_size=259 is too small for 256 bytes and 4 special tokens: give at least 260",
        ),
        ({"n_workers": 0}, "n_workers=0 must be at least 1"),
        ({"special_tokens": ("<a>", "<a>")}, r"distinct, not empty, and have no space: \['<a>', '<a>'\]"),
        ({"special_tokens": ("",)}, r"have no space: \[''\]"),
        ({"special_tokens": ("a b",)}, r"have no space: \['a b'\]"),
        ({"special_tokens": "<eos>"}, "special_tokens='<eos>' is one string"),
        ({"text": "ab\ud800"}, r"a lone surrogate, '\\ud800', in 'ab\\ud800'"),
        ({"text": ["ab", "\ud800"], "n_workers": 2}, "a lone surrogate"),
    ],
)
def test_training_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_bpe(**{"text": "abc", "vocab_size": 300, **arguments})


# Special tokens


def test_special_tokens_are_text_unless_allowed(gpt2, reference):
    text = f"one {ENDOFTEXT} two"
    assert gpt2.encode(text) == reference.encode_ordinary(text)
    assert gpt2.encode(text, [ENDOFTEXT]) == reference.encode(text, allowed_special={ENDOFTEXT})
    assert gpt2.decode(gpt2.encode(text, "all")) == text


def test_overlapping_special_tokens_longest_first():
    tokenizer = train_bpe("", 258, ["<a>", "<a><a>"])
    assert tokenizer.encode("<a><a><a>", "all") == [257, 256]
    assert tokenizer.encode("<a><a><a>", ["<a>"]) == [256, 256, 256]


@pytest.mark.parametrize("allowed_special", ["<eos>", ["<nothing>"]])
def test_allowed_special_must_name_special_tokens(trained, allowed_special):
    with pytest.raises(ValueError, match="must be 'all' or some of"):
        trained.encode("a", allowed_special)


# Encoding and decoding


@given(lines=st.lists(texts), size=st.integers(1, 8))
def test_encode_iterable_equals_encode(gpt2, lines, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "_CHUNK_CHARS", size)
        assert list(gpt2.encode_iterable(lines)) == gpt2.encode("".join(lines))
        assert list(gpt2.encode_iterable(lines, "all")) == gpt2.encode("".join(lines), "all")


def test_encode_iterable_in_constant_memory(trained, monkeypatch):
    monkeypatch.setattr(tokenization, "_CHUNK_CHARS", 5000)

    def peak(n_lines):
        tracemalloc.start()
        n_ids = sum(1 for _ in trained.encode_iterable(f"the {i % 100} cats\n\n" for i in range(n_lines)))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n_ids > n_lines
        return highest

    peak(3_000)
    assert peak(30_000) < 1.2 * peak(3_000)


def test_the_cache_is_bounded(trained, monkeypatch):
    monkeypatch.setattr(tokenization, "_CACHE_ENTRIES", 10)
    tokenizer = BPETokenizer(trained.vocab, trained.merges, trained.special_tokens)
    text = " ".join(map(str, range(1000))) + " " + "a" * 1000
    assert tokenizer.encode(text) == trained.encode(text)
    assert 0 < len(tokenizer._cache) <= 10
    assert all(len(pretoken) < 1000 for pretoken in tokenizer._cache)


def test_a_lone_surrogate_is_named(gpt2):
    with pytest.raises(ValueError, match=r"a lone surrogate, '\\udc80', in 'abc\\udc80d':"):
        gpt2.encode("abc\udc80d")
    with pytest.raises(ValueError, match="a lone surrogate"):
        list(gpt2.encode_iterable(["abc\n", "\ud800"]))


def test_invalid_utf8_becomes_replacement_characters(trained):
    assert trained.decode([0xC3, ord("a"), 0xFF]) == "\ufffda\ufffd"


def test_decode_rejects_an_unknown_id(trained):
    with pytest.raises(ValueError, match="the ID 280 is not in the vocabulary of 280 tokens"):
        trained.decode([280])


def test_a_tokenizer_can_be_pickled(trained):
    assert pickle.loads(pickle.dumps(trained)).encode(STORY) == trained.encode(STORY)


# Construction, saving, loading


BYTES = {i: bytes([i]) for i in range(256)}


@pytest.mark.parametrize(
    ("vocab", "merges", "special_tokens", "message"),
    [
        ({0: b"\0"}, [], {}, r"lacks 255 of the 256 bytes: b'\\x01' is one"),
        (BYTES, [(b"a", b"b")], {}, "the merge of b'a' and b'b' needs"),
        (BYTES | {256: b"abc"}, [(b"ab", b"c")], {}, "the merge of b'ab' and b'c' needs both to be bytes"),
        (BYTES | {256: b"ab"}, [(b"a", b"b")], {"<a>": 256}, "'<a>' needs an ID of its own: 256 is b'ab'"),
        (BYTES, [], {"<a>": 256, "<b>": 256}, "'<b>' needs an ID of its own: 256 is b'<a>'"),
    ],
)
def test_constructor_errors(vocab, merges, special_tokens, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer(vocab, merges, special_tokens)


def test_to_tiktoken_where_it_would_differ():
    merges = [(b"a", b"b"), (b"b", b"c")]
    with pytest.raises(ValueError, match="tiktoken merges in the order of IDs"):
        BPETokenizer(BYTES | {256: b"bc", 257: b"ab"}, merges, {}).to_tiktoken()
    unreachable = BPETokenizer(BYTES | {256: b"ab", 257: b"bc", 258: b"abc"}, [*merges, (b"a", b"bc")], {})
    with pytest.raises(ValueError, match="would form the token b'abc', which the merges never reach"):
        unreachable.to_tiktoken()


def test_save_and_load(tmp_path):
    trained = train_bpe("déjà vu, déjà lu " * 2, 270, ["<eos>"])
    file = tmp_path / "tokenizer.json"
    trained.save(file)
    loaded = BPETokenizer.load(file)
    assert loaded.vocab == trained.vocab
    assert loaded.merges == trained.merges
    assert loaded.special_tokens == trained.special_tokens
    assert loaded.encode(STORY + "<eos>é", "all") == trained.encode(STORY + "<eos>é", "all")


def test_a_save_that_fails_leaves_the_old_file(trained, tmp_path, monkeypatch):
    file = tmp_path / "tokenizer.json"
    trained.save(file)
    before = file.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        trained.save(file)
    assert file.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def damage(state, key, value):
    return json.dumps({**state, key: value})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: json.dumps(state)[:1000],
        lambda state: "[]",
        lambda state: "{}",
        lambda state: damage(state, "vocab", {}),
        lambda state: damage(state, "vocab", None),
        lambda state: damage(state, "vocab", {**state["vocab"], "97": "€"}),
        lambda state: damage(state, "merges", [["a"]]),
        lambda state: damage(state, "merges", [[1, 2]]),
        lambda state: damage(state, "special_tokens", {"<a>": "x"}),
        lambda state: damage(state, "special_tokens", {"<a>": 97}),
    ],
)
def test_a_damaged_file_is_named(trained, tmp_path, spoil):
    file = tmp_path / "tokenizer.json"
    trained.save(file)
    file.write_text(spoil(json.loads(file.read_text())))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer that save\(\) wrote"):
        BPETokenizer.load(file)
