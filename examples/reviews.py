"""10,604 movie-review snippets with human scores, from the source distribution of vaderSentiment.

    python examples/reviews.py reviews
    python examples/reviews.py editorials --of editorials  # of a newspaper; or products, tweets

writes reviews/train.jsonl and reviews/test.jsonl with the columns `text` and `label` (1 for a score above 0.5, 0 for
one below -0.5; those in between are left out): files that `surgeon apply --data reviews` reads as they are. The scores
are the means of ten raters on a scale from -4 to 4 (Hutto and Gilbert, 2014).
"""

import argparse
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
TABLES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}


def download(directory: Path, table: str) -> list[tuple[float, str]]:
    """(score, text) of every snippet; the scores run from -4 to 4."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", PACKAGE]
    subprocess.run([*command, "-d", str(directory)], check=True)
    (package,) = directory.glob("*.tar.gz")
    with tarfile.open(package) as outer:
        member = next(name for name in outer.getnames() if name.endswith(ARCHIVE))
        with tarfile.open(fileobj=outer.extractfile(member)) as inner:
            file = inner.extractfile(f"hutto_ICWSM_2014/{table}")
            assert file is not None
            rows = file.read().decode("utf-8", errors="replace").splitlines()
    cells = [row.split("\t", 2) for row in rows if row.count("\t") >= 2]
    return [(float(score), text.strip()) for _, score, text in cells]


def write(out: Path, of: str = "movies", seed: int = 0) -> None:
    """Write both files; one snippet in five is for testing."""
    with tempfile.TemporaryDirectory() as directory:
        snippets = download(Path(directory), TABLES[of])
    rows = [{"text": text, "label": int(score > 0)} for score, text in snippets if abs(score) > 0.5]
    random.Random(seed).shuffle(rows)
    out.mkdir(parents=True, exist_ok=True)
    test = len(rows) // 5
    for name, part in (("test", rows[:test]), ("train", rows[test:])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        print(f"{out / name}.jsonl: {len(part)} snippets")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--of", choices=list(TABLES), default="movies", help="what was scored")
    args = parser.parse_args()
    write(args.out, args.of)
