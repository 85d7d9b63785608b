"""The commands of `s2s`, and what each does, in a line."""

# Each is a module of this room with a function `main(argv) -> exit code`.
COMMANDS = {
    "train": "Trains a model, or goes on from the newest checkpoint of its run directory.",
    "evaluate": "Says how often a run recommends what users did next.",
    "recommend": "Writes the best items for each row of a log.",
    "report": "Makes a page to look at: what a run learned, and what it recommends.",
    "convert": "Turns event logs into the ORC logs that training reads.",
    "inspect": "Shows what ORC logs hold, and what to mend in them.",
    "catalogue": "Collects the items of a log into a file.",
    "synthesize": "Makes a behaviour log to try things on.",
    "tables": "Shows what is in the embedding tables of a run.",
    "config": "Prints the resolved configuration as JSON.",
    "batch": "Shows one batch as the model sees it: shapes, ids, times and targets.",
}
