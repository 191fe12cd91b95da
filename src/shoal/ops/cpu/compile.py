"""`python -m shoal.ops.cpu.compile PATH`: the kernels, for this machine's processor, as one object file.

A process of its own, because numba takes 0.7 s and 80 MiB to import and is needed once a machine: whoever
serves loads the object without LLVM (`ops/cpu/link.py`). numba types the Python and writes LLVM's
language; what it would optimise function by function is optimised here once, together (5 s instead of 9).

The law: what is at PATH is whole, and belongs to the machine and the sources that it is named by.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Read by numba when it is imported. One pass of LLVM over everything follows.
os.environ |= {"NUMBA_OPT": "0", "NUMBA_LOOP_VECTORIZE": "0", "NUMBA_SLP_VECTORIZE": "0"}

import llvmlite.binding as llvm

from shoal.ops.cpu.kernels import attention, experts, rows
from shoal.ops.cpu.load import TEAMS

ENTRIES = {
    "latent_step": attention.latent_step,
    "grouped_step": attention.grouped_step,
    "mlp_step": experts.mlp_step,
    "moe_step": experts.moe_step,
    "norm_step": rows.norm_step,
    "head_step": rows.head_step,
    "greedy_step": rows.greedy_step,
    "record_step": rows.record_step,
}


def _team(name: str, function: llvm.ValueRef) -> str:
    """LLVM's words for `name_team`, which each thread of a team runs: the entry, its arguments from memory,
    8 bytes each, the thread's number and the team's size. The status goes in the next 8 bytes."""
    types = [str(argument.type) for argument in function.arguments]
    lines, given = [], []
    for i, type_ in enumerate(types[:-2]):
        lines += [f"%p{i} = getelementptr i64, ptr %a, i64 {i}", f"%v{i} = load {type_}, ptr %p{i}"]
        given.append(f"{type_} %v{i}")
    lines += ["%n = call i32 @omp_get_thread_num()", "%part = sext i32 %n to i64"]
    lines += ["%m = call i32 @omp_get_num_threads()", "%parts = sext i32 %m to i64"]
    lines += [f"%s = call i64 @{name}({', '.join(given)}, i64 %part, i64 %parts)"]
    lines += [f"%to = getelementptr i64, ptr %a, i64 {len(types) - 2}", "store i64 %s, ptr %to", "ret void"]
    return "\n".join(
        [
            "declare i32 @omp_get_thread_num()",
            "declare i32 @omp_get_num_threads()",
            f"declare i64 @{name}({', '.join(types)})",
            f"define void @{name}_team(ptr %a) {{",
            *lines,
            "}",
        ]
    )


def compile_object() -> bytes:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # 1. One module of all entries, each under its own name and by C's rules.
    module = llvm.parse_assembly("")
    for name, entry in ENTRIES.items():
        part = llvm.parse_assembly(entry.inspect_llvm())
        function = part.get_function(entry.native_name)
        function.name = name
        team = _team(name, function) if name in TEAMS else ""
        module.link_in(part)
        module.link_in(llvm.parse_assembly(team))
    # 2. Optimised for this processor.
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="default",
        codemodel="large",  # references of 64 bits, which `link` knows
    )
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.loop_interleaving = tuning.loop_unrolling = True
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    return machine.emit_object(module)


def main() -> None:
    path = Path(sys.argv[1])
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(compile_object())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


if __name__ == "__main__":
    main()
