"""A run over two hosts, through accelerate's launcher on each: trains as one process does, survives neither a cut
network nor a lost host in silence, and goes on to the same bits.

A host is a network namespace with a name of its own; the two are joined by a pair of virtual interfaces and share the
disk, as a run over several machines must. They reach nothing else.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_train_ranks import TEN_STEPS
from tiny import Lab, chats, write_rows

from finetune.errors import ExitCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 20  # launch.timeout, in seconds
PORT = 29600
LONG = {
    "data.train": "many.jsonl",
    "adapter.lora_dropout": 0.1,
    "training.max_steps": 200,
    "training.num_train_epochs": 1000,
    "training.global_batch_size": 4,
    "training.save_steps": 10,
    "training.save_total_limit": 2,
    "launch.timeout": TIMEOUT,
}


@dataclass(frozen=True)
class Host:
    """One machine of the run.

    Attributes:
        name: of the namespace and of the host in it.
        number: its rank among the machines.
        link: its interface.
    """

    name: str
    number: int
    link: str

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number + 1}"

    def processes(self) -> list[int]:
        """What runs on it."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """All of its processes at once, as a power cut would."""
        for _ in range(3):  # what one of them has just started, too
            for pid in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def join(self, up: bool = True) -> None:
        """Join it to the other one, or part them: no packet arrives or leaves any more, and nobody is told."""
        _ip("-n", self.name, "link", "set", self.link, "up" if up else "down")


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()]


def remove_leftovers() -> None:
    """Remove what runs of these tests have left that were killed, told by the process that is named in it."""
    for name in _namespaces():
        owner = re.fullmatch(r"ft-(\d+)-[ab]", name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            with suppress(OSError):  # another run of the tests may be at it
                Host(name, 0, "").kill()
                _ip("netns", "delete", name)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts; they are removed, with all that runs on them, whatever happens."""
    if not all(map(shutil.which, ("ip", "unshare"))):
        pytest.skip("two hosts need the commands ip and unshare")
    remove_leftovers()
    pid = os.getpid()
    first, second = (Host(f"ft-{pid}-{end}", number, f"ft{pid}{end}") for number, end in enumerate("ab"))
    with ExitStack() as stack:
        for host in (first, second):
            try:
                _ip("netns", "add", host.name)
            except OSError as error:
                pytest.skip(f"two hosts need network namespaces, which are not permitted here: {error}")
            stack.callback(_ip, "netns", "delete", host.name)
            stack.callback(host.kill)
        try:
            _ip("link", "add", first.link, "netns", first.name, "type", "veth",
                "peer", "name", second.link, "netns", second.name)  # fmt: skip
        except OSError as error:
            pytest.skip(f"two hosts need virtual interfaces, which are not permitted here: {error}")
        for host in (first, second):
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.link)
            _ip("-n", host.name, "link", "set", "lo", "up")
            host.join()
        yield first, second


class Command:
    """What is run on one host, with what it says."""

    def __init__(self, host: Host, lab: Lab, words: list[str]) -> None:
        self.host, self.said = host, lab / f"said-{host.name}-{time.monotonic_ns()}"
        # The namespace is what keeps this from the network.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": host.link}
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host.name]
        with open(self.said, "wb") as said:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", host.name, *named, *words],
                cwd=lab.folder, env=environment, stdout=said, stderr=said, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.said.read_text(errors="replace")


def started(
    lab: Lab, hosts: tuple[Host, Host], recipe: str, config: str = "multi-node-ddp", count: int = 2
) -> list[Command]:
    """The same run of `count` processes on both hosts, as the configuration's own comment says."""
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / f"configs/accelerate/{config}.yaml"),
        "--num_processes", str(count),
        "--main_process_ip", hosts[0].address, "--main_process_port", str(PORT),
    ]  # fmt: skip
    return [
        Command(host, lab, [*launcher, "--machine_rank", str(host.number), "-m", "finetune.train", recipe])
        for host in hosts
    ]


