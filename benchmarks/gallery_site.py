"""A hook of MkDocs: a report for each result of the gallery, made when the site is built.

A result is a few hundred kilobytes of JSON, a report brings its plotting library along, and anybody can make
one from the other by `lazarus show`: so the repository holds the results alone.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from lazarus import load_result


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add gallery/NAME.html for each gallery/NAME.json."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.html")
        for result in sorted(Path(config.docs_dir, "gallery").glob("*.json")):
            load_result(result).save(report)
            name = f"gallery/{result.stem}.html"
            files.append(File.generated(config, name, content=report.read_bytes()))
    return files
