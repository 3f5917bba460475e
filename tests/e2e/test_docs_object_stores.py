"""docs/how-to/use-object-stores.md, against a server of S3's protocol on loopback."""

from __future__ import annotations

import os
from pathlib import Path

from tests.helpers.console_blocks import Shell, run_page
from tests.helpers.nursery import Nursery
from tests.servers.s3 import Bucket

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "use-object-stores.md"


def test_the_page(cards: Path, nursery: Nursery, s3: Bucket, tmp_path: Path) -> None:
    s3.client.create_bucket(Bucket="models")
    run_page(PAGE.read_text(encoding="utf-8"), Shell(nursery, tmp_path, tmp_path / "bin", os.environ))
