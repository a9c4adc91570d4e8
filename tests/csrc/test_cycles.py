"""csrc/cycles.py on a kernel that is written out: it finds the loop, the way through it, and the pipes."""

from __future__ import annotations

from build_csrc import load

# Two products before the loop, then a loop around a loop: the inner one has the most, and a way around its
# masking. The last jump is out of line.
SASS = """
\t\tFunction : _ZN8bigmodel4cuda5enterINS0_13AttentionSm90INS0_8bfloat16ELi64ELb0ELi3EEELi98488EEEvNT_6ParamsE
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/                   MUFU.EX2 R3, R3 ;
        /*0030*/                   HGMMA.64x96x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*0050*/              @!P0 BRA 0xd0 ;
        /*0060*/               @P1 BRA 0x80 ;
        /*0070*/                   FSEL R4, R4, -INF, P2 ;
        /*0080*/                   MUFU.EX2 R4, R4 ;
        /*0090*/                   FFMA R5, R4, R4, R5 ;
        /*00a0*/               @P3 BRA 0x30 ;
        /*00b0*/               @P4 BRA 0x20 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0 ;
        /*00e0*/              @!P0 BRA 0xd0 ;
        /*00f0*/                   BRA 0x60 ;
"""


def test_the_inner_loop_is_counted() -> None:
    cycles = load("cycles")
    ((name, code),) = cycles.functions(SASS).items()
    assert [i.opcode.split(".")[0] for i in cycles.main_loop(code)] == [
        *("HGMMA", "SYNCS", "BRA", "BRA", "MUFU", "FFMA", "BRA"),
    ]
    loop = cycles.measure(name, code)
    assert loop.kernel == "AttentionSm90<bfloat16, 64, 0, 3>" and loop.warps == 3
    assert loop.cycles() == {"tensor": 3 * 64 * 96 * 16 / 2048, "issue": 21, "exp2": 24, "float": 3}
    assert loop.at_most() == 1.0
