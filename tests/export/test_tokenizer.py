"""The converted tokenizer against transformers, and refusing other tokenizers."""

import json
from pathlib import Path

import pytest
import transformers

from dcformer_deploy.export.text import TextSpec
from dcformer_deploy.export.tokenizer import TokenizerWarning, convert_tokenizer
from dcformer_deploy.runtime import InputError
from dcformer_deploy.runtime.text import Tokenizer

TEXT = TextSpec(vocab_size=512, hidden_size=768, layers=1, intermediate_size=128, max_positions=512, token_types=2)
TEXTS = ["Pleural effusion is present.", "LUNG Nodule, 3.5-mm!", "épanchement péricardique", "", "中 [SEP] [PAD] ##a",
         "tab\tnewline\nnull\x00 end", "word" * 60, "a  b"]


def test_same_ids_as_transformers(tokenizer_folder: Path, tmp_path: Path):
    """transformers' BertTokenizer with do_lower_case is what the published training uses."""
    spec = convert_tokenizer(tokenizer_folder, TEXT, tmp_path / "tokenizer.json")
    reference = transformers.BertTokenizer.from_pretrained(str(tokenizer_folder), do_lower_case=True)
    expected = reference(TEXTS, padding=True, return_tensors="np")
    ids, mask = Tokenizer(tmp_path / "tokenizer.json", spec).encode(TEXTS)
    assert ids.tolist() == expected["input_ids"].tolist()
    assert mask.tolist() == expected["attention_mask"].tolist()


def test_tokenizer_json_alone(tokenizer_folder: Path, tmp_path: Path):
    convert_tokenizer(tokenizer_folder, TEXT, tmp_path / "tokenizer.json")
    (tmp_path / "again").mkdir()
    spec = convert_tokenizer(tmp_path, TEXT, tmp_path / "again" / "tokenizer.json")
    first, second = (Tokenizer(folder / "tokenizer.json", spec).encode(TEXTS)[0]
                     for folder in (tmp_path, tmp_path / "again"))
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize(("files", "message"), [
    ({}, "neither vocab.txt nor tokenizer.json"),
    ({"tokenizer.json": "{"}, "damaged tokenizer"),
    ({"vocab.txt": "a\nb\n"}, r"no token \[CLS\]|damaged tokenizer"),
    ({"vocab.txt": "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(600))])},
     "token ids go up to 604 but the checkpoint embeds 512"),
])
def test_unusable_folders(tmp_path: Path, files: dict[str, str], message: str):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        convert_tokenizer(tmp_path, TEXT, tmp_path / "out.json")


def test_tokenizer_json_that_adds_no_special_tokens(tokenizer_folder: Path, tmp_path: Path):
    """The text encoder is read at position 0, which must be [CLS]."""
    convert_tokenizer(tokenizer_folder, TEXT, tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"without \[CLS\] first"):
        convert_tokenizer(tmp_path, TEXT, tmp_path / "out.json")


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(InputError, match="no such tokenizer folder"):
        convert_tokenizer(tmp_path / "none", TEXT, tmp_path / "out.json")


def test_smaller_vocabulary_is_a_warning(tmp_path: Path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nlung\n")
    with pytest.warns(TokenizerWarning, match="6 tokens, the checkpoint embeds 512"):
        convert_tokenizer(tmp_path, TEXT, tmp_path / "out.json")
