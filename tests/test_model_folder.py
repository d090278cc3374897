"""A base folder is whole, or every fault of it is named before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from finetune.errors import EnvironmentFault, ModelError, RecipeError
from finetune.model.fetch import fetch
from finetune.model.folder import INDEX, SINGLE, Base, check, find, safetensors_header
from finetune.model.load import Precision, load_base, load_tokenizer, stop_ids
from finetune.recipe.sections import ModelOptions

torch.set_num_threads(1)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 723674912\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that tests copy: `one` weight file, and `many`."""
    root = tmp_path_factory.mktemp("made")
    zoo.folder(root / "one")
    zoo.folder(root / "many", max_shard_size="200KB")
    assert len(list((root / "many").glob("model-*.safetensors"))) >= 3
    return root


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    """A whole base in one file, which a test may damage."""
    return shutil.copytree(made / "one", tmp_path / "base")


@pytest.fixture
def sharded(made: Path, tmp_path: Path) -> Path:
    """A whole base in several files, which a test may damage."""
    return shutil.copytree(made / "many", tmp_path / "sharded")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def faults(folder: Path) -> list[str]:
    """What is wrong with a folder, line by line, without the first."""
    with pytest.raises(ModelError) as caught:
        check("base", folder)
    first, *lines = str(caught.value).splitlines()
    assert first == f"the base model {folder} is not whole:"
    return [line.strip() for line in lines]


def test_a_whole_folder_passes(base: Path, sharded: Path) -> None:
    found = find(str(base))
    assert found == Base(str(base), base, json.loads((base / "config.json").read_text()), (base / SINGLE,))
    assert found.model_type == "llama"
    assert find(str(sharded)).weights == tuple(sorted(sharded.glob("model-*.safetensors")))


@pytest.mark.parametrize("name", ["./m", "../m", "/nowhere/m", "a/b/c", "data/m", "data", "~/no-such-folder"])
def test_a_path_that_does_not_exist_is_never_taken_for_a_model_id(here: Path, name: str) -> None:
    (here / "data").mkdir()
    if name == "data":
        assert "config.json is missing" in faults(Path("data"))[0]
        return
    with pytest.raises(ModelError, match=r"model\.name_or_path: .* does not exist \(looked for /"):
        find(name)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "org/name_1.b", "data/m"])
def test_what_cannot_be_a_path_is_a_model_id(here: Path, name: str) -> None:
    found = find(name)
    assert (found.folder, found.config, found.weights, found.model_type) == (None, {}, (), "")


@pytest.mark.parametrize("name", ["a b", "org/", "ürg/x", "org/na me", "gpt2\n", "-x", "a:b"])
def test_what_is_neither_is_said_so(here: Path, name: str) -> None:
    with pytest.raises(ModelError, match="neither a folder nor a model id"):
        find(name)


def test_a_missing_folder_gets_a_hint(here: Path, base: Path) -> None:
    shutil.copytree(base, here / "models" / "right")
    with pytest.raises(ModelError, match="models there: right"):
        find("models/wrong")
    with pytest.raises(ModelError, match="`finetune base smollm2` makes it"):
        find("./data/smollm2-135m-instruct")
    (here / "Qwen").mkdir()
    with pytest.raises(ModelError, match="as there is a folder Qwen/ here, this is no model id"):
        find("Qwen/Qwen3-0.6B")
    with pytest.raises(ModelError, match="no such user"):
        find("~nobody-of-this-name/x")


def test_a_file_is_no_folder(base: Path) -> None:
    with pytest.raises(ModelError, match=r"is a file; name the folder that holds config\.json"):
        find(str(base / SINGLE))


def _unlink(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def _write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def _cut(name: str, drop: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-drop])

    return damage


def _rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


def _adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (_unlink("config.json"), "config.json is missing; name the folder that holds it"),
    (_adapter, "this is an adapter, not a base (adapter_config.json); name the base it was trained on"),
    (_write("config.json", POINTER), "config.json is a git-lfs pointer"),
    (_write("config.json", '{"model_type": '), "config.json cannot be read: Expecting value"),
    (_write("config.json", "[]"), "config.json cannot be read: not a mapping"),
    (_write("config.json", "[" * 100_000), "config.json cannot be read: maximum recursion"),
    (_write("config.json", "{}"), "config.json has no model_type"),
    (_write("config.json", '{"model_type": 3}'), "config.json has no model_type"),
    (_unlink("tokenizer.json"), "no tokenizer (tokenizer.json, tokenizer.model, vocab.json, …)"),
    (_write("tokenizer.json", POINTER), "tokenizer.json is a git-lfs pointer"),
    (_write("tokenizer_config.json", POINTER), "tokenizer_config.json is a git-lfs pointer"),
    (_write(SINGLE, POINTER), f"{SINGLE} is a git-lfs pointer, not the file; run `git lfs pull`"),
    (_write(SINGLE, ""), f"{SINGLE} is damaged or half downloaded: not a safetensors file"),
    (_cut(SINGLE, 1), f"{SINGLE} is damaged or half downloaded: "),
    (_cut(SINGLE, 100_000), f"{SINGLE} is damaged or half downloaded: "),
    (_unlink(SINGLE), f"no weights: neither {SINGLE} nor {INDEX}"),
    (_rename(SINGLE, "pytorch_model.bin"), "weights are pickled (pytorch_model.bin), which can run code"),
    (_rename(SINGLE, "model.Q4_1.gguf"), "weights are GGUF (model.Q4_1.gguf)"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES, ids=[said[:50] for _, said in DAMAGES])
