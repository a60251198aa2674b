"""The emulated driver's own declarations of the NVENC interface agree with the public header (API 11.1)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from emulated import SOURCES, build, canned, installed, one_frame, random_surface
from sidelane.codec.nvenc import Encoder
from sidelane.layout import YUV444_10

OWN = SOURCES / "nvenc_11_1.h"
PUBLIC = Path("/usr/include/ffnvcodec/nvEncodeAPI.h")
HEX = """
static void hex(const char *name, const unsigned char *bytes, size_t n)
{
    printf("%s ", name);
    while (n--)
        printf("%02x", *bytes++);
    puts("");
}
"""


@pytest.fixture(autouse=True)
def _public_header() -> None:
    if not PUBLIC.exists():
        pytest.fail("this test needs libffmpeg-nvenc-dev; leave it out with -m 'not abi_probe'")


def questions() -> list[str]:
    """C statements that print everything nvenc_11_1.h declares: sizes, offsets, bits, numbers and GUIDs."""
    text = re.sub(r"/\*.*?\*/", "", OWN.read_text(), flags=re.S)
    asked = []
    for body, name in re.findall(r"typedef (?:struct|union) \{(.*?)\n\} (\w+);", text, flags=re.S):
        asked.append(f'printf("{name} %zu %zu\\n", sizeof({name}), _Alignof({name}));')
        for field, bits in re.findall(r"(\w+)(?:\[\d+\])?\s*(:\s*\d+)?\s*[,;]", body):
            path = f"{name}.{field}"
            if bits:
                asked.append(
                    f'{{ {name} s; memset(&s, 0, sizeof s); s.{field} = ~0; hex("{path}", &s, sizeof s); }}'
                )
            elif field != "space":  # of members that are not declared
                asked.append(
                    f'printf("{path} %zu %zu\\n", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));'
                )
    for number in re.findall(r"\b(NV_ENC_\w+) = \w+\b", text) + re.findall(
        r"#define (NV\w+_VER|NVENCAPI_VERSION)\b", text
    ):
        asked.append(f'printf("{number} %u\\n", (unsigned){number});')
    for guid in re.findall(r"static const GUID (\w+)", text):
        asked.append(f'hex("{guid}", &{guid}, sizeof {guid});')
    return asked


def answers(header: Path, folder: Path) -> list[str]:
    source, program = folder / "facts.c", folder / "facts"
    lines = ["stddef.h", "stdio.h", "string.h"]
    code = [*(f"#include <{line}>" for line in lines), f'#include "{header}"', HEX, "int main(void) {"]
    source.write_text("\n".join([*code, *questions(), "}", ""]))
    subprocess.run(["gcc", "-w", "-o", str(program), str(source)], check=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.abi_probe
def test_own_declarations_agree_with_the_public_header(tmp_path: Path) -> None:
    own = answers(OWN, tmp_path)
    assert len(own) > 350
    assert own == answers(PUBLIC, tmp_path)


@pytest.mark.abi_probe
def test_the_driver_compiled_against_the_public_header() -> None:
    with installed(build("-DPUBLIC_HEADER")):
        layout = one_frame(YUV444_10, 160, 48, frames=2)
        source = random_surface(layout)
        with Encoder(layout, qp=30, device="cuda:0") as encoder:
            encoder.set_qp(20)
            assert list(encoder.encode(source).pictures) == canned(source, layout, 20)
