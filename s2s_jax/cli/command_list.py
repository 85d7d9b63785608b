"""The commands of `s2s`, with one line of help for each."""

# Each is a module of `commands/` with a function `main(argv)` that returns the exit code.
COMMANDS = {
    "init": "Writes a first config file for a log, and says how long training will take.",
    "train": "Trains a model, or continues from the newest checkpoint of its run directory.",
    "evaluate": "Measures how often a run recommends what users did next.",
    "recommend": "Writes the top items for each row of a log.",
    "export": "Exports a checkpoint, so that it answers histories without JAX.",
    "serve": "Answers recommendations over HTTP from an export, with a page to try them.",
    "checkpoint": "Converts a checkpoint to or from weights of the RecIS example in PyTorch.",
    "report": "Writes an HTML page about a run: its metrics and its recommendations.",
    "convert": "Converts event logs to the ORC logs that training reads.",
    "inspect": "Shows what ORC logs contain, and problems to fix in them.",
    "catalogue": "Writes the items of a log to a file, with their counts.",
    "synthesize": "Writes a synthetic behaviour log to try things out.",
    "tables": "Shows the embedding tables of a run.",
    "config": "Prints the final configuration as JSON.",
    "batch": "Shows one batch as the model sees it: shapes, ids, times and targets.",
}
