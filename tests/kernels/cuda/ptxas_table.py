"""What ptxas says of every kernel, as a table: `python ptxas_table.py LOG...`, logs of `nvcc -Xptxas -v`.

Shared memory isn't in it: it is sized at launch, and `launch_test --shared` has the table of it.

Exits with 1 where a register is spilled, or where a log names no kernel.
"""

import re
import subprocess
import sys

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>sm_\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.S,
)


def main(logs: list[str]) -> int:
    """Print the table; 0 if nothing spills."""
    rows: dict[tuple[str, str], str] = {}
    spilled = 0
    for log in logs:
        with open(log, encoding="utf-8") as file:
            found = list(KERNEL.finditer(file.read()))
        if not found:
            print(f"{log}: no kernel")
            return 1
        mangled = "\n".join(match["name"] for match in found)
        names = subprocess.run(
            ["c++filt"], input=mangled, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for match, name in zip(found, names, strict=True):
            kernel = re.sub(r"^.*?run_kernel<(.*?)>\(.*$", r"\1", name).replace("vcr::cuda::", "").replace("vcr::", "")
            bad = int(match["stores"]) + int(match["loads"]) > 0
            spilled += bad
            rows[kernel, match["arch"]] = (
                f"{kernel:36} {match['arch']:7} {match['registers']:>9} {match['stores']:>6}/{match['loads']:<6} "
                f"{match['stack']:>5}{'  SPILLS' if bad else ''}"
            )
    print(f"{'kernel':36} {'for':7} {'registers':>9} {'spills':>6} {'stack':>11}")
    for key in sorted(rows):
        print(rows[key])
    print(f"{len(rows)} kernels, {spilled} of them spill")
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