def ended(commands: list[Command], within: float) -> list[int]:
    """Their exit codes; nothing may be left on their hosts."""
    deadline = time.monotonic() + within
    codes = []
    for command in commands:
        try:
            codes.append(command.process.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            pytest.fail(f"{command.host.name} goes on after {within} s:\n" + "\n---\n".join(c.output for c in commands))
    while any(command.host.processes() for command in commands):
        assert time.monotonic() < deadline, [command.host.processes() for command in commands]
        time.sleep(0.1)
    return codes


def wait_for_checkpoint(lab: Lab, commands: list[Command]) -> None:
    """Until the run has written its first checkpoint."""
    deadline = time.monotonic() + 240
    while not list((lab / "run/checkpoints").glob("checkpoint-*")):
        assert all(command.process.poll() is None for command in commands), [c.output for c in commands]
        assert time.monotonic() < deadline, [c.output for c in commands]
        time.sleep(0.05)


def test_hosts_of_a_run_that_was_killed_are_removed_and_those_of_one_that_lives_are_not(
    hosts: tuple[Host, Host],
) -> None:
    with subprocess.Popen(["sleep", "600"]) as lives, subprocess.Popen(["true"]) as killed:
        killed.wait()
        names = [f"ft-{owner.pid}-{end}" for owner in (lives, killed) for end in "ab"]
        with ExitStack() as stack:
            stack.callback(lives.kill)
            for name in names:
                _ip("netns", "add", name)
                stack.callback(lambda name=name: _ip("netns", "delete", name) if name in _namespaces() else "")
            left = stack.enter_context(subprocess.Popen(["ip", "netns", "exec", names[2], "sleep", "600"]))
            stack.callback(left.kill)
            remove_leftovers()
            assert left.wait(10) == -signal.SIGKILL
            assert [name for name in names if name in _namespaces()] == names[:2]
            assert {host.name for host in hosts} <= set(_namespaces())


@pytest.mark.parametrize("config", ["multi-node-ddp", "multi-node-zero3"])
def test_two_hosts_train_as_one_process_does(lab: Lab, hosts: tuple[Host, Host], config: str) -> None:
    write_rows(lab / "many.jsonl", chats(20))
    lab.train({**TEN_STEPS, "output_dir": "one"}).ok()
    commands = started(lab, hosts, lab.recipe(TEN_STEPS), config)
    assert ended(commands, 240) == [0, 0], [command.output for command in commands]
    assert "next: finetune evaluate run" in commands[0].output
    assert "next: " not in commands[1].output
    assert lab.losses() == pytest.approx(lab.losses("one"), rel=1e-6)


def disturbed(lab: Lab, hosts: tuple[Host, Host], count: int = 2) -> list[Command]:
    """A run over both hosts that has written its first checkpoint, beside the same run undisturbed on one."""
    write_rows(lab / "many.jsonl", chats(20))
    for outcome in lab.warm.ranks(count, lab.recipe({**LONG, "output_dir": "whole"}), cwd=lab.folder):
        outcome.ok()
    commands = started(lab, hosts, lab.recipe(LONG), count=count)
    wait_for_checkpoint(lab, commands)
    return commands


def assert_hung(command: Command, code: int, gone: list[tuple[int, Host]]) -> None:
    """Each process of a host that is left has said once who is gone and where, and ended with 77."""
    assert code == 1, command.output  # accelerate's launcher loses its processes' codes, and names them
    failed = re.findall(r"exitcode\s*: (-?\d+)", command.output)
    said = [line for line in command.output.splitlines() if line.startswith("error: rank ")]
    assert set(failed) <= {str(ExitCode.HANG), "-15"}, command.output  # the launcher may end the rest itself
    assert str(ExitCode.HANG) in failed
    assert said
    for line in said:
        for rank, host in gone:
            assert re.search(rf"\brank {rank}: [^|]*, process \d+ on {host.name}\b", line), command.output


def assert_goes_on(lab: Lab, hosts: tuple[Host, Host], count: int = 2) -> None:
    """The same commands again end with the bits of the undisturbed run."""
    assert lab.ended()["exit_code"] == ExitCode.HANG
    commands = started(lab, hosts, "recipe.yaml", count=count)
    assert ended(commands, 200) == [0, 0], [command.output for command in commands]
    assert re.search(r"^resume +from run/checkpoints/checkpoint-\d+$", commands[0].output, re.MULTILINE)
    assert lab.adapter() == lab.adapter("whole")
    assert lab.losses() == lab.losses("whole")


def test_a_cut_network_ends_both_hosts_with_the_other_s_name_and_the_run_goes_on_to_the_same_bits(
    lab: Lab, hosts: tuple[Host, Host]
) -> None:
    commands = disturbed(lab, hosts)
    hosts[1].join(up=False)
    codes = ended(commands, 60)
    assert_hung(commands[0], codes[0], [(1, hosts[1])])
    assert_hung(commands[1], codes[1], [(0, hosts[0])])
    for rank in (0, 1):
        assert "most recent call first" in (lab / f"run/hang/rank-{rank}.txt").read_text()
    hosts[1].join()
    assert_goes_on(lab, hosts)


@pytest.mark.parametrize(("lost", "count"), [(0, 2), (1, 4)], ids=["the first", "the second, with two processes"])
def test_a_lost_host_is_named_by_the_other_and_the_run_goes_on_as_if_nothing_had_been(
    lab: Lab, hosts: tuple[Host, Host], lost: int, count: int
) -> None:
    commands = disturbed(lab, hosts, count)
    hosts[lost].kill()
    codes = ended(commands, 60)
    assert codes[lost] == -signal.SIGKILL
    each = count // 2
    assert_hung(commands[1 - lost], codes[1 - lost], [(lost * each + one, hosts[lost]) for one in range(each)])
    assert hosts[lost].name in lab.ended()["reason"]
    assert_goes_on(lab, hosts, count)
