"""What the text of a compiled HLO module says of its instructions."""

import re
from collections import defaultdict
from dataclasses import dataclass

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*? ([a-z][a-z0-9-]*)\(")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
NAMES = re.compile(r'(?:op_name|custom_call_target)="([^"]*)"')
CALLED = re.compile(r"calls=%?([\w.-]+)")
FRAME = re.compile(r"stack_frame_id=(\d+)")
ENTRY = re.compile(r"^(\d+) (.*)$")  # of the tables before the computations
TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclass(frozen=True)
class Instruction:
    """An instruction's operation, its first name, and all that says where it comes from."""

    opcode: str
    origin: str
    label: str


UNKNOWN = Instruction("", "", "")
Program = dict[str, Instruction]  # by name


def read_program(text: str) -> Program:
    """The instructions of all computations. A fusion without a name of its own has those of what it fuses."""
    lines = text.splitlines()
    chains = _chains(_tables(lines))
    found: dict[str, tuple[str, str, str | None]] = {}  # name -> opcode, label, what it calls
    inside = defaultdict[str, list[str]](list)  # computation -> labels
    computation = ""
    for line in lines:
        if match := INSTRUCTION.match(line):
            frame = FRAME.search(line)
            names = NAMES.findall(line)
            label = " ".join([*names, *([chains.get(int(frame[1]), "")] if frame else ())])
            called = CALLED.search(line)
            found[match[1]] = match[2], label, called[1] if called else None
            inside[computation].append(label)
        elif match := COMPUTATION.match(line):
            computation = match[1]
    program = {}
    for name, (opcode, label, called) in found.items():
        whole = label or " ".join(filter(None, inside[called or ""]))
        program[name] = Instruction(opcode, whole.partition(" ")[0] or opcode, whole)
    return program


def _tables(lines: list[str]) -> dict[str, dict[int, str]]:
    """The numbered entries of each table; empty where the module has none."""
    tables: dict[str, dict[int, str]] = {name: {} for name in TABLES}
    current = None
    for line in lines:
        if line in tables:
            current = tables[line]
        elif current is not None and (match := ENTRY.match(line)):
            current[int(match[1])] = match[2]
        elif line:
            current = None
    return tables


def _chains(tables: dict[str, dict[int, str]]) -> dict[int, str]:
    """The functions that each stack frame stands in, innermost first."""

    def number(entry: str, name: str) -> int:
        match = re.search(rf"{name}=(\d+)", entry)
        return int(match[1]) if match else 0

    frames, chains = tables["StackFrames"], dict[int, str]()
    # a frame without a parent has the number 0 or, where parents are counted from 1, the number 1
    none = number(frames.get(1, ""), "parent_frame_id")
    for frame, entry in sorted(frames.items()):
        location = tables["FileLocations"].get(number(entry, "file_location_id"), "")
        function = tables["FunctionNames"].get(number(location, "function_name_id"), "").strip('"')
        parent = number(entry, "parent_frame_id") - none
        chains[frame] = f"{function} {chains.get(parent, '')}".strip()
    return chains
