"""The repository's own files that `minimind init` writes go into the wheel, beside the code.

Everything else stands in pyproject.toml, which cannot take files from outside the packages.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = (
    *("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/plots/*.json"),
    *("presets/*.yaml", "rewards/*.py", "launchers/**/*", "lm-eval/*.yaml", "lm-eval/*/*"),
    *("docs/data.md", "docs/project*.md", "docs/settings.md"),
)


class BuildWithShipped(build_py):
    """An editable install has these files where they are (`minimind.project.template.shipped`)."""

    def run(self) -> None:
        super().run()
        root = Path(__file__).parent
        for file in () if self.editable_mode else [f for p in SHIPPED for f in root.glob(p)]:
            target = Path(self.build_lib, "minimind", "shipped", file.relative_to(root))
            if file.is_file():
                self.mkpath(str(target.parent))
                self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithShipped})
