"""setup.py's plan of a build, for this machine and for another one; nothing is compiled."""

from __future__ import annotations

import platform
import runpy
from typing import Any

import pytest
import setuptools
from build_csrc import ROOT, build_module

build = build_module()
OTHER = "aarch64" if platform.machine() != "aarch64" else "x86_64"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines; it is run without its last call, and without the environment's wishes."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("BIGMODEL_TARGET", "BIGMODEL_CUDA", "BIGMODEL_CPU_EXTENSION", "CXX", "CXXFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


def command(setup: dict[str, Any], inplace: bool = False) -> Any:
    build_ext = setup["BuildWithNinja"](setuptools.Distribution())
    build_ext.inplace, build_ext.extensions = inplace, []
    return build_ext


def plan(setup: dict[str, Any]) -> tuple[dict[str, str], dict[str, tuple[str, list[str]]]]:
    """Rules, and target -> (rule, inputs)."""
    rules, targets = command(setup).plan(build, "libbigmodel_cpu.so", False, None)
    return rules, {name: (rule, inputs) for name, rule, inputs in targets}


@pytest.mark.parametrize(
    ("machine", "sets"),
    [
        ("x86_64", ["portable", "avx2", "avx512", "avx512_bf16", "amx"]),
        ("AMD64", ["portable", "avx2", "avx512", "avx512_bf16", "amx"]),
        ("aarch64", ["neon"]),
        ("arm64", ["neon"]),
        ("riscv64", ["portable"]),
    ],
)
def test_instruction_sets_of_machines(setup: dict[str, Any], machine: str, sets: list[str]) -> None:
    assert list(setup["instruction_sets"](machine)) == sets


def test_every_source_of_a_kernel_is_compiled(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_TARGET", "x86_64")
    _, targets = plan(setup)
    compiled = {inputs[0] for _, inputs in targets.values() if inputs}
    folders = [f for f in (ROOT / "csrc").iterdir() if f.name not in ("emulator", "testing")]
    assert {str(path) for folder in folders for path in folder.glob("*.cpp")} - compiled == set()
    # What a set shares with the one that it extends is not compiled for it again.
    assert targets["attention_tile_unit.amx.o"][0] == "amx"
    assert "attention.avx512.o" in targets and "attention.amx.o" not in targets


def test_this_machine_links_its_torch(setup: dict[str, Any]) -> None:
    rules, targets = plan(setup)
    assert rules["link"].startswith("g++ ") and build.torch_flags()[1] in rules["link"]
    assert not any(name.startswith("torch/") for name in targets)


def test_another_machine_has_its_own_sets_and_stand_ins_for_torch(
    setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIGMODEL_TARGET", OTHER)
    rules, targets = plan(setup)
    sets = list(setup["instruction_sets"](OTHER))
    assert [isa for isa in sets if f"gemm.{isa}.o" not in targets] == []
    assert f"-DBIGMODEL_EVERY_CPU={sets[0]}" in rules["register"]
    assert ("-DBIGMODEL_X86" in rules["register"]) == (OTHER == "x86_64")
    stand_ins = [name for name in targets if name.startswith("torch/")]
    assert stand_ins == ["torch/libtorch_cpu.so", "torch/libtorch.so", "torch/libc10.so"]
    assert "-soname,libc10.so" in rules["stand_in_libc10.so"]
    assert targets["libbigmodel_cpu.so"][1][-4:] == ["|", *stand_ins]
    assert " -s " in rules["link"] and "-L" not in rules["link"]
    assert all(f"{OTHER}-linux-gnu-g++ " in rule for rule in rules.values())
    monkeypatch.setenv("CXX", "clang++ --target=there --sysroot=/there")
    assert all(f"{build.compiler()} -" in rule for rule in plan(setup)[0].values())


def test_the_tag_is_the_other_machines(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_TARGET", OTHER)
    wheel = setup["PlatformWheel"](setuptools.Distribution())
    assert wheel.get_tag() == ("py3", "none", f"linux_{OTHER}")


def test_what_another_machine_is_refused(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMODEL_TARGET", OTHER)
    assert setup["wants_cuda"]() is False
    with pytest.raises(SystemExit, match=f"BIGMODEL_TARGET={OTHER} is for wheels"):
        command(setup, inplace=True).build_extension(setuptools.Extension("a", []))
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    with pytest.raises(SystemExit, match=rf"BIGMODEL_TARGET={OTHER}: no C\+\+ compiler: '/nowhere/g\+\+"):
        command(setup).run()
    monkeypatch.setenv("BIGMODEL_CUDA", "1")
    with pytest.raises(SystemExit, match=f"BIGMODEL_CUDA=1: for BIGMODEL_TARGET={OTHER}"):
        setup["wants_cuda"]()