def test_each_damage_is_named_alone(base: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(base)
    (line,) = faults(base)
    assert line.startswith(said)


SHARD = "model-00002-of-"


def _shard(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.name.startswith(SHARD))


def _index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return damage


SHARDED: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: _shard(folder).unlink(), SHARD),
    (lambda folder: _shard(folder).write_text(POINTER), SHARD),
    (lambda folder: _cut(_shard(folder).name, 7)(folder), SHARD),
    (_write(INDEX, POINTER), f"{INDEX} is a git-lfs pointer"),
    (_write(INDEX, "{"), f"{INDEX} cannot be read"),
    (_write(INDEX, '{"weight_map": []}'), f"{INDEX} cannot be read"),
    (_write(INDEX, '{"weight_map": {}}'), f"{INDEX} cannot be read: ValueError('it names no files')"),
    (_write(INDEX, '{"weight_map": {"a": 1, "b": "x"}}'), f"{INDEX} cannot be read"),
    (
        _index(lambda names: names.update(x="../../etc/passwd")),
        f"{INDEX} names '../../etc/passwd', which points out of",
    ),
    (_index(lambda names: names.update(x="/etc/passwd")), f"{INDEX} names '/etc/passwd', which points out of"),
    (_index(lambda names: names.update(x="..")), ".. is missing though"),
]


@pytest.mark.parametrize(("damage", "said"), SHARDED, ids=range(len(SHARDED)))
def test_each_damage_of_several_files_is_named_alone(
    sharded: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(sharded)
    (line,) = faults(sharded)
    assert line.startswith(said)


def test_all_faults_are_named_at_once(sharded: Path) -> None:
    _shard(sharded).unlink()
    next(sharded.glob("model-00001*")).write_text(POINTER)
    _cut(next(sharded.glob("model-00003*")).name, 1)(sharded)
    (sharded / "config.json").write_text("{}")
    (sharded / "tokenizer.json").unlink()
    lines = faults(sharded)
    assert len(lines) == 5
    assert all(
        any(word in line for line in lines) for word in ("model_type", "no tokenizer", "00001", "00002", "00003")
    )


def test_a_single_file_comes_before_an_index_as_in_transformers(sharded: Path, made: Path) -> None:
    shutil.copyfile(made / "one" / SINGLE, sharded / SINGLE)
    _shard(sharded).unlink()  # what the index names is not looked at
    found = find(str(sharded))
    assert found.weights == (sharded / SINGLE,)
    model = load_base(ModelOptions(name_or_path=str(sharded)), found, Precision("float32", "float32"), "eager")
    assert torch.equal(model.lm_head.weight, load_file(sharded / SINGLE)["lm_head.weight"])


def test_a_file_that_cannot_be_read_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, **how: str) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", fail)
    assert faults(base) == ["config.json cannot be read: Permission denied"]


def test_a_header_is_read_as_safetensors_does(base: Path) -> None:
    header = safetensors_header(base / SINGLE)
    tensors = load_file(base / SINGLE)
    assert len(tensors) >= 10
    assert header.keys() == tensors.keys()
    assert all(tuple(header[name]["shape"]) == tuple(tensor.shape) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": []}},
        {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}},
        {"a": 3},
        {"a": []},
        [],
        3,
    ],
)
def test_a_header_that_lies_is_found(tmp_path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"header is wrong about a|not a safetensors file"):
        safetensors_header(tmp_path / SINGLE)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=60) | st.binary(max_size=60).map(lambda b: len(b).to_bytes(8, "little") + b))
def test_no_file_makes_the_header_reader_do_anything_but_value_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / SINGLE
    path.write_bytes(content)
    try:
        header = safetensors_header(path)
    except ValueError:
        return
    assert header == {}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_a_download_that_stopped_anywhere_is_found(made: Path, tmp_path: Path, share: float) -> None:
    whole = (made / "one" / SINGLE).read_bytes()
    part = tmp_path / SINGLE
    part.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"bytes where its header needs|not a safetensors file"):
        safetensors_header(part)


def test_the_fingerprint_tells_a_fine_tune_from_its_base(base: Path, tmp_path: Path) -> None:
    first = find(str(base)).fingerprint()
    assert first == check("another name", base).fingerprint()
    other = zoo.folder(tmp_path / "other", seed=1)
    assert (other / SINGLE).stat().st_size == (base / SINGLE).stat().st_size
    assert find(str(other)).fingerprint() != first
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rope_theta": 7.0}))
    assert find(str(base)).fingerprint() != first


