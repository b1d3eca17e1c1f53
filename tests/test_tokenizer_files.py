"""Files of a vocabulary that contradict each other, are broken or hostile: which one counts, and what the error says."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from albert_fast.text import vocabulary as _vocabulary
from albert_fast.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

CHANCE = random.Random(0)
WORDS = ["".join(CHANCE.choices("aeiounrstlmd", k=CHANCE.randrange(1, 9))) for _ in range(80)]
CORPUS = [f"the film is {' '.join(CHANCE.choices(WORDS, k=6))}, (said) a story" for _ in range(60)]
WORDPIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film", "dull", "a", "<c>", "<s>"]


@pytest.fixture(scope="module")
def model() -> bytes:
    """A SentencePiece model of 60 pieces with ALBERT's special ones."""
    sentencepiece = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=out,
        vocab_size=60,
        minloglevel=2,
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        pad_piece="<pad>",
        unk_piece="<unk>",
        control_symbols=["[CLS]", "[SEP]", "[MASK]"],
    )
    return out.getvalue()


@pytest.fixture(scope="module", params=["unigram", "wordpiece"])
def trained(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(CORPUS, 70, kind=request.param)


def write(folder: Path, **files: Any) -> Path:
    """vocab_txt="..." becomes vocab.txt; what is no text becomes JSON."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        path = folder / re.sub(r"_(txt|json|model)$", r".\1", name)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "kind"),
    [
        ({"vocab_size": 60, "model_type": "albert"}, {}, "Unigram"),
        ({"vocab_size": 10, "model_type": "albert"}, {}, "WordPiece"),
        ({"vocab_size": 16, "model_type": "albert"}, {}, "WordPiece"),  # padded: the other one has no room in it
        ({"vocab_size": 64, "model_type": "albert"}, {}, "Unigram"),
        ({"vocab_size": 64}, {"tokenizer_class": "BertTokenizer"}, "WordPiece"),
        ({"vocab_size": 64}, {"tokenizer_class": "AlbertTokenizerFast"}, "Unigram"),
        ({"vocab_size": 10}, {"tokenizer_class": "AlbertTokenizer"}, "WordPiece"),
        ({}, {"tokenizer_class": "BertTokenizerFast"}, "WordPiece"),
        ({"tokenizer_class": "BertTokenizer"}, {}, "WordPiece"),
        ({"model_type": "albert"}, {}, "Unigram"),
    ],
)
def test_which_of_two_vocabularies(tmp_path: Path, model: bytes, config: dict, tokenizer_config: dict, kind: str):
    files = {"spiece_model": model, "vocab_txt": "\n".join(WORDPIECES)}
    write(tmp_path, **files, config_json=config, tokenizer_config_json=tokenizer_config)
    assert type(load_tokenizer(tmp_path).backend.model).__name__ == kind


@pytest.mark.parametrize("config", [{}, {"vocab_size": 100}, {"vocab_size": 5}])
def test_two_vocabularies_that_nothing_tells_apart(tmp_path: Path, model: bytes, config: dict) -> None:
    write(tmp_path, spiece_model=model, vocab_txt="\n".join(WORDPIECES), config_json=config)
    with pytest.raises(ValueError, match=r"spiece\.model \(60 pieces\) and vocab\.txt \(10 pieces\)"):
        load_tokenizer(tmp_path)
    assert len(load_tokenizer(tmp_path / "vocab.txt")) == 10 if config == {} else True


def test_a_vocabulary_larger_than_the_model_is_told(tmp_path: Path, model: bytes) -> None:
    write(tmp_path, spiece_model=model, config_json={"vocab_size": 50})
    with pytest.warns(UserWarning, match=r"60 pieces, the model in the same folder \(config.json\) 50"):
        load_tokenizer(tmp_path)


def test_forms_of_vocab_txt(tmp_path: Path) -> None:
    text = "\n".join(WORDPIECES)
    plain = load_tokenizer(write(tmp_path, vocab_txt=text))("film a")
    for other in (text.replace("\n", "\r\n"), "\ufeff" + text, text + "\n", text + "\n\n\n"):
        tokenizer = load_tokenizer(write(tmp_path, vocab_txt=other))
        assert (tokenizer("film a"), len(tokenizer)) == (plain, len(WORDPIECES))
    twice = load_tokenizer(write(tmp_path, vocab_txt=text.replace("dull", "film")))
    assert twice.tokenize("film") == ["film"]
    assert twice.convert_tokens_to_ids("film") == 6  # the last line counts, as in transformers
    assert len(twice) == 10  # ids, of which one has no piece


def test_settings_of_tokenizer_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    stated = {
        "padding_side": "left",
        "truncation_side": "left",
        "model_max_length": 6,
        "cls_token": "<c>",
        "sep_token": {"content": "<s>", "__type": "AddedToken"},
        "split_special_tokens": True,
        "additional_special_tokens": ["<user>"],
        "tokenizer_class": "BertTokenizer",
    }
    load_tokenizer(write(tmp_path, vocab_txt="\n".join(WORDPIECES))).save(tmp_path)
    write(tmp_path, tokenizer_config_json=stated)
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["a dull film a dull film", "film [SEP] a"]
    expected = theirs(texts, truncation=True, padding=True)
    actual = ours(texts, truncation=True, padding=True)
    assert actual["input_ids"] == expected["input_ids"]
    assert actual["attention_mask"] == expected["attention_mask"]
    assert (ours.cls_token_id, ours.sep_token_id, ours.model_max_length) == (8, 9, 6)
    assert ours("<user>", split_special_tokens=False)["input_ids"] == [8, 10, 9]
    ours.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again")(texts, truncation=True) == ours(texts, truncation=True)


def test_older_files_count_where_the_newer_entry_is_missing(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write(
        tmp_path,
        vocab_txt="\n".join(WORDPIECES),
        tokenizer_config_json={"cls_token": "[CLS]"},
        special_tokens_map_json={"cls_token": "<c>"},
        added_tokens_json={"<user>": 10},
    )
    ours, theirs = load_tokenizer(tmp_path), transformers.BertTokenizer.from_pretrained(tmp_path)
    assert ours("a<user>film")["input_ids"] == theirs("a<user>film")["input_ids"] == [8, 7, 10, 5, 3]
    write(tmp_path, tokenizer_config_json={"cls_token": "[CLS]", "added_tokens_decoder": {}})
    assert load_tokenizer(tmp_path)("a")["input_ids"] == [2, 7, 3]


class Counting:
    """A pipeline that notes how many tokens each call adds."""

    def __init__(self, backend: Any, calls: list[int]) -> None:
        vars(self).update(backend=backend, calls=calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.backend, name, value)

    def add_tokens(self, tokens: list[Any]) -> int:
        self.calls.append(len(tokens))
        return int(self.backend.add_tokens(tokens))


def test_twenty_thousand_added_tokens_are_added_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    add = _vocabulary.add_tokens
    monkeypatch.setattr(_vocabulary, "add_tokens", lambda backend, *rest: add(Counting(backend, calls), *rest))
    added = {f"<t{i}>": 10 + i for i in range(20_000)}
    tokenizer = load_tokenizer(write(tmp_path, vocab_txt="\n".join(WORDPIECES), added_tokens_json=added))
    assert calls == [20_000]  # the library builds its search anew at each call
    assert tokenizer("a<t19999>")["input_ids"] == [2, 7, 20_009, 3]


def test_no_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"looked for tokenizer.json, spiece.model, vocab.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", b'{"version": "1.0", "model": {"type"', "not readable as JSON"),
        ("tokenizer.json", b"[]", "expected a JSON object"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("spiece.model", b"", "not a SentencePiece model"),
        ("spiece.model", b"\x00garbage\xff" * 50, "not a SentencePiece model"),
        ("vocab.txt", b"[PAD]\n\xff\xfe\n", "not UTF-8"),
        ("vocab.txt", b"hello\nworld\n", r"without \[PAD\], \[UNK\], \[CLS\], \[SEP\]"),
        ("words.bin", b"", "not a vocabulary"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        load_tokenizer(tmp_path / name)
    assert name in str(caught.value)


def test_special_tokens_of_other_names(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"<p>\n<u>\n<c>\n<s>\nfilm\n")
    names = {"pad_token": "<p>", "unk_token": {"content": "<u>"}, "cls_token": "<c>", "sep_token": "<s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("film dull")["input_ids"] == [2, 4, 1, 3]
    assert tokenizer.mask_token is None
    assert tokenizer.mask_token_id is None
    assert tokenizer.model_max_length == 64


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


@pytest.mark.parametrize("field", [2, 3])
@pytest.mark.parametrize("number", [40_000_000, 10**11, 2**64 - 1])
def test_a_number_where_a_message_belongs(tmp_path: Path, model: bytes, field: int, number: int) -> None:
    write(tmp_path, spiece_model=model + varint(field << 3) + varint(number))
    # protobuf keeps it as an unknown field, as sentencepiece does
    assert load_tokenizer(tmp_path)("a film") == load_tokenizer(write(tmp_path / "b", spiece_model=model))("a film")


def test_damaged_models_end_in_an_error_or_work(tmp_path: Path, model: bytes) -> None:
    chance, said = random.Random(0), []
    for _ in range(150):
        damaged = bytearray(model)
        for _ in range(chance.choice((1, 2, 20))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path = write(tmp_path, spiece_model=bytes(damaged[: chance.choice((len(damaged), chance.randrange(1, 4000)))]))
        try:
            load_tokenizer(path)("a film is [SEP] \x10 caf\u00e9", return_offsets=True, split_special_tokens=True)
        except ValueError as error:
            said.append(str(error))
    assert said
    assert [message for message in said if "spiece.model" not in message and "pipeline" not in message] == []


def change(content: dict, path: str, value: Any) -> dict:
    *parents, last = path.split(".")
    inner = content
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return content


TOO_DEEP = "[" * 100_000 + "]" * 100_000
PANIC = [{"SpecialToken": {"id": "[NO]", "type_id": 0}}]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model", None), ("model", []), ("model", {"type": "Unigram"}), ("model.vocab", {"a": -1}),
        ("model.vocab", {"[PAD]": 2**32}), ("model.vocab", [["a", float("nan")]]), ("model.vocab", []),
        ("model.type", "BPE"), ("normalizer", []), ("normalizer", {"type": "Sequence", "normalizers": [{}]}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}), ("pre_tokenizer", 3),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(["}, "content": ""}), ("version", 7),
        ("post_processor.single", PANIC), ("post_processor.special_tokens", {}), ("added_tokens", {}),
        ("added_tokens", [{"id": 0}]),
    ],
)  # fmt: skip
def test_hostile_pipelines(tmp_path: Path, trained: Tokenizer, path: str, value: Any) -> None:
    trained.save(tmp_path)
    content = change(json.loads((tmp_path / "tokenizer.json").read_text()), path, value)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(write(tmp_path, tokenizer_json=content, tokenizer_config_json={}))


def test_a_pattern_that_never_ends_is_an_error_of_the_call(tmp_path: Path, trained: Tokenizer) -> None:
    trained.save(tmp_path)
    endless = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}
    content = change(json.loads((tmp_path / "tokenizer.json").read_text()), "normalizer", endless)
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_json=content, tokenizer_config_json={}))
    with pytest.raises(ValueError, match="pipeline fails"):
        tokenizer("x" * 60)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"])
@pytest.mark.parametrize(
    "content",
    [TOO_DEEP, "[]", "3", "{", '{"a": ' + "9" * 5000 + "}", "\udcff"],
    ids=["deep", "list", "number", "cut", "digits", "bytes"],
)
def test_files_that_are_no_json_object(tmp_path: Path, trained: Tokenizer, name: str, content: str) -> None:
    trained.save(tmp_path)
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(name)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"do_lower_case": "false"}, {"do_lower_case": 0}, {"split_special_tokens": "yes"}, {"padding_side": "top"},
        {"tokenizer_class": 3}, {"model_max_length": "512"}, {"model_max_length": True},
        {"cls_token": 3}, {"pad_token": ""}, {"mask_token": ["[MASK]"]}, {"sep_token": "[NO]"},
        {"added_tokens_decoder": []}, {"added_tokens_decoder": {"x": "y"}}, {"added_tokens_decoder": {"90": {}}},
        {"added_tokens_decoder": {"-1": "<a>"}}, {"added_tokens_decoder": {"2": "<a>"}},
        {"extra_special_tokens": "<a>"}, {"additional_special_tokens": [None]},
    ],
)  # fmt: skip
def test_settings_of_wrong_types(tmp_path: Path, trained: Tokenizer, config: dict) -> None:
    trained.save(tmp_path)
    known = json.loads((tmp_path / "tokenizer_config.json").read_text())
    with pytest.raises(ValueError, match=r"tokenizer_config\.json|tokenizer\.json"):
        load_tokenizer(write(tmp_path, tokenizer_config_json={**known, **config}))


def test_files_beyond_all_sizes_are_not_read(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "spiece.model", "vocab.txt"):
        folder = tmp_path / name
        folder.mkdir()
        with (folder / name).open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(ValueError, match="1099511627776 bytes"):
            load_tokenizer(folder)


def scores(model: bytes, change: Callable[[Any], None]) -> bytes:
    """The model with its pieces changed by `change`; skips where the installed protobuf cannot read the message."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:
        pytest.skip(f"sentencepiece's message does not load: {error}")
    message = sentencepiece_model_pb2.ModelProto.FromString(model)
    change(message.pieces)
    return message.SerializeToString()


def test_scores_that_are_no_numbers_and_pieces_that_are_there_twice(tmp_path: Path, model: bytes) -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        hostile = scores(model, lambda pieces, value=value: setattr(pieces[20], "score", value))
        with pytest.raises(ValueError, match=r"spiece\.model"):
            load_tokenizer(write(tmp_path, spiece_model=hostile))
    hostile = scores(model, lambda pieces: setattr(pieces[20], "piece", pieces[21].piece))
    with pytest.raises(ValueError, match=r"spiece\.model"):
        load_tokenizer(write(tmp_path, spiece_model=hostile))
