"""Everything about the package stands in pyproject.toml; this refuses to build one that would lack its half."""

from pathlib import Path

from setuptools import setup

for name in ("passes", "pallas_kernels"):
    if not (Path(__file__).parent / "qjax" / name).is_dir():
        raise SystemExit(
            f"qjax/{name} is no link to {name}/, because Git made this checkout without symbolic links (it does on "
            "Windows). Turn on Windows' developer mode, then: git config core.symlinks true && git checkout -- qjax"
        )
setup()
