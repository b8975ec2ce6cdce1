"""From a CUDA file to C++ that any compiler takes: launches, shared memory and inline PTX become calls of the emulator (emulator.h).

Everything else stays as it is: prelude.h gives CUDA's other words a meaning. Line numbers stay too.
"""

import re


def rewrite(source: str, name: str, namespace: str) -> str:
    """
    Args:
        source: Text of a .cu or .cuh file, or of csrc/library.cpp.
        name: Its path, for messages of the compiler and of the emulator.
        namespace: Of torch.ops, where the launchers are registered.
    """
    for step in (_dynamic_shared, _static_shared, _assembly, _launches, _kernels):
        source = step(source)
    source = source.replace(
        "STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CUDA, m)", f"STABLE_TORCH_LIBRARY_IMPL({namespace}, CompositeExplicitAutograd, m)"
    )
    source = source.replace("STABLE_TORCH_LIBRARY(sami_fast_C, m)", f"STABLE_TORCH_LIBRARY({namespace}, m)")
    source = source.replace("is_cuda()", "is_cpu()")
    return f'#line 1 "{name}"\n{source}'


def _dynamic_shared(source: str) -> str:
    return re.sub(r"extern __shared__ (?:__align__\(\d+\) )?char (\w+)\[\];", r"char* const \1 = emulator::dynamic_shared();", source)


def _static_shared(source: str) -> str:
    def declare(match: re.Match) -> str:
        kind, out = match[1], ""
        for name, extents in re.findall(r"(\w+)((?:\[[^\]]+\])+)", match[2]):
            out += (
                f'static const char {name}_key = 0; {kind} (&{name}){extents} = emulator::shared<{kind}{extents}>(&{name}_key, "{name}"); '
            )
        return out

    return re.sub(r"__shared__ (\w+) ([^;]+);", declare, source)


def _assembly(source: str) -> str:
    """asm volatile("name.of.instruction {%0,...}, [%4];" : "=r"(x) : "r"(y)) -> emulator::name_of_instruction(__LINE__, x, y)"""

    def call(match: re.Match) -> str:
        text = match[1].replace("\n", " ")
        template = re.match(r'\s*"([^"]*)"', text)
        assert template, text
        instruction, _, operands = template[1].rstrip(";").partition(" ")
        values = re.findall(r'"[=+]?[rfln]"\(((?:[^()]|\([^()]*\))*)\)', text[template.end() :])
        arguments = ", ".join(["__LINE__", *(values[int(place)] for place in re.findall(r"%(\d+)", operands))])
        return f"emulator::{re.sub(r'[.:]+', '_', instruction)}({arguments});" + "\n" * match[0].count("\n")

    return re.sub(r"asm volatile\((.*?)\);", call, source, flags=re.DOTALL)


def _launches(source: str) -> str:
    """kernel<A, B><<<grid, threads, ...>>>(...) -> emulator::start(__FILE__, __LINE__, "kernel", kernel<A, B>, grid, threads, ...)(...)"""
    while (at := source.find("<<<")) >= 0:
        begin = at
        if source[begin - 1] == ">":  # template arguments
            depth = 0
            while True:
                begin -= 1
                depth += {">": 1, "<": -1}.get(source[begin], 0)
                if depth == 0:
                    break
        while re.match(r"\w|:", source[begin - 1]):
            begin -= 1
        kernel, end = source[begin:at], source.index(">>>", at)
        name = re.match(r"[\w:]+", kernel)[0]
        source = f'{source[:begin]}emulator::start(__FILE__, __LINE__, "{name}", {kernel}, {source[at + 3 : end]}){source[end + 3 :]}'
    return source


def _kernels(source: str) -> str:
    """Every kernel says its name as it begins."""
    out, place = "", 0
    for match in re.finditer(r"__global__", source):
        at, depth = match.end(), 0
        while depth or source[at] != "{":
            depth += {"(": 1, ")": -1}.get(source[at], 0)
            at += 1
        out += source[place : at + 1] + " emulator::entered(__PRETTY_FUNCTION__);"
        place = at + 1
    return out + source[place:]
