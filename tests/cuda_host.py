"""Executes the CUDA sources on the CPU: `Host.launch` stands in for `_cuda.launch`.

g++ builds each source, with `cuda_host.h` in the place of `ptx.cuh`, into a program under the address and the undefined
behaviour sanitizer, which runs as long as the `Host` is open. A launch hands it all memory in a file and reads the
memory back. Every launch runs twice, each time in a child of the program, with threads and blocks in ascending and in
descending order, and has to leave the same bits.
"""

import itertools
import os
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

from engine.kernels import _cuda

FLAGS = ["-std=c++20", "-O1", "-g1", "-mf16c", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-attributes"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # a child ends with its request
KINDS = {torch.float32: "F", torch.float64: "D", torch.int32: "U", torch.float16: "H", torch.bfloat16: "B"}


class Shifted(NamedTuple):
    """In a table: an address so many bytes from the start of a tensor, which may be outside of it."""

    tensor: torch.Tensor
    bytes: int


def pointer(cell):
    """The pointer in a cell of a table, None for a number."""
    return Shifted(cell, 0) if isinstance(cell, torch.Tensor) else cell if isinstance(cell, Shifted) else None


class Host:
    """Its own files are in `folder`, the programs in `built`, where several processes may use them."""

    def __init__(self, folder: Path, built: Path) -> None:
        self.folder, self.built = folder, built
        self.extra: dict[str, tuple[str, tuple[str, ...]]] = {}  # name -> (source, kernels) of a test's own
        self._running: dict[str, subprocess.Popen[str]] = {}

    def program(self, name: str) -> Path:
        target = (self.folder if name in self.extra else self.built) / name
        with FileLock(f"{target}.lock"):
            if not target.exists():
                self._build(name, target)
        return target

    def _build(self, name: str, target: Path) -> None:
        source, kernels = self.extra.get(name) or (_cuda.text(f"{name}.cu"), _cuda.expressions(name))
        source = source.replace(_cuda.text("ptx.cuh"), '#include "cuda_host.h"\n')
        entries = ", ".join(f"[](const Request& r) {{ call(&{kernel}, r); }}" for kernel in kernels)
        main = "int main() { return serve(entries); }\n"
        code = target.with_suffix(".cpp")
        code.write_text(f"{source}\nstatic void (*const entries[])(const Request&) = {{{entries}}};\n{main}")
        command = ["g++", *FLAGS, *SANITIZERS, f"-I{Path(__file__).parent}", str(code), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        for process in self._running.values():
            process.communicate()

    def ask(self, name: str, request: Path, answer: Path) -> str:
        """Let the program make a launch: what it says of errors, empty if there are none."""
        errors = self.folder / f"{name}.errors"
        if name not in self._running:
            with errors.open("w") as file:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
                self._running[name] = subprocess.Popen([str(self.program(name))], text=True, env=ENVIRONMENT, **pipes)
        process = self._running[name]
        process.stdin.write(f"{request} {answer}\n")
        process.stdin.flush()
        if process.stdout.readline() == "0\n":
            return ""
        del self._running[name]  # the next launch has errors of its own
        process.communicate()
        return errors.read_text() or "it ended"

    def launch(self, name, kernel, grid, *arguments):
        kernels = self.extra[name][1] if name in self.extra else _cuda.expressions(name)
        tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
        for table in arguments:
            if isinstance(table, _cuda.Table):
                tensors += [table.tensor, *(cell.tensor for cell in map(pointer, itertools.chain(*table.rows)) if cell)]
        storages = {}
        for tensor in tensors:
            storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage())
        index = {address: i for i, address in enumerate(storages)}
        memories = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]

        def place(tensor, shift=0):
            start = tensor.untyped_storage().data_ptr()
            return index[start], tensor.data_ptr() - start + shift

        relocations, values = [], []
        for argument in arguments:
            if isinstance(argument, _cuda.Table):
                at = place(argument.tensor)[0]
                cells = enumerate(map(pointer, itertools.chain(*argument.rows)))
                relocations += [(at, 8 * i, *place(*cell)) for i, cell in cells if cell]
                values.append((ord("S"), at, 0))
            elif isinstance(argument, torch.Tensor):
                values.append((ord(KINDS[argument.dtype]), *place(argument)))
            elif argument is None:
                values.append((ord("n"), 0, 0))
            elif isinstance(argument, int):
                values.append((ord("i"), argument, 0))
            else:
                values.append((ord("f"), struct.unpack("<I", struct.pack("<f", argument))[0], 0))
        tables = {place(each.tensor)[0] for each in arguments if isinstance(each, _cuda.Table)}
        request = bytearray(struct.pack("<4q", kernels.index(kernel), *(*grid, 1, 1)[:3]))
        request += struct.pack("<q", len(memories))
        for memory in memories:
            request += struct.pack("<q", len(memory)) + memory.numpy().tobytes()
        for rows in (relocations, values):
            request += struct.pack("<q", len(rows))
            for row in rows:
                request += struct.pack(f"<{len(row)}q", *row)
        asked, answer = self.folder / "request", self.folder / "answer"
        asked.write_bytes(request)
        errors = self.ask(name, asked, answer)
        assert not errors, f"{name}: {kernel}\n{errors[:3000]}"
        answers = []
        for direction in (1, -1):
            content = Path(f"{answer}{direction}").read_bytes()
            found, position = [], 0
            for i, memory in enumerate(memories):
                found.append(None if i in tables else content[position : position + len(memory)])
                position += len(memory)
            answers.append(found)
        assert answers[0] == answers[1], f"{name}: {kernel} depends on the order of threads: a barrier is missing"
        for memory, found in zip(memories, answers[0], strict=True):
            if found:
                memory.copy_(torch.frombuffer(bytearray(found), dtype=torch.uint8))
