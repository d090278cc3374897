"""One file per way to score an answer. To add one, copy a file and add a line.

A scorer is a function `score(answer, reference) -> dict[str, float]`: named figures from 0 to 1, of which
`exact_match` is the headline. Means over the rows are what `finetune evaluate` shows.
"""

SCORERS = {
    "exact_match": "finetune.scorers.exact_match:score",
    "json_fields": "finetune.scorers.json_fields:score",
}
