"""How a run is laid over its processes: DDP, DeepSpeed's ZeRO or FSDP2. Needs no torch.

A mode is read where accelerate reads it: from the variables that its launcher sets, or, where another launcher started
this process (torchrun, deepspeed), from the same configuration file, which the recipe names. What the recipe decides
(batches, accumulation, clipping, precision, checkpointing of activations) is filled in from the recipe; a configuration
that says otherwise is refused before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune.errors import RecipeError
from finetune.recipe.sections import LaunchOptions, ModelOptions, TrainingOptions
from finetune.registry import nearest
from finetune.run import fsdp, zero
from finetune.run.batch import BatchShape
from finetune.run.launcher_file import read_yaml
from finetune.run.launcher_keys import file_faults, kind_of, variable_faults
from finetune.run.launcher_values import is_yes, whole


@dataclass(frozen=True)
class Mode:
    """How weights, gradients and optimizer state lie over the processes.

    Attributes:
        kind: what wraps the model.
        source: where that was said, for messages.
        settings: DeepSpeed's configuration, or FSDP's values without their prefix; empty under DDP.
        precision: `mixed_precision` of the accelerate configuration; "no" where it leaves that to the recipe.
    """

    kind: Literal["ddp", "deepspeed", "fsdp"] = "ddp"
    source: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    precision: str = "no"

    @property
    def stage(self) -> int:
        """ZeRO's stage; 0 without DeepSpeed."""
        return int(self.settings.get("zero_optimization", {}).get("stage", 0)) if self.kind == "deepspeed" else 0

    @property
    def spreads(self) -> bool:
        """Whether each process holds only a part of each weight."""
        return self.kind == "fsdp" or self.stage == 3

    @property
    def offloads(self) -> tuple[str, ...]:
        """What lies in the host's memory: "optimizer", "param"."""
        if self.kind == "fsdp":
            return ("optimizer", "param") if is_yes(self.settings.get("offload_params")) else ()
        return zero.offloads(self.settings) if self.kind == "deepspeed" else ()

    @property
    def facts(self) -> frozenset[str]:
        """What finetune/recipe/combinations.py knows it by; empty under DDP."""
        names = {"ddp": "", "deepspeed": f"ZeRO-{self.stage}", "fsdp": "FSDP"}
        return frozenset(filter(None, [names[self.kind]]))

    @property
    def note(self) -> str:
        """What of the configuration is not followed, in words; empty where all is."""
        return fsdp.note(self.settings) if self.kind == "fsdp" else ""

    def __str__(self) -> str:
        """As a reader knows it."""
        if self.kind == "ddp":
            return "DDP"
        name = "FSDP2" if self.kind == "fsdp" else f"ZeRO-{self.stage}"
        words = {"optimizer": "optimizer state", "param": "weights"}
        return name + (f", {' and '.join(words[one] for one in self.offloads)} on the CPU" if self.offloads else "")


