"""Small made-up files in the formats of those that RULER's other tasks need."""

import json
from pathlib import Path

SENTENCES = [
    f"Sentence {number} of an essay tells that number {number * 7} was a good one to begin with."
    for number in range(120)
]


def save_files(folder: Path) -> Path:
    """Write essays, SQuAD and HotpotQA into a folder."""
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": "\n".join(SENTENCES)}))
    articles = [
        {
            "title": f"Article {article}",
            "paragraphs": [
                {
                    "context": f"Place {article}-{part} lies in land {article * 10 + part}. " * 4,
                    "qas": [
                        {
                            "question": f"Where lies place {article}-{part}?",
                            "is_impossible": part == 2,
                            "answers": [{"text": f"land {article * 10 + part}"}],
                        }
                    ],
                }
                for part in range(4)
            ],
        }
        for article in range(8)
    ]
    (folder / "dev-v2.0.json").write_text(json.dumps({"data": articles}))
    entries = [
        {
            "question": f"Who built bridge {number}?",
            "answer": f"builder {number}",
            "context": [
                [f"Bridge {number}", [f"It was built by builder {number}.", " It is old."]],
                [f"Town {number}", [f"It has bridge {number}."]],
            ],
        }
        for number in range(200)
    ]
    (folder / "hotpot_dev_distractor_v1.json").write_text(json.dumps(entries))
    return folder