# -- fetch ---------------------------------------------------------------------------------------------------------


def test_a_local_folder_is_not_fetched(base: Path) -> None:
    found = find(str(base))
    assert fetch(found, None) is found
    with pytest.raises(RecipeError, match=r"model\.revision: does nothing for a local folder"):
        fetch(found, "main")


def test_a_model_of_the_hub_that_is_not_cached_is_refused_offline(refused: Callable[[], list[str]]) -> None:
    with pytest.raises(EnvironmentFault, match="not in the cache and HF_HUB_OFFLINE is set") as caught:
        fetch(Base("org/name", None, {}), None)
    assert caught.value.exit_code == 4
    assert refused() == []


def test_a_cached_model_is_taken_and_checked(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub._snapshot_download as hub

    cache = tmp_path / "hub" / "models--org--name"
    commit = "0" * 40
    shutil.copytree(made / "one", cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    found = fetch(find("org/name"), None)
    assert found.folder == cache / "snapshots" / commit
    assert found.name == "org/name"
    assert found.model_type == "llama"
    (cache / "snapshots" / commit / SINGLE).rename(tmp_path / SINGLE)
    assert fetch(find("org/name"), None, weights=False).weights == ()
    with pytest.raises(ModelError, match="no weights"):
        fetch(find("org/name"), None)
    (cache / "snapshots" / commit / SINGLE).write_text(POINTER)
    with pytest.raises(ModelError, match="git-lfs pointer"):
        fetch(find("org/name"), "main")


# -- load ----------------------------------------------------------------------------------------------------------


def load(folder: Path, base: str = "float32", compute: str = "float32") -> torch.nn.Module:
    return load_base(ModelOptions(name_or_path="base"), find(str(folder)), Precision(compute, base), "eager")


def test_weights_of_the_files_dtype_are_mapped_from_them_and_shared_by_all_processes(base: Path) -> None:
    def mapped(model: torch.nn.Module) -> int:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(SINGLE)]
        places = [[int(end, 16) for end in words[0].split("-")] for words in lines]
        return sum(any(a <= one.data_ptr() < b for a, b in places) for one in model.parameters())

    model = load(base)
    assert mapped(model) == len(list(model.parameters()))
    assert mapped(load(base, "bfloat16")) == 0


def test_the_dtype_is_the_one_stated(base: Path) -> None:
    assert {parameter.dtype for parameter in load(base).parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load(base, "bfloat16").parameters()} == {torch.bfloat16}


def test_loading_changes_nothing_that_a_save_would_keep(base: Path, tmp_path: Path) -> None:
    load(base).save_pretrained(tmp_path / "again")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "again"))
    assert after == before


def _drop(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, r"lacks 9 weights, which would be random:\n  model\.layers\.2\.\S+: in no file"),
        ({"vocab_size": 600}, r"lacks 2 weights.*\n  lm_head\.weight: \(512, 64\) in its file, \(600, 64\) by config"),
        ({"num_attention_heads": 5}, r"cannot load the model of base \(.*multiple of the number of attention heads"),
        ({"hidden_act": "nope"}, r"cannot load the model of base \(KeyError: 'nope'\)"),
        ({"model_type": "nonesuch"}, "cannot load the model of base .*nonesuch"),
        ({"model_type": "t5"}, "cannot load the model of base"),
    ],
)
def test_a_config_that_does_not_fit_its_weights_is_refused(base: Path, changes: dict[str, object], said: str) -> None:
    _drop(base, **changes)
    with pytest.raises(ModelError, match=said):
        load(base)


@pytest.mark.parametrize("content", ["", "{", "{}", "null", '{"version": "1.0", "model": {"type": "XX"}}', "[1]"])
def test_a_broken_tokenizer_is_a_fault_of_the_base(base: Path, content: str) -> None:
    (base / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"cannot load the tokenizer of x \(\w+: "):
        load_tokenizer(ModelOptions(name_or_path="x"), find(str(base)))


def test_a_tokenizer_without_any_pad_token_gets_one_that_is_masked(base: Path) -> None:
    config = json.loads((base / "tokenizer_config.json").read_text())
    for name in ("pad_token", "eos_token"):
        config.pop(name, None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "special_tokens_map.json").unlink(missing_ok=True)
    tokenizer = load_tokenizer(ModelOptions(name_or_path="x"), find(str(base)))
    assert isinstance(tokenizer.pad_token_id, int)


def test_stop_ids_come_from_three_places(base: Path) -> None:
    tokenizer = load_tokenizer(ModelOptions(name_or_path="x"), find(str(base)))
    _drop(base, eos_token_id=[7, 8])
    (base / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert stop_ids(tokenizer, find(str(base))) == {7, 8, 9, tokenizer.eos_token_id}
    for broken in ("{", "[1]", "3"):
        (base / "generation_config.json").write_text(broken)
        with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
            stop_ids(tokenizer, find(str(base)))
