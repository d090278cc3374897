"""One file per export target. To add one, copy a file and add a line."""

EXPORTS = {
    "adapter": "finetune.exports.adapter:write",
    "weights": "finetune.exports.weights:write",
    "merged": "finetune.exports.merged:write",
}
