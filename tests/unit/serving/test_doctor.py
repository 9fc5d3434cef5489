"""The doctor: what is really there, and what it says where something is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from mimco_deploy.cli import main
from mimco_deploy.serving import doctor
from mimco_deploy.serving.doctor import Finding, examine


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def with_packages(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: versions.get(name, ""))


def answering(monkeypatch: pytest.MonkeyPatch, *, code: int, stdout: str = "", stderr: str = "") -> None:
    """Every command ends so."""
    done = subprocess.CompletedProcess[str]([], code, stdout, stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)


def test_the_machine_of_these_tests_is_told_as_it_is() -> None:
    found = by_name(examine())
    assert found["Python"].found.startswith(sys.version.split()[0])
    assert found["ONNX Runtime"].state == "ok"
    assert found["ONNX Runtime"].found.endswith(onnxruntime.__version__)
    assert found["CPUExecutionProvider"] == Finding("CPUExecutionProvider", "ok", "a session runs on it")
    offered = set(onnxruntime.get_available_providers()) - {"AzureExecutionProvider"}  # which runs nothing here
    assert offered <= set(found)
    assert "AzureExecutionProvider" not in found


def test_the_graph_of_the_probe_is_one_identity() -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="")
    assert bytes.fromhex(doctor._GRAPH) == model.SerializeToString()


def test_both_runtimes_at_once_are_a_problem_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    with_packages(monkeypatch, {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"})
    finding = doctor._runtime(has_gpu=True)
    assert finding.state == "problem"
    assert "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1" in finding.found
    assert finding.command == 'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "mimco-deploy[gpu]"'


@pytest.mark.parametrize(
    ("versions", "has_gpu", "state", "command"),
    [
        ({}, False, "problem", 'pip install "mimco-deploy[cpu]"'),
        ({}, True, "problem", 'pip install "mimco-deploy[gpu]"'),
        ({"onnxruntime": "1"}, False, "ok", ""),
        ({"onnxruntime": "1"}, True, "problem", 'pip uninstall -y onnxruntime && pip install "mimco-deploy[gpu]"'),
        ({"onnxruntime-gpu": "1"}, True, "ok", ""),
    ],
)
def test_the_runtime_has_to_suit_the_machine(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], has_gpu: bool, state: str, command: str
) -> None:
    with_packages(monkeypatch, versions)
    finding = doctor._runtime(has_gpu=has_gpu)
    assert (finding.state, finding.command) == (state, command)


def test_a_missing_package_of_the_base_is_a_problem_and_of_an_extra_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with_packages(monkeypatch, {"click": "8", "numpy": "2", "pillow": "12", "rich": "14"})
    found = by_name(doctor._packages())
    assert found["faiss-cpu"].state == "problem"
    assert (found["torch"].state, found["torch"].command) == ("absent", 'pip install "mimco-deploy[train]"')
    assert found["onnx"].command == 'pip install "mimco-deploy[export]"'


def broken(folder: Path, package: str, content: str = "") -> Path:
    """A folder with a package that hides the one that is installed."""
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(content, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("import of_its_own", "ModuleNotFoundError: No module named 'of_its_own'"),
        ("", "AttributeError: module 'onnxruntime' has no attribute 'get_available_providers'"),
    ],
)
def test_a_runtime_that_cannot_be_imported_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, reason: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(broken(tmp_path, "onnxruntime", content)), *sys.path]))
    with_packages(monkeypatch, {"onnxruntime": "1.32.0"})
    monkeypatch.setattr(doctor, "_driver", lambda: Finding("NVIDIA driver", "absent", "no nvidia-smi"))
    found = by_name(examine())
    command = "pip install --force-reinstall onnxruntime"
    told = f"onnxruntime 1.32.0 cannot be imported: {reason}"
    assert found["ONNX Runtime"] == Finding("ONNX Runtime", "problem", told, command)
    assert not [name for name in found if name.endswith("Provider")]


@pytest.mark.parametrize(("package", "name"), [("numpy", "numpy"), ("PIL", "pillow")])
def test_a_package_of_which_only_the_version_is_left_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(broken(tmp_path, package)))
    finding = by_name(doctor._packages())[name]
    assert (finding.state, finding.command) == ("problem", "pip install --force-reinstall mimco-deploy")
    assert "cannot be imported: " in finding.found


def test_the_doctor_needs_no_rich(tmp_path: Path) -> None:
    folder = broken(tmp_path, "rich", "import of_its_own")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    command = [sys.executable, "-m", "mimco_deploy", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "rich  problem  " in done.stdout
    assert "cannot be imported: ModuleNotFoundError: No module named 'of_its_own'" in done.stdout


CUDA_MISSING = (
    "\x1b[1;31m2026 [E:onnxruntime:Default, provider_bridge_ort.cc:2458] Failed to load library "
    "libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared object file\n\x1b[m"
)


@pytest.mark.parametrize(
    ("answer", "found", "command"),
    [
        (
            {"code": 0, "stdout": '["CPUExecutionProvider"]\n', "stderr": CUDA_MISSING},
            "does not start, CPUExecutionProvider runs instead: libcublasLt.so.13: cannot open shared object file",
            'pip install "onnxruntime-gpu[cuda,cudnn]"',
        ),
        (
            {"code": 1, "stderr": "RuntimeError: Please install TensorRT libraries as mentioned, and so on"},
            "Please install TensorRT libraries as mentioned",
            "install TensorRT's libraries, or use --device cuda",
        ),
        (
            {"code": 1, "stderr": "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version"},
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version",
            "install an NVIDIA driver of this CUDA version or newer",
        ),
        ({"code": -11}, "crashes with signal 11: no reason given", "use --device cpu"),
    ],
)
def test_a_provider_that_does_not_start_says_why_and_what_next(
    monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any], found: str, command: str
) -> None:
    answering(monkeypatch, **answer)
    finding = doctor._provider("CUDAExecutionProvider")
    assert finding == Finding("CUDAExecutionProvider", "problem", found, command)


def test_a_provider_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, **__: object) -> object:
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    assert doctor._provider("X").found == "gives no answer (TimeoutExpired)"


def test_a_driver_is_told_with_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, code=0, stdout="NVIDIA L4, 570.1, 8.9, 23034 MiB\n")
    assert doctor._driver() == Finding("NVIDIA driver", "ok", "NVIDIA L4, 570.1, 8.9, 23034 MiB")
    answering(monkeypatch, code=9, stdout="NVIDIA-SMI has failed because it couldn't communicate with the driver.\n")
    assert doctor._driver().state == "problem"


def test_a_driver_that_writes_no_text_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_bytes(b"#!/bin/sh\nprintf 'NVIDIA \\377, 570.1\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert doctor._driver() == Finding("NVIDIA driver", "ok", "NVIDIA �, 570.1")


def test_the_command_exits_with_1_where_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("X", "problem", "is broken", "mend it")])
    done = CliRunner().invoke(main, ["doctor"])
    assert done.exit_code == 1
    assert "mend it" in done.output
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("X", "absent", "is not there")])
    done = CliRunner().invoke(main, ["doctor", "--json"])
    assert done.exit_code == 0
    assert done.output.strip() == '[{"name": "X", "state": "absent", "found": "is not there", "command": ""}]'
