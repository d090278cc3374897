"""Bases whose files hold quantised weights: read, dequantised as they are read, or refused before anything loads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from tiny import Lab
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune.errors import ExportError, ModelError
from finetune.exports import merged
from finetune.families import FAMILIES
from finetune.families.family import Family
from finetune.model.dequantise import tensors_of
from finetune.model.folder import find
from finetune.model.load import Precision, load_base
from finetune.model.publish import store_as
from finetune.model.stored import stored
from finetune.model.twin import family_twin
from finetune.recipe.sections import ModelOptions
from finetune.registry import resolve

torch.set_num_threads(1)

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = torch.tensor([*VALUES, *(-one for one in VALUES)])  # E2M1, as the MX specification has it


def base_folder(path: Path, family: str, **changes: Any) -> Path:
    known: Family = resolve("family", family, FAMILIES)
    family_twin(known, vocab_size=2048, **changes).save_pretrained(path)
    for file in zoo.TOKENIZER.iterdir():
        shutil.copyfile(file, path / file.name)
    return path


def rewrite(path: Path, tensors: dict[str, Tensor], quantization: dict[str, Any] | None) -> Path:
    save_file({name: one.contiguous() for name, one in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantization} if quantization else config)
    )
    return path


def fp8(path: Path, block: int = 32) -> Path:
    """A DeepSeek-V3 twin in FP8, and beside it, as `path`-plain, the weights that those stand for."""
    base_folder(path, "deepseek_v3")
    shutil.copytree(path, f"{path}-plain")
    packed: dict[str, Tensor] = {}
    plain = load_file(path / "model.safetensors")
    for name, weight in plain.items():
        packed[name] = weight
        if "_proj" in name and weight.dim() == 2:
            rows, columns = weight.shape
            short = (-rows % block, -columns % block)  # of the last block, as of DeepSeek-V3's kv_a_proj_with_mqa
            whole = torch.nn.functional.pad(weight, (0, short[1], 0, short[0]))
            blocks = whole.reshape(whole.shape[0] // block, block, whole.shape[1] // block, block)
            scales = blocks.abs().amax((1, 3)) / 448.0
            numbers = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            read = (numbers.float() * scales[:, None, :, None]).reshape(whole.shape)
            packed |= {name: numbers.reshape(whole.shape)[:rows, :columns].contiguous(), f"{name}_scale_inv": scales}
            plain[name] = read[:rows, :columns].contiguous()
    assert any(one.shape[0] % block for name, one in packed.items() if f"{name}_scale_inv" in packed)
    rewrite(Path(f"{path}-plain"), plain, None)
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [block, block]}
    return rewrite(path, packed, how)


def mxfp4(path: Path) -> Path:
    """A gpt-oss twin whose experts are in MXFP4, and beside it, as `path`-plain, the weights that those stand for."""
    base_folder(path, "gpt_oss", intermediate_size=64)
    shutil.copytree(path, f"{path}-plain")
    plain = load_file(path / "model.safetensors")
    packed = dict(plain)
    drawn = torch.Generator().manual_seed(0)
    for name in [name for name in plain if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, out = plain[name].shape
        blocks = torch.randint(0, 256, (experts, out, into // 32, 16), generator=drawn, dtype=torch.uint8)
        scales = torch.randint(120, 125, (experts, out, into // 32), generator=drawn, dtype=torch.uint8)
        numbers = torch.stack([FP4[(blocks & 15).long()], FP4[(blocks >> 4).long()]], dim=-1).flatten(-2)
        whole = numbers * torch.exp2(scales.float() - 127)[..., None]
        plain[name] = whole.reshape(experts, out, into).mT
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    assert sum(name.endswith("_scales") for name in packed) == 4
    rewrite(Path(f"{path}-plain"), plain, None)
    return rewrite(path, packed, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})


def bits(path: Path, count: int, kind: str = "llama") -> Path:
    """A base of tests/zoo.py as bitsandbytes saves it."""
    from transformers import BitsAndBytesConfig

    zoo.folder(path, kind, vocab_size=2048)
    config = BitsAndBytesConfig(**{f"load_in_{count}bit": True})
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(path)
    return path


def answers(path: Path, **options: Any) -> Tensor:
    found = find(str(path))
    model = load_base(ModelOptions(name_or_path=str(path), **options), found, Precision("float32", "float32"), "eager")
    with torch.no_grad():
        logits: Tensor = model.eval()(zoo.ids()).logits
    return logits


@pytest.mark.parametrize("made", [fp8, mxfp4])
def test_fp8_and_mxfp4_are_read_as_the_weights_they_stand_for(made: Any, tmp_path: Path) -> None:
    path = made(tmp_path / "base")
    expected = answers(Path(f"{path}-plain"))
    torch.testing.assert_close(answers(path), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_base_in_fp8_and_bfloat16_computes_in_float32_where_that_is_asked(tmp_path: Path) -> None:
    """As the proof of a merge onto DeepSeek-V3 does, whose other weights are in bfloat16."""
    path = tmp_path / "base"
    family_twin(resolve("family", "deepseek_v3", FAMILIES), vocab_size=2048).bfloat16().save_pretrained(path)
    assert store_as(path, "fp8") >= 10
    assert {one.dtype for one in load_file(path / "model.safetensors").values()} >= {
        torch.bfloat16,
        torch.float8_e4m3fn,
    }
    for file in zoo.TOKENIZER.iterdir():
        shutil.copyfile(file, path / file.name)
    assert answers(path).dtype == torch.float32


@pytest.mark.parametrize("made", ["fp8", "mxfp4", "4 bits", "8 bits"])
def test_runs_on_bases_that_are_stored_quantised_are_merged_into_ordinary_weights(made: str, lab: Lab) -> None:
    from peft import PeftModel

    kinds = {"fp8": fp8, "mxfp4": mxfp4, "4 bits": lambda path: bits(path, 4), "8 bits": lambda path: bits(path, 8)}
    kinds[made](lab / "held")
    done = lab.train({"model.name_or_path": "held", "training.max_steps": 4, "training.learning_rate": 0.02}).ok()
    assert "stored in" in done.stderr
    assert ("dequantised" in done.stderr) == (made in ("fp8", "mxfp4"))
    assert json.loads((lab / "run/adapter/finetune.json").read_text())["quantization"] is None
    facts = lab.warm.run("merge", "run", "--dtype", "float32", "--json", cwd=lab.folder).ok().json
    assert facts["proved"]
    assert facts["dequantised_from"] == {"fp8": "FP8", "mxfp4": "MXFP4"}.get(made, f"bitsandbytes {made[0]}-bit")
    merged = load_file(lab / "run/merged/model.safetensors")
    assert {one.dtype for one in merged.values()} == {torch.float32}
    before, after = (json.loads((lab / name / "config.json").read_text()) for name in ("held", "run/merged"))
    del before["quantization_config"]
    assert after == {**before, "dtype": "float32"}
    whole, report = AutoModelForCausalLM.from_pretrained(lab / "run/merged", output_loading_info=True)
    assert (report["missing_keys"], report["unexpected_keys"]) == (set(), set())
    if made not in ("fp8", "mxfp4"):
        return
    assert merged.keys() == load_file(lab / "held-plain/model.safetensors").keys()
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(lab / "held-plain"), str(lab / "run/adapter")
    )
    with torch.no_grad():
        expected, found = (model.eval()(zoo.ids()).logits for model in (plain, whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_an_fp8_weight_whose_blocks_do_not_fit_is_read_with_the_blocks_of_its_config(tmp_path: Path) -> None:
    path = base_folder(tmp_path / "base", "llama")
    numbers = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    tensors = {"a.weight": numbers, "a.weight_scale_inv": scales, "norm.weight": torch.ones(3)}
    rewrite(path, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    found = tensors_of(find(str(path)))
    assert found.keys() == {"a.weight", "norm.weight"}
    whole = found["a.weight"].read()
    assert torch.equal(whole[32:, :32], numbers[32:, :32].float() * 4)
    assert torch.equal(whole[:32, 32:], numbers[:32, 32:].float() * 2)
    assert found["a.weight"].entry.size == 40 * 64 * 4  # the twin's config says float32


def fp8_of(path: Path, numbers: Tensor, scales: Tensor, block: list[int] | None) -> Tensor:
    """A weight in FP8 as a merge reads it."""
    base_folder(path, "llama")
    tensors = {"experts.down_proj": numbers, "experts.down_proj_scale_inv": scales}
    rewrite(path, tensors, {"quant_method": "fp8", "weight_block_size": block})
    return tensors_of(find(str(path)))["experts.down_proj"].read()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("block", [None, [16, 16]])
def test_an_fp8_weight_with_one_scale_is_read(shape: tuple[int, ...], block: list[int] | None, tmp_path: Path) -> None:
    numbers = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    found = fp8_of(tmp_path / "base", numbers, torch.full(shape, 0.5), block)
    assert torch.equal(found, numbers.float() * 0.5)


@pytest.mark.parametrize("block", [None, [32, 64]])
def test_fp8_experts_in_one_tensor_have_their_own_scales(block: list[int] | None, tmp_path: Path) -> None:
    drawn = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, 64, 128, generator=drawn).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 2, 2, generator=drawn)
    found = fp8_of(tmp_path / "base", numbers, scales, block)
    for expert, row, column in torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(2)).tolist():
        rows, columns = slice(32 * row, 32 * row + 32), slice(64 * column, 64 * column + 64)
        part = numbers[expert, rows, columns].float() * scales[expert, row, column]
        assert torch.equal(found[expert, rows, columns], part)


@pytest.mark.parametrize(
    ("scales", "block"),
    [
        (torch.ones(4), None),  # one for each expert, without the dimensions of a grid
        (torch.ones(2, 2), None),
        (torch.ones(4, 2, 2), [16, 16]),  # a grid that covers a part
        (torch.ones(4, 2, 2, dtype=torch.uint8), None),  # exponents
    ],
)
def test_fp8_scales_that_do_not_fit_are_refused(scales: Tensor, block: list[int] | None, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^experts\.down_proj: \(4, 64, 128\) numbers in FP8 with .* no merge reads"):
        fp8_of(tmp_path / "base", torch.ones(4, 64, 128).to(torch.float8_e4m3fn), scales, block)


def test_a_weight_in_8_bits_without_its_scales_is_refused(tmp_path: Path) -> None:
    path = base_folder(tmp_path / "base", "llama")
    rewrite(path, {"a.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}, {"quant_method": "fp8"})
    with pytest.raises(ExportError, match=r"a\.weight is stored in a way that no merge reads"):
        tensors_of(find(str(path)))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "exl3"])
def test_formats_that_are_not_read_are_refused_before_anything_is_written(method: str, lab: Lab) -> None:
    path = zoo.folder(lab / "held", "llama", vocab_size=2048)
    rewrite(path, load_file(path / "model.safetensors"), {"quant_method": method, "bits": 4})
    for verb in ("train", "targets"):
        done = lab.warm.run(verb, lab.recipe({"model.name_or_path": "held"}), cwd=lab.folder)
        assert done.returncode == 5
        assert "name the unquantised weights" in done.stderr
        assert "model.quantization: nf4" in done.stderr
    assert not (lab / "run").exists()


@pytest.mark.parametrize("facts", [{"load_in_4bit": True}, {"quant_method": "fp8"}, {"quant_method": "mxfp4"}])
def test_another_quantisation_of_quantised_weights_is_refused(facts: dict[str, Any]) -> None:
    for config in ({"quantization_config": facts}, {"text_config": {"quantization_config": facts}}):
        assert stored("base", config, "none") is not None
        with pytest.raises(ModelError, match=r"whose weights are stored in .* already; write none"):
            stored("base", config, "nf4")
    assert stored("base", {}, "nf4") is None


@pytest.mark.parametrize("count", [4, 8])
def test_a_base_stored_in_bitsandbytes_whose_layers_are_transposed_is_refused(count: int, lab: Lab) -> None:
    """By everything that reads it: what training would put into an adapter no merge could put into the weights."""
    from peft import LoraConfig, get_peft_model

    zoo.folder(lab / "plain", "gpt2", vocab_size=2048)
    path = bits(lab / "held", count, "gpt2")
    config = LoraConfig(r=2, target_modules=["attn.c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    plain = AutoModelForCausalLM.from_pretrained(lab / "plain")
    get_peft_model(plain, config).save_pretrained(str(lab / "adapter"), save_embedding_layers=False)
    said = rf"stored in bitsandbytes {count}-bit, and transformer\.h\.0\.attn\.c_attn and 7 more of its layers"
    with pytest.raises(ModelError, match=said):
        answers(path)
    done = lab.warm.run("targets", lab.recipe({"model.name_or_path": "held"}), cwd=lab.folder)
    assert done.returncode == 5
    assert re.search(said, done.stderr.replace("\n", " "))
    (lab / "merged").mkdir()
    with pytest.raises(ModelError, match=said):
        merged.write(find(str(path)), lab / "adapter", lab / "merged", "auto", "5GB", "", {}, None)
    assert not list((lab / "merged").iterdir())


def test_full_fine_tuning_of_quantised_weights_is_refused(lab: Lab) -> None:
    path = zoo.folder(lab / "held", "llama", vocab_size=2048)
    rewrite(path, load_file(path / "model.safetensors"), {"quant_method": "fp8"})
    done = lab.train({"model.name_or_path": "held", "adapter": {"method": "none"}})
    assert done.returncode == 5
    assert "adapter.method: none" in done.stderr
    assert not (lab / "run").exists()
