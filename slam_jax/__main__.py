"""python -m slam_jax: which programs there are."""

import ast
import sys
from pathlib import Path

_PROGRAM = 'if __name__ == "__main__":'


def main() -> int:
    """Lists them; status 2 if one was asked for, since each is called by its own name."""
    described = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        text = path.read_text(encoding="utf-8")
        if _PROGRAM in text:
            described[path.stem] = ast.get_docstring(ast.parse(text)).splitlines()[0]
    if len(sys.argv) > 1 and not {"-h", "--help"} & set(sys.argv):
        name = sys.argv[1] if sys.argv[1] in described else "PROGRAM"
        print(f"error: {sys.argv[1]}: run python -m slam_jax.{name}", file=sys.stderr)
        return 2
    width = max(map(len, described))
    for name, line in described.items():
        print(f"python -m slam_jax.{name:<{width}}  {line}")
    print("\nEach tells more with --help.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