def config_file(name: str, configs: Path) -> Path:
    """The accelerate configuration that `launch.config` names: a file, or one of those that come along by its stem.

    Raises:
        RecipeError: there is none.
    """
    shipped = configs / "accelerate" / f"{name}.yaml"
    path = shipped if shipped.is_file() and not Path(name).is_file() else Path(name).expanduser()
    if path.is_file():
        return path
    known = sorted(one.stem for one in shipped.parent.glob("*.yaml"))
    near = nearest(Path(name).stem, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise RecipeError(f"launch.config: {name} does not exist{hint} (shipped are {', '.join(known)})")


def mode_of(options: LaunchOptions, configs: Path, environment: Mapping[str, str]) -> Mode:
    """The mode of this process.

    Args:
        options: the launch section.
        configs: the folder of shipped configurations.
        environment: this process's variables.

    Raises:
        RecipeError: a configuration cannot be read, or the launcher was given another than the recipe names.
    """
    started = _from_variables(environment, configs)
    if options.config is None:
        return started
    named = read_mode(config_file(options.config, configs), configs)
    if (started.kind != "ddp" or by_accelerate(environment)) and not _agree(started, named):
        told = ", ".join(filter(None, [str(started), started.source]))
        raise RecipeError(
            f"launch.config: the recipe says {options.config} ({named}) and the launcher was given another "
            f"configuration ({told}); give it the same file, or remove the key"
        )
    return named


def _agree(started: Mode, named: Mode) -> bool:
    """Whether the launcher was given what the recipe names: it sets variables also for what FSDP's file leaves out."""
    assumed = fsdp.DEFAULTS if started.kind == "fsdp" else {}
    return started.kind == named.kind and {**assumed, **started.settings} == {**assumed, **named.settings}


def read_mode(path: Path, configs: Path) -> Mode:
    """The mode that an accelerate configuration file asks for.

    Raises:
        RecipeError: it, or the DeepSpeed configuration that it names, cannot be read, holds a key that nothing reads,
            or a value there is of no kind that accelerate or DeepSpeed takes.
    """
    found = _read_yaml(path)
    if faults := file_faults(found, str(path)):
        raise RecipeError("\n".join(faults))
    precision = str(found.get("mixed_precision") or "no").lower()
    kind = kind_of(found)
    if kind == "DEEPSPEED":
        given = _section(found, "deepspeed_config", path)
        file = given.get("deepspeed_config_file")
        if file:
            return Mode("deepspeed", str(path), zero.read_file(str(file), path, configs), precision)
        settings = zero.read_inline(given, f"{path}: deepspeed_config")
        return Mode("deepspeed", str(path), settings, precision)
    if kind == "FSDP":
        settings = fsdp.read(_section(found, "fsdp_config", path), f"{path}: fsdp_config")
        return Mode("fsdp", str(path), settings, precision)
    return Mode("ddp", str(path), precision=precision)


def machines_of(path: Path) -> int:
    """For how many machines an accelerate configuration file is.

    Raises:
        RecipeError: it cannot be read, or its num_machines is no number.
    """
    return whole(_read_yaml(path).get("num_machines") or 1, f"{path}: num_machines")


def _section(found: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    value = found.get(name) or {}
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {name}: expected keys with values, not {value!r}; see configs/accelerate")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = read_yaml(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"launch.config: {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise RecipeError(f"launch.config: {path} is no accelerate configuration; see configs/accelerate")
    return found


def by_accelerate(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's launcher started this process; torchrun and deepspeed leave the mode to the recipe."""
    return "ACCELERATE_DYNAMO_MODE" in environment or "ACCELERATE_CONFIG_DS_FIELDS" in environment


def _from_variables(environment: Mapping[str, str], configs: Path) -> Mode:
    """What accelerate's launcher, or a user in its place, has said."""
    if faults := variable_faults(environment):
        raise RecipeError("\n".join(faults))
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if is_yes(environment.get("ACCELERATE_USE_DEEPSPEED")):
        source, settings = zero.from_variables(environment, configs)
        return Mode("deepspeed", source, settings, precision)
    if is_yes(environment.get("ACCELERATE_USE_FSDP")):
        return Mode("fsdp", "FSDP_VERSION", fsdp.from_variables(environment), precision)
    return Mode(precision=precision)


def enter(mode: Mode, environment: MutableMapping[str, str]) -> None:
    """Set what accelerate and transformers read before they are given any argument.

    ACCELERATE_USE_CPU would leave out DeepSpeed without a word; the trainer's own use_cpu does not. What a launcher
    says of DeepSpeed in variables has been read, and accelerate refuses to have it beside the whole configuration.
    """
    if mode.kind != "ddp":
        environment.pop("ACCELERATE_USE_CPU", None)
    if mode.kind == "deepspeed":
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"
        for name in zero.INLINE:
            environment.pop(name, None)
    if mode.kind == "fsdp":
        environment["ACCELERATE_USE_FSDP"] = "true"
        environment["FSDP_VERSION"] = "2"
        environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def faults(
    mode: Mode, model: ModelOptions, training: TrainingOptions, shape: BatchShape, device: str = "cuda"
) -> list[str]:
    """What of a configuration contradicts the recipe, or cannot be had, each with what to do instead.

    Args:
        mode: from `mode_of` or `read_mode`.
        model: the model section.
        training: the training section.
        shape: the global batch as it is split.
        device: torch device type.
    """
    found = []
    if mode.precision != "no":
        found.append(
            f"{mode.source or 'ACCELERATE_MIXED_PRECISION'}: mixed_precision {mode.precision}: the recipe's "
            'model.dtype decides; write "no"'
        )
    if mode.kind == "deepspeed":
        found += zero.faults(mode.settings, mode.source, training, shape)
    if mode.kind == "fsdp":
        found += fsdp.faults(mode.settings, mode.source, model, device)
    if mode.kind == "deepspeed" and model.dtype == "float16":
        found.append(
            f"model.dtype: float16 is not scaled under {mode} the way it is elsewhere; write bfloat16 or float32, or "
            "take launch.config: ddp"
        )
    return found


def refuse(mode: Mode, model: ModelOptions, training: TrainingOptions, shape: BatchShape, device: str) -> None:
    """Refuse a configuration with faults; see `faults`.

    Raises:
        RecipeError: with all of them.
    """
    if found := faults(mode, model, training, shape, device):
        raise RecipeError("\n".join(found))


def compiles(mode: Mode) -> bool:
    """Whether a run in this mode has DeepSpeed's own optimizer for CPUs compiled, for which a host needs a compiler."""
    return mode.kind == "deepspeed" and zero.own_optimizer(mode.settings)
