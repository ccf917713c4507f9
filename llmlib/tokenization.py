"""Turn text into token IDs and back: a word tokenizer, and byte-level byte-pair encoding (BPE)."""

from __future__ import annotations

import heapq
import json
import multiprocessing
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from llmlib import resources

WORD_PATTERN = r"\w+(?:['’-]\w+)*|[^\w\s]"
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_PRETOKEN = regex.compile(GPT2_PATTERN)
# The longest beginning of a text that ends between a visible character and whitespace.
_CHUNK = regex.compile(r"(?s).*\S(?=\s)")
_CHUNK_CHARS = 2**20  # of text held at once while streaming
_CACHE_ENTRIES = 2**16  # pre-tokens whose IDs a tokenizer remembers
_CACHE_CHARS = 64  # a longer pre-token is too rare to remember


class WordTokenizer:
    """Map each word and punctuation mark of `text` to an ID, in sorted order, then the special tokens.

    A word that `text` lacks becomes `<|unk|>` where that is a special token, and else raises ValueError.
    Whitespace is not kept: `decode` puts one space between words and none before a closing mark.
    """

    def __init__(self, text: str, special_tokens: Collection[str] = ()) -> None:
        _check_special_tokens(special_tokens)
        self._pattern = regex.compile("|".join([*_longest_first(special_tokens), WORD_PATTERN]))
        words = sorted(set(self._pattern.findall(text)) - set(special_tokens))
        self.vocab = {word: i for i, word in enumerate([*words, *special_tokens])}
        self._words = dict(enumerate(self.vocab))

    def encode(self, text: str) -> list[int]:
        """Return the ID of each word, punctuation mark and special token of `text`."""
        unknown_id = self.vocab.get("<|unk|>")
        ids = []
        for word in self._pattern.findall(text):
            ids.append(self.vocab.get(word, unknown_id))
            if ids[-1] is None:
                raise ValueError(
                    f"the word {word!r} is not in the vocabulary: "
                    "build it from a text that has the word, or with special_tokens=['<|unk|>']"
                )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words of `ids` as text."""
        try:
            text = " ".join([self._words[i] for i in ids])
        except KeyError as error:
            raise ValueError(f"the ID {error} is not in the vocabulary of {len(self.vocab)} words") from None
        return regex.sub(r" (?=[.,:;?!)\]}])|(?<=[(\[{]) ", "", text)


class BPETokenizer:
    """Encode text as bytes merged pair by pair, in the order in which training found the merges.

    `vocab` holds the bytes of every ID; the special tokens are added to it. `merges` lists the pairs, the
    first learned first. A tokenizer with another `pattern`, or one that has no token for some bytes and
    leaves them out of every text (`dropped`), is a subclass.
    Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019 (GPT-2).
    """

    pattern = GPT2_PATTERN
    dropped = b""

    def __init__(
        self, vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], special_tokens: dict[str, int]
    ) -> None:
        _check_special_tokens(special_tokens)
        self.merges = list(merges)
        self.special_tokens = dict(special_tokens)
        self.vocab = dict(vocab)
        for token, i in special_tokens.items():
            if self.vocab.setdefault(i, token.encode()) != token.encode():
                raise ValueError(
                    f"the special token {token!r} needs an ID of its own: {i} is {self.vocab[i]}"
                )
        special_ids = set(special_tokens.values())
        self._ids = {token: i for i, token in vocab.items() if i not in special_ids}
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._pretoken = regex.compile(self.pattern)
        self._cache: dict[str, list[int]] = {}
        self._check_merges()

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens, the special ones among them."""
        return len(self.vocab)

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the IDs of `text`.

        A special token counts as one only where `allowed_special` names it (or is "all"), the longest first
        where two begin alike; any other is ordinary text. A lone surrogate raises ValueError.
        """
        if allowed_special == "all":
            allowed_special = self.special_tokens
        if not self.special_tokens.keys() >= set(allowed_special):
            raise ValueError(
                f"allowed_special={allowed_special!r} must be 'all' or some of {list(self.special_tokens)}"
            )
        _check_encodable(text)
        ids = []
        for i, part in enumerate(_split_at_special(text, allowed_special)):
            if i % 2:  # every other part is a special token
                ids.append(self.special_tokens[part])
                continue
            for pretoken in self._pretoken.findall(part):
                ids += self._cache.get(pretoken) or self._encode_pretoken(pretoken)
        return ids

    def encode_iterable(self, lines: Iterable[str], allowed_special: Collection[str] = ()) -> Iterator[int]:
        """Yield the IDs of `"".join(lines)`, exactly, without ever holding more than a piece of it.

        Memory is constant as long as the text has a space or a line break here and there.
        """
        for chunk in _chunks(lines):
            yield from self.encode(chunk, allowed_special)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        try:
            return b"".join([self.vocab[i] for i in ids]).decode("utf-8", errors="replace")
        except KeyError as error:
            raise ValueError(f"the ID {error} is not in the vocabulary of {self.vocab_size} tokens") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer as JSON, each byte as the character of the same number (Latin-1).

        What stood at `path` stays whole until the new file is.
        """
        state = {
            "special_tokens": self.special_tokens,
            "vocab": {i: token.decode("latin-1") for i, token in self.vocab.items()},
            "merges": [[left.decode("latin-1"), right.decode("latin-1")] for left, right in self.merges],
        }
        with resources.write_beside(path) as new:
            new.write_text(json.dumps(state, indent=0), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> BPETokenizer:
        """Read what `save` wrote; a damaged file raises ValueError."""
        text = Path(path).read_bytes()
        try:
            state = json.loads(text)
            vocab = {int(i): token.encode("latin-1") for i, token in state["vocab"].items()}
            merges = [(left.encode("latin-1"), right.encode("latin-1")) for left, right in state["merges"]]
            return cls(vocab, merges, {token: int(i) for token, i in state["special_tokens"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a tokenizer that save() wrote, or is damaged ({error}): save it again"
            ) from error

    def to_tiktoken(self) -> tiktoken.Encoding:
        """Return the same tokenizer as a `tiktoken.Encoding`, which is faster.

        tiktoken has no list of merges: it joins neighbours that form any token, the lowest ID first. So IDs
        must rise in the order of the merges, and the merges must reach every token, as training makes them;
        else ValueError. Its `encode` takes special tokens as ordinary text with `disallowed_special=()`, and
        where special tokens overlap the choice is its own.
        """
        if self.dropped:
            raise ValueError(f"tiktoken needs a token for each byte, and this tokenizer drops {self.dropped}")
        merged_ids = [self._ids[left + right] for left, right in self.merges]
        if merged_ids != sorted(merged_ids):
            raise ValueError(
                "tiktoken merges in the order of IDs: number the tokens in the order of the merges"
            )
        for token in self._ids:
            if self._merge(token) != [token]:
                raise ValueError(f"tiktoken would form the token {token}, which the merges never reach")
        return tiktoken.Encoding(
            "llmlib", pat_str=self.pattern, mergeable_ranks=self._ids, special_tokens=self.special_tokens
        )

    def _check_merges(self) -> None:
        """Raise ValueError where the vocabulary lacks a byte, or a merge has parts that cannot arise."""
        made = {bytes([b]) for b in range(256) if b not in self.dropped}
        if missing := made - self._ids.keys():
            raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 bytes: {min(missing)} is one")
        for left, right in self.merges:
            if not {left, right} <= made or left + right not in self._ids:
                raise ValueError(
                    f"the merge of {left} and {right} needs both to be bytes or made by an earlier merge, "
                    "and their sum in the vocabulary"
                )
            made.add(left + right)

    def _encode_pretoken(self, pretoken: str) -> list[int]:
        ids = [self._ids[part] for part in self._merge(pretoken.encode())]
        if len(pretoken) <= _CACHE_CHARS:
            if len(self._cache) >= _CACHE_ENTRIES:
                self._cache.clear()
            self._cache[pretoken] = ids
        return ids

    def _merge(self, pretoken: bytes) -> list[bytes]:
        """Join the pair that was learned first, wherever it stands, and so on until no pair is known."""
        parts = [bytes([b]) for b in pretoken if b not in self.dropped]
        while known := self._ranks.keys() & set(pairwise(parts)):
            parts = _join_pair(parts, min(known, key=self._ranks.__getitem__))
        return parts


def train_bpe(
    text: str | Path | Iterable[str],
    vocab_size: int,
    special_tokens: Collection[str] = ("<pad>", "<unk>", "<bos>", "<eos>"),
    *,
    n_workers: int = 1,
) -> BPETokenizer:
    """Learn a byte-level BPE vocabulary by merging the most frequent pair of tokens again and again.

    `text` is a string, the Path of a UTF-8 file, or an iterable of strings that are read one after the other
    as one text; a file or an iterable may be larger than memory, since only distinct pre-tokens are kept.
    No token spans two pre-tokens or a part of a special token. IDs: 0 to 255 are the bytes, then come the
    special tokens, then the merges. Of equally frequent pairs the lexicographically greater pair of byte
    strings wins. A text that runs out of pairs gives a smaller vocabulary. `n_workers` processes share the
    counting, with the same result; a script must then guard its main part with
    `if __name__ == "__main__":`.
    Sennrich et al. 2016, arXiv:1508.07909.
    """
    _check_special_tokens(special_tokens)
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0:
        raise ValueError(
            f"vocab_size={vocab_size} is too small for 256 bytes and {len(special_tokens)} special tokens: "
            f"give at least {256 + len(special_tokens)}"
        )
    if n_workers < 1:
        raise ValueError(f"n_workers={n_workers} must be at least 1")
    count = partial(_count_pretokens, special_tokens=tuple(special_tokens))
    counts: Counter[str] = Counter()
    for part in _map(count, _chunks(_read(text)), n_workers):
        counts.update(part)
    merges = _learn_merges(counts, n_merges)
    tokens = [bytes([b]) for b in range(256)]
    tokens += [token.encode() for token in special_tokens]
    tokens += [left + right for left, right in merges]
    return BPETokenizer(dict(enumerate(tokens)), merges, {t: 256 + i for i, t in enumerate(special_tokens)})


def gpt2_tokenizer() -> BPETokenizer:
    """Return GPT-2's own tokenizer: 256 bytes, 50,000 merges, and `<|endoftext|>` = 50256."""
    byte_of = visible_bytes()

    def to_bytes(token: str) -> bytes:
        return bytes([byte_of[character] for character in token])

    ids = json.loads(resources.path("gpt2-vocab").read_text(encoding="utf-8"))
    special_tokens = {"<|endoftext|>": ids.pop("<|endoftext|>")}
    _version, *lines = resources.path("gpt2-merges").read_text(encoding="utf-8").splitlines()
    merges = [(to_bytes(left), to_bytes(right)) for left, right in map(str.split, lines)]
    return BPETokenizer({i: to_bytes(token) for token, i in ids.items()}, merges, special_tokens)


def visible_bytes() -> dict[str, int]:
    """Return the byte of each visible character in GPT-2's files: itself, or the next from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}


def _learn_merges(pretoken_counts: dict[str, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Return the merges that training finds in the counted pre-tokens.

    A merge visits only the words that hold its pair, and changes only the counts of the pairs it makes and
    breaks. A heap has the most frequent pair on top. A count that falls leaves its entry too high there: it
    is put back with its present count when it comes up.
    """
    words = [[bytes([b]) for b in pretoken.encode()] for pretoken in pretoken_counts]
    word_counts = list(pretoken_counts.values())
    pair_counts: defaultdict[tuple[bytes, bytes], int] = defaultdict(int)
    words_with: defaultdict[tuple[bytes, bytes], set[int]] = defaultdict(set)
    for w, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += word_counts[w]
            words_with[pair].add(w)

    heap = [_GreatestFirst((count, pair)) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        count, pair = heapq.heappop(heap)
        if count != pair_counts[pair]:
            if pair_counts[pair] > 0:
                heapq.heappush(heap, _GreatestFirst((pair_counts[pair], pair)))
            continue
        merges.append(pair)
        token = pair[0] + pair[1]
        changes: defaultdict[tuple[bytes, bytes], int] = defaultdict(int)
        for w in words_with.pop(pair):
            for broken in pairwise(words[w]):
                changes[broken] -= word_counts[w]
            words[w] = _join_pair(words[w], pair)
            for made in pairwise(words[w]):
                changes[made] += word_counts[w]
                if token in made:
                    words_with[made].add(w)
        for changed, change in changes.items():
            pair_counts[changed] += change
            if change > 0:
                heapq.heappush(heap, _GreatestFirst((pair_counts[changed], changed)))
    return merges


class _GreatestFirst(tuple):
    """Order tuples the other way round, for a heap that gives the greatest first."""

    def __lt__(self, other: tuple) -> bool:
        return self > other


def _join_pair(parts: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    joined = []
    for part in parts:
        if part == pair[1] and joined and joined[-1] == pair[0]:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _read(text: str | Path | Iterable[str]) -> Iterator[str]:
    if isinstance(text, Path):
        with text.open(encoding="utf-8", newline="") as file:
            while block := file.read(_CHUNK_CHARS):
                yield block
    elif isinstance(text, str):
        yield text
    else:
        yield from text


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Regroup `texts` into chunks that have, in turn, the pre-tokens and special tokens of the whole.

    A cut falls between a visible character and whitespace. No pre-token and no special token holds such a
    place, and none looks beyond it. A text that has none for long is held until one comes.
    """
    held = ""
    for text in texts:
        for start in range(0, len(text), _CHUNK_CHARS):
            held += text[start : start + _CHUNK_CHARS]
            if len(held) >= _CHUNK_CHARS and (chunk := _CHUNK.match(held)):
                yield chunk[0]
                held = held[chunk.end() :]
    yield held


def _count_pretokens(chunk: str, special_tokens: Collection[str]) -> Counter[str]:
    _check_encodable(chunk)
    counts: Counter[str] = Counter()
    for part in _split_at_special(chunk, special_tokens)[::2]:
        counts.update(_PRETOKEN.findall(part))
    return counts


def _map(function: Callable, items: Iterable, n_workers: int) -> Iterator:
    """Yield `function` of each item, in turn, computed by several processes; few items are held at once."""
    if n_workers == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn")) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * n_workers:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


def _split_at_special(text: str, special_tokens: Collection[str]) -> list[str]:
    """Return ordinary text and special tokens in turn: the parts 0, 2, 4, … are ordinary."""
    if not special_tokens:
        return [text]
    return regex.split(f"({'|'.join(_longest_first(special_tokens))})", text)


def _longest_first(special_tokens: Collection[str]) -> list[str]:
    return [regex.escape(token) for token in sorted(special_tokens, key=len, reverse=True)]


def _check_special_tokens(special_tokens: Collection[str]) -> None:
    if isinstance(special_tokens, str):
        raise ValueError(f"special_tokens={special_tokens!r} is one string: give a list of strings")
    distinct = {token for token in special_tokens if regex.fullmatch(r"\S+", token)}
    if len(distinct) < len(special_tokens):
        raise ValueError(
            f"special tokens must be distinct, not empty, and have no space: {list(special_tokens)}"
        )


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        i = error.start
        raise ValueError(
            f"the text has a lone surrogate, {text[i]!r}, in {text[max(0, i - 20) : i + 20]!r}: it is no "
            "character; drop it, or read the text again with the right encoding"
        ) from None
