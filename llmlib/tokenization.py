"""Turn text into token IDs and back: a word tokenizer, and byte-level byte-pair encoding (BPE)."""

from __future__ import annotations

import heapq
import json
import multiprocessing
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import regex
import tiktoken

from llmlib import resources

WORD_PATTERN = r"\w+(?:['’-]\w+)*|[^\w\s]"
GPT2_PATTERN = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_PRETOKEN = regex.compile(GPT2_PATTERN)
_CHUNK_CHARS = 2**18  # of text held at once while streaming
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
    first learned first. Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019 (GPT-2).
    """

    def __init__(
        self, vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], special_tokens: dict[str, int]
    ) -> None:
        _check_special_tokens(special_tokens)
        self.merges = list(merges)
        self.special_tokens = dict(special_tokens)
        self.vocab = {**vocab, **{i: token.encode() for token, i in special_tokens.items()}}
        special_ids = set(special_tokens.values())
        self._ids = {token: i for i, token in vocab.items() if i not in special_ids}
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._cache: dict[str, list[int]] = {}
        self._check(vocab)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens, the special ones among them."""
        return len(self.vocab)

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Return the IDs of `text`.

        A special token counts as one only where `allowed_special` names it (or is "all"), the longest first
        where two begin alike; any other is ordinary text. A lone surrogate raises ValueError.
        """
        _check_encodable(text)
        return self._encode(text, self._allowed(allowed_special))

    def encode_iterable(self, lines: Iterable[str], allowed_special: Collection[str] = ()) -> Iterator[int]:
        """Yield the IDs of `"".join(lines)`, exactly, without ever holding more than a piece of it.

        Memory is constant as long as the text has a space or a line break here and there.
        """
        allowed = self._allowed(allowed_special)
        for chunk in _chunks(lines, allowed):
            yield from self._encode(chunk, allowed)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        try:
            return b"".join([self.vocab[i] for i in ids]).decode("utf-8", errors="replace")
        except KeyError as error:
            raise ValueError(f"the ID {error} is not in the vocabulary of {self.vocab_size} tokens") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer as JSON, each byte as the character of the same number (Latin-1)."""
        state = {
            "special_tokens": self.special_tokens,
            "vocab": {i: token.decode("latin-1") for i, token in self.vocab.items()},
            "merges": [[left.decode("latin-1"), right.decode("latin-1")] for left, right in self.merges],
        }
        path = Path(path)
        beside = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            beside.write_text(json.dumps(state, indent=0), encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

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
        merged_ids = [self._ids[left + right] for left, right in self.merges]
        if merged_ids != sorted(merged_ids):
            raise ValueError(
                "tiktoken merges in the order of IDs: number the tokens in the order of the merges"
            )
        for token in self._ids:
            if self._merge(token) != [token]:
                raise ValueError(f"tiktoken would form the token {token}, which the merges never reach")
        return tiktoken.Encoding(
            "llmlib", pat_str=GPT2_PATTERN, mergeable_ranks=self._ids, special_tokens=self.special_tokens
        )

    def _check(self, vocab: dict[int, bytes]) -> None:
        missing = [b for b in range(256) if bytes([b]) not in self._ids]
        if missing:
            raise ValueError(
                f"the vocabulary lacks {len(missing)} of the 256 bytes, the first is {missing[0]}"
            )
        if len(set(self.special_tokens.values())) < len(self.special_tokens):
            raise ValueError(f"two special tokens share an ID: {self.special_tokens}")
        for token, i in self.special_tokens.items():
            if vocab.get(i, token.encode()) != token.encode():
                raise ValueError(f"the special token {token!r} needs an ID of its own: {i} is {vocab[i]}")
        if len(self._ranks) < len(self.merges):
            raise ValueError("merges must be distinct: a pair is there twice")
        for left, right in self.merges:
            if not (left and right and {left, right, left + right} <= self._ids.keys()):
                raise ValueError(
                    f"the merge of {left} and {right} needs both and their sum in the vocabulary"
                )

    def _allowed(self, allowed_special: Collection[str]) -> Collection[str]:
        if allowed_special == "all":
            return self.special_tokens
        if not self.special_tokens.keys() >= set(allowed_special):
            raise ValueError(
                f"allowed_special={allowed_special!r} must be 'all' or some of {list(self.special_tokens)}"
            )
        return allowed_special

    def _encode(self, text: str, allowed_special: Collection[str]) -> list[int]:
        ids = []
        cache = self._cache
        for i, part in enumerate(_split_at_special(text, allowed_special)):
            if i % 2:  # every other part is a special token
                ids.append(self.special_tokens[part])
                continue
            for pretoken in _PRETOKEN.findall(part):
                ids += cache.get(pretoken) or self._encode_pretoken(pretoken)
        return ids

    def _encode_pretoken(self, pretoken: str) -> list[int]:
        ids = [self._ids[part] for part in self._merge(pretoken.encode())]
        if len(pretoken) <= _CACHE_CHARS:
            if len(self._cache) >= _CACHE_ENTRIES:
                self._cache.clear()
            self._cache[pretoken] = ids
        return ids

    def _merge(self, pretoken: bytes) -> list[bytes]:
        """Join neighbours, always the pair learned first and of those the leftmost, until none is left.

        The candidates wait in a heap, and the parts are linked to their neighbours, so that n bytes cost
        O(n log n). A candidate whose parts have changed in the meantime is dropped when it comes up.
        """
        parts = [bytes([b]) for b in pretoken]
        previous = list(range(-1, len(parts) - 1))
        following = list(range(1, len(parts) + 1))
        parts.append(b"")  # the end, which merges with nothing
        ranks = self._ranks
        heap = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = following[i]
            if not parts[i] or ranks.get((parts[i], parts[j])) != rank:
                continue
            parts[i] += parts[j]
            parts[j] = b""
            k = following[i] = following[j]
            if k < len(previous):
                previous[k] = i
            for left, right in ((previous[i], i), (i, k)):
                if left >= 0 and (pair := (parts[left], parts[right])) in ranks:
                    heapq.heappush(heap, (ranks[pair], left))
        return [part for part in parts if part]


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
    strings wins. A text that runs out of pairs gives a smaller vocabulary. With `n_workers` processes the
    result is the same; a script must guard its main part with `if __name__ == "__main__":`.
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
    chunks = _chunks(_read(text), special_tokens)
    if n_workers == 1:
        counts = _total(map(count, chunks))
    else:
        with ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn")) as pool:
            batches = iter(lambda: list(islice(chunks, 4 * n_workers)), [])  # few chunks in memory at once
            counts = _total(part for batch in batches for part in pool.map(count, batch))
    merges = _learn_merges(counts, n_merges)
    tokens = [bytes([b]) for b in range(256)]
    tokens += [token.encode() for token in special_tokens]
    tokens += [left + right for left, right in merges]
    return BPETokenizer(dict(enumerate(tokens)), merges, {t: 256 + i for i, t in enumerate(special_tokens)})


def gpt2_tokenizer() -> BPETokenizer:
    """Return GPT-2's own tokenizer: 256 bytes, 50,000 merges, and `<|endoftext|>` = 50256.

    Its files write each byte as a visible character: itself where it is one, else the next from U+0100 on.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(0x100 + i): b for i, b in enumerate(hidden)}

    def to_bytes(token: str) -> bytes:
        return bytes([byte_of[character] for character in token])

    ids = json.loads(resources.path("gpt2-vocab").read_text(encoding="utf-8"))
    special_tokens = {"<|endoftext|>": ids.pop("<|endoftext|>")}
    _version, *lines = resources.path("gpt2-merges").read_text(encoding="utf-8").splitlines()
    merges = [(to_bytes(left), to_bytes(right)) for left, right in map(str.split, lines)]
    return BPETokenizer({i: to_bytes(token) for token, i in ids.items()}, merges, special_tokens)


def _learn_merges(pretoken_counts: dict[str, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """Return the merges that training finds in the counted pre-tokens.

    Each distinct pre-token is one word with a count. A merge visits only the words that hold its pair, and
    changes only the counts of the pairs it makes and breaks. Every new count goes on a heap; an old entry for
    the same pair stays there, and is dropped when it comes up and no longer tells the pair's count.
    """
    words = [[bytes([b]) for b in pretoken.encode()] for pretoken in pretoken_counts]
    word_counts = list(pretoken_counts.values())
    pair_counts: Counter[tuple[bytes, bytes]] = Counter()
    words_with: defaultdict[tuple[bytes, bytes], set[int]] = defaultdict(set)
    for w, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += word_counts[w]
            words_with[pair].add(w)

    descending = {bytes([b]): _descending(bytes([b])) for b in range(256)}
    heap = [(-n, descending[pair[0]], descending[pair[1]], pair) for pair, n in pair_counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        count, _, _, pair = heapq.heappop(heap)
        if pair_counts[pair] != -count:
            continue
        merges.append(pair)
        token = pair[0] + pair[1]
        descending[token] = _descending(token)
        changes: Counter[tuple[bytes, bytes]] = Counter()
        for w in words_with.pop(pair):
            n = word_counts[w]
            for old in pairwise(words[w]):
                changes[old] -= n
            words[w] = _merge_pair(words[w], pair, token)
            for new in pairwise(words[w]):
                changes[new] += n
                words_with[new].add(w)
        for changed, n in changes.items():
            pair_counts[changed] += n
            if n and pair_counts[changed]:
                left, right = changed
                heapq.heappush(heap, (-pair_counts[changed], descending[left], descending[right], changed))
    return merges


def _merge_pair(parts: list[bytes], pair: tuple[bytes, bytes], token: bytes) -> list[bytes]:
    merged = []
    for part in parts:
        if part == pair[1] and merged and merged[-1] == pair[0]:
            merged[-1] = token
        else:
            merged.append(part)
    return merged


def _descending(token: bytes) -> str:
    """Return a string that sorts the other way round: the greater the bytes, the smaller the string."""
    return "".join(chr(255 - b) for b in token) + chr(256)


def _read(text: str | Path | Iterable[str]) -> Iterator[str]:
    if isinstance(text, Path):
        with text.open(encoding="utf-8", newline="") as file:
            while block := file.read(_CHUNK_CHARS):
                yield block
    elif isinstance(text, str):
        yield text
    else:
        yield from text


def _count_pretokens(chunk: str, special_tokens: tuple[str, ...]) -> Counter[str]:
    return _total(map(_PRETOKEN.findall, _split_at_special(chunk, special_tokens)[::2]))


def _total(parts: Iterable[Iterable[str]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(part)
    return counts


def _chunks(texts: Iterable[str], special_tokens: Collection[str]) -> Iterator[str]:
    """Regroup `texts` into chunks whose pre-tokens and special tokens are, in turn, those of the whole.

    A cut falls before a whitespace character that a visible one follows: GPT-2's pattern always begins a
    pre-token there, and looks no further back or ahead. It may not fall inside a special token, nor right
    before one, where the run of whitespace ends and is not shared with a word. A text with no such place
    for long is held until one comes.
    """
    begun = {token[:i] for token in special_tokens for i in range(1, len(token)) if token[i].isspace()}
    not_inside = "".join(f"(?<!{regex.escape(beginning)})" for beginning in begun)
    not_before = "".join(f"(?!{regex.escape(token)})" for token in special_tokens)
    last_cut_first = regex.compile(rf"(?r){not_inside}\s(?=\S){not_before}")
    longest = max(map(len, special_tokens), default=0)

    held, n_held, enough = [], 0, _CHUNK_CHARS
    for text in texts:
        _check_encodable(text)
        for start in range(0, len(text), _CHUNK_CHARS):
            held.append(text[start : start + _CHUNK_CHARS])
            n_held += len(held[-1])
            if n_held < enough:
                continue
            buffer = "".join(held)
            # Only where a special token that begins there would be complete can it be seen.
            cuts = (m.start() for m in last_cut_first.finditer(buffer) if m.end() + longest <= len(buffer))
            cut = next(cuts, 0)
            yield buffer[:cut]
            held, n_held = [buffer[cut:]], len(buffer) - cut
            enough = _CHUNK_CHARS + 2 * n_held
    yield "".join(held)


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
    repeated = [token for token, n in Counter(list(special_tokens)).items() if n > 1]
    if repeated or "" in special_tokens:
        raise ValueError(f"special tokens must be distinct and not empty: {list(special_tokens)}")


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate, {text[error.start]!r}, at position {error.start}, which is no "
            "character: drop it, or read the text again with the right encoding"
        ) from None
