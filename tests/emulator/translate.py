"""Translates CUDA source to C++ that includes emulator.h instead of CUDA's headers.

Launches and inline PTX become function calls:
    asm volatile("a.b {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(z));  ->  ptx::a_b(ptx::list((x), (y)), (z));
Instructions that the emulator lacks do not compile.
"""
import re

NESTED = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"  # parentheses, up to two deep
OPERAND = re.compile(rf'"([=+]?)\w"\s*\(({NESTED})\)')
BRACKETS = str.maketrans({"{": "ptx::list(", "}": ")", "[": "", "]": ""})


def translate(source):
    source = re.sub(r"#include <cuda_\w+\.h>", '#include "emulator.h"', source)
    source = re.sub(r"extern __shared__ .*?(\w+)\[\];", r"unsigned char* \1 = emulator::shared;", source)
    source = re.sub(r"([\w<>]+)<<<(.*?)>>>\(", r"emulator::launch(\1, \2)(", source)
    return re.sub(r"\basm(?: volatile)?\((.*?)\);", ptx_call, source, flags=re.S)


def ptx_call(match):
    joined = re.sub(r'"\s+"', "", match[1])  # joins adjacent string literals
    text, rest = re.match(r'\s*"([^"]*);"(.*)', joined, re.S).groups()
    operands = OPERAND.findall(rest)
    name, _, arguments = text.partition(" ")
    for number in re.findall(r"%(\d+)", arguments.partition("}")[2]):
        assert operands[int(number)][0] != "=", f"{text}: operand {number} is also read, which needs '+'"
    arguments = re.sub(r"%(\d+)", lambda n: f"({operands[int(n[1])][1]})", arguments.translate(BRACKETS))
    return f"ptx::{name.replace('.', '_')}({arguments});"
