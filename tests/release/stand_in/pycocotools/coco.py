"""As much of pycocotools, which is an extra, as reads the annotations that tests write; for where it is not there."""

import json
from collections import defaultdict
from pathlib import Path


class COCO:
    def __init__(self, path: str):
        self.dataset = json.loads(Path(path).read_text(encoding="utf-8"))
        self.imgToAnns = defaultdict(list)
        for annotation in self.dataset["annotations"]:
            self.imgToAnns[annotation["image_id"]].append(annotation)
