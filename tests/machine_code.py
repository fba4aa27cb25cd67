"""What machine code of a GPU reads, as `nvdisasm` prints it."""

from __future__ import annotations

import re
import subprocess
import tempfile

import triton

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z]\S*) ?(.*?) *;", re.M)
PREDICATE = re.compile(r"!?U?P(T|\d)")
REGISTER = re.compile(r"\b(U?R)(\d+)\b")
STACK = "R1"


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = (triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def adds_to_nothing(sass: str) -> bool:
    """Whether something is added to a register that nothing before it in the text has written, or to that of the stack.

    ptxas 12.8 may do so to find a tile that lies where another one did, and the product then reads anything.
    """
    written: set[str] = set()
    for name, text in INSTRUCTION.findall(sass):
        operands = [operand for operand in text.split(", ") if not PREDICATE.fullmatch(operand)]
        first = REGISTER.match(operands[0]) if operands else None  # where there is a result, it comes first
        if re.match("U?IADD3", name):
            read = {kind + number for operand in operands[1:] for kind, number in REGISTER.findall(operand)}
            if not read <= written and operands[0] != STACK:
                return True
        if first is not None and operands[0] != STACK:
            kind, number = first.groups()
            written.update(f"{kind}{int(number) + more}" for more in range(_registers(name)))
    return False


def _registers(name: str) -> int:
    """How many registers of 32 bits the result of an instruction takes."""
    if product := re.match(r"HGMMA\.64x(\d+)x", name):
        return int(product[1]) // 2
    if re.match(r"[HI]MMA|LDSM", name) or ".128" in name:
        return 4
    pair = re.search(r"\.64|WIDE|^F2I\.[US]64|^(I2F|F2F|FRND)\.F64|^D(FMA|ADD|MUL)$", name)
    pair = pair or (name.startswith("CS2R") and ".32" not in name)
    return 2 if pair else 1
